"""Doctor's checks, called with facts that no simulated machine has."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpushare.cli import doctor
from pytest_gpushare.cli.doctor.examine import (
    Examined,
    Finding,
    Level,
    Platform,
    look,
    overwriting,
    safe,
)
from pytest_gpushare.cli.doctor.machine import (
    devices,
    driver,
    ollama,
    other_hosts,
    sessions,
    visibility,
)
from pytest_gpushare.cli.doctor.project import caps, packages, plan, release, tools
from pytest_gpushare.cli.plan_command import PytestView, pytest_view, settings_of
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.gpu.devices import Device, GpuFacts, HostFacts
from pytest_gpushare.leases.ledger import MEETING_PLACE, Ledger
from pytest_gpushare.leases.records import LeaseRecord
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.planning.startup import plan_run
from pytest_gpushare.session import start_facts
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.units import GB

ROOT = Path(__file__).parents[2]
CARD = Device("GPU-0", "RTX 3090 Ti", "0", 24 * GB, 2 * GB, 22 * GB)
SILENT = OllamaFacts("127.0.0.1:11434", asked=True, problem="nothing listens there")


def examined(
    gpus: GpuFacts = GpuFacts((CARD,), (CARD,), driver="580"),  # noqa: B008 - frozen
    server: OllamaFacts = SILENT,
    ini: dict[str, object] | None = None,
    **changes: Any,
) -> Examined:
    """A healthy machine, but for the changes."""
    here = Path("/nowhere")
    settings = load(Written({}, {}, ini or {}, "pytest.ini", here, here, here))
    plan = plan_run(settings, gpus, {OLLAMA: server}, HostFacts(8), Request())
    found = Examined(
        environment={},
        where=Platform(system="Linux", python="CPython 3.12"),
        packages={"pytest": "9.2.0", "pytest-xdist": "3.8.0", "nvidia-ml-py": "13", "httpx": "1.0"},
        pynvml_is_foreign=False,
        pytest=PytestView(),
        settings=settings,
        settings_error="",
        started=ActiveRun(StartFacts(settings, gpus, {OLLAMA: server}, plan)),
        start_error="",
    )
    return replace(found, **changes)


def only(findings: Any, code: str) -> Finding:
    (found,) = [finding for finding in findings if finding.code == code]
    assert isinstance(found, Finding)
    return found


NO_LIBRARY = GpuFacts(absence="NVML library not found (NVML error 12)")


@pytest.mark.parametrize(
    ("where", "fix"),
    [
        (Platform(), "install the NVIDIA driver; nvidia-smi must work"),
        (Platform(is_container=True), "start the container with the GPU"),
        (Platform(is_wsl=True), "install the NVIDIA driver on Windows"),
        (Platform(is_wsl=True, wsl_library=True), "export LD_LIBRARY_PATH=/usr/lib/wsl/lib"),
    ],
)
def test_no_library_by_surroundings(where: Platform, fix: str) -> None:
    """What is missing differs between a bare machine, a container and WSL."""
    assert fix in only(driver(examined(NO_LIBRARY, where=where)), "nvml-missing").fix


@pytest.mark.parametrize(
    ("absence", "code"),
    [
        ("NVML did not answer within 10 s", "nvml-hangs"),
        ("Some new thing (NVML error 28)", "nvml-fails"),
        ("NVML finds no device", "no-device"),
        ("pynvml cannot be imported (no such module): install nvidia-ml-py", "pynvml-unusable"),
    ],
)
def test_other_absences(absence: str, code: str) -> None:
    """Each reason for which there is no NVML has a fix."""
    found = only(driver(examined(GpuFacts(absence=absence))), code)
    assert (found.level, found.fact) == (Level.BROKEN, absence)


def test_visibility_without_devices() -> None:
    """Where there is no device, the variable is only shown."""
    environment = {"CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "all"}
    findings = list(visibility(examined(NO_LIBRARY, environment=environment)))
    assert [finding.level for finding in findings] == [Level.OK, Level.OK]


def server(**changes: Any) -> OllamaFacts:
    return OllamaFacts("h:1", True, True, "0.33.0", reachable=True)._replace(**changes)


@pytest.mark.parametrize(
    ("facts", "changes", "code", "words"),
    [
        (SILENT, {"where": Platform(is_wsl=True)}, "ollama-silent", "from WSL the host is"),
        (
            SILENT._replace(problem="no answer within 0.5 s"),
            {"patient_ollama": server()},
            "ollama-slow",
            "gpu_share_ollama_timeout_s",
        ),
        (SILENT._replace(problem="x ('z' is no port: 1)"), {}, "ollama-address", "the port"),
        (
            SILENT._replace(reachable=True, problem="/api/ps gives status 404"),
            {},
            "ollama-nonsense",
            "before 0.1.38",
        ),
        (server(version="0.5.13"), {}, "ollama-old", "update Ollama"),
        (
            server(models=(LoadedModel("m", GB, 0),)),
            {},
            "ollama-without-gpu",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            SILENT._replace(problem="no answer within 0.5 s"),
            {},
            "ollama-hangs",
            "restart it",
        ),
        (
            SILENT._replace(reachable=True, problem="/api/version gives status 403"),
            {},
            "ollama-host-check",
            "IP address",
        ),
        (
            server(models=(LoadedModel("m", 40 * GB, 20 * GB),)),
            {},
            "ollama-spilled",
            "ollama stop m and ask it something; to keep room for it, "
            "gpu_share_ollama_vram_reservation_mb = 41984 or more",
        ),
    ],
)
def test_ollama(facts: OllamaFacts, changes: dict[str, Any], code: str, words: str) -> None:
    """What may be odd about the server."""
    assert words in only(ollama(examined(server=facts, **changes)), code).fix


@pytest.mark.parametrize(("held", "words"), [(20, "20.0 of 40.0 GB (50 %)"), (0, "40.0 GB on the")])
def test_figures_of_a_spilled_model(held: int, words: str) -> None:
    """What Ollama itself says, also where no NVML shows a device."""
    found = examined(server=server(models=(LoadedModel("m", 40 * GB, held * GB),)))
    assert words in only(ollama(found), "ollama-spilled").fact


@pytest.mark.parametrize("version", ["0.30.0", "0.33.0-rc2", "0.0.0", None])
def test_ollama_that_is_not_old(version: str | None) -> None:
    """Builds from source call themselves 0.0.0."""
    assert not [f for f in ollama(examined(server=server(version=version))) if f.code]


def test_ollama_that_is_not_asked() -> None:
    """Told with the place that says so."""
    ini = {"gpu_share_enable_ollama_detection": "false"}
    (finding,) = ollama(examined(server=OllamaFacts(), ini=ini))
    assert finding.fact.endswith("(pytest.ini)")


@pytest.mark.parametrize(
    ("tool", "version", "breaks"),
    [
        ("torch", "1.13.1+cu117", True),
        ("torch", "2.0.0", False),
        ("vllm", "0.20.1", True),
        ("vllm", "0.22.0", False),
        ("deepspeed", "0.18.0", True),
    ],
)
def test_tools_that_break_on_uuids(tool: str, version: str, breaks: bool) -> None:
    """`index` is recommended where it is needed, and only while UUIDs are written."""
    found = examined(packages={tool: version})
    assert bool(list(tools(found))) == breaks
    by_index = examined(ini={"gpu_share_device_names": "index"}, packages={tool: version})
    assert list(tools(by_index)) == []


def test_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which caps hold, and which cannot."""
    versions = {"torch": "2.13.0", "JAX": "0.10.0"}
    monkeypatch.setattr(start_facts, "installed_frameworks", lambda: versions)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    found = list(caps(examined()))
    assert found[0].fact.startswith("torch 2.13.0: 3.9")
    assert found[1].code == "no-cap"
    assert "unset XLA_PYTHON_CLIENT_ALLOCATOR" in found[1].fix
    monkeypatch.setattr("pytest_gpushare.cli.doctor.project.installed_frameworks", lambda: versions)
    off = list(caps(examined(ini={"gpu_share_cap_vram": "false"})))
    assert [finding.code for finding in off] == ["caps-off"]


def test_missing_package() -> None:
    """Named with what does not work without it, and the command that installs it."""
    found = only(
        packages(examined(packages={**examined().packages, "httpx": "0.1"})), "package-old"
    )
    assert 'pip install "httpx>=0.27"' in found.fix


FULL = replace(CARD, used=23 * GB, free=GB)
UNTOLD = SILENT._replace(answered=True, models=(LoadedModel("m", 8 * GB, None),))


@pytest.mark.parametrize(
    ("check", "facts", "code", "words"),
    [
        (devices, {"gpus": GpuFacts(driver="580")}, "no-device", "NVML finds no device"),
        (devices, {"gpus": GpuFacts((), (replace(CARD, unified=True),))}, "unified-memory", ""),
        (visibility, {"environment": {"CUDA_VISIBLE_DEVICES": "0"}}, "", "=0: GPU 0 of 1 device"),
        (ollama, {"ini": {"gpu_share_ollama_host": "h:1"}}, "ollama-silent", "host, pytest.ini)"),
        (ollama, {"server": UNTOLD}, "", "Ollama does not say how much of it is on the GPU"),
        (packages, {"packages": {"pytest": "9.2.0"}}, "package-missing", "httpx is not installed"),
        (plan, {"ini": {"gpu_share_hosts": "box"}}, "", "on this host alone, would start"),
        (
            plan,
            {
                "gpus": GpuFacts((FULL,), (FULL,), driver="580"),
                "ini": {"gpu_share_fallback_to_cpu_when_constrained": "false"},
            },
            "no-room",
            "a run would fail: ",
        ),
        (other_hosts, {"ini": {"gpu_share_hosts": "box //x=1"}}, "host-unusable", ""),
    ],
)
def test_what_few_machines_have(check: Any, facts: dict[str, Any], code: str, words: str) -> None:
    found = [each for each in check(examined(**facts)) if each.code == code]
    assert any(words in each.fact for each in found), found


def test_frameworks_without_a_worker_to_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0"}
    monkeypatch.setattr("pytest_gpushare.cli.doctor.project.installed_frameworks", lambda: versions)
    assert [each.fact for each in caps(examined(NO_LIBRARY))] == [
        "torch 2.13.0: no GPU worker to cap"
    ]


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.10.0+cu130", (2, 10, 0)), ("0.33.0-rc2", (0, 33, 0)), ("", ())]
)
def test_release(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:1/x", "http://***@host:1/x"),
        ("host/x?token=secret&b=secret", "host/x?token=***&b=***"),
        ("two\nlines\x1b[31m", "two lines?[31m"),
        ("x" * 2000, "x" * 600),
    ],
)
def test_safe(text: str, shown: str) -> None:
    """Nothing secret, nothing that a terminal would obey."""
    assert safe(text) == shown


def test_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that raises is reported, and so are the others."""

    def fails(_: Examined) -> Any:
        raise ZeroDivisionError("oh")

    def works(_: Examined) -> Any:
        yield look("no-room", "little", "more")

    monkeypatch.setattr(doctor, "_SECTIONS", (("A", (fails,)), ("B", (works,))))
    sections = doctor.sections_of(examined())
    assert [f.code for section in sections for f in section.findings] == [
        "doctor-failed",
        "no-room",
    ]


def test_conftests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that write the variable; not those that read it, nor those of installed packages."""
    monkeypatch.chdir(tmp_path)
    writes = 'import os\nos.environ["CUDA_VISIBLE_DEVICES"] = "0"\n'
    for name, text in {
        "tests": writes,
        "reads": 'import os\nos.environ.get("CUDA_VISIBLE_DEVICES")\n',
        ".hidden": writes,
        "venv/lib": writes,
        "node_modules/x": writes,
    }.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "conftest.py").write_text(text)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    assert overwriting(tmp_path) == [str(Path("tests", "conftest.py:2"))]
    monkeypatch.setattr("pytest_gpushare.cli.doctor.examine._MOST_SECONDS", -1.0)
    assert overwriting(tmp_path) == []


def test_pytest_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plugin that never comes back is waited for no longer than the limit."""
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("pytest_gpushare.cli.plan_command.TIMEOUT", 0.5)
    assert pytest_view(["-p", "sleeper"]).error == "pytest did not start within 0.5 s"


def test_settings_that_stand_in() -> None:
    """Where pytest did not start, the defaults."""
    settings, error = settings_of(PytestView(error="broken"))
    assert (settings.presets, error) == (("conservative",), "")


NOT_CODES = {"pytest-xdist", "systemd-private", "nvidia-ml-py", "nvidia-smi", "site-packages"}


def test_each_code_has_its_section() -> None:
    """Every word in brackets is a heading of the page, and every heading is a code."""
    page = (ROOT / "docs" / "how-to" / "doctor.md").read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^### (\S+)$", page)
    constants = {
        node.value
        for path in (ROOT / "pytest_gpushare" / "cli" / "doctor").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    codes = {text for text in constants if re.fullmatch(r"[a-z]+(-[a-z]+)+", text)} - NOT_CODES
    assert sorted(headings) == sorted(codes)
    assert len(headings) == len(set(headings)) > 35


def test_wrapped_for_a_terminal() -> None:
    """Each line within the width, under the text and not under the mark; whole without one."""
    findings = (look("no-room", "little " * 20, "more " * 20), look("no-cap", "x" * 90, "y"))
    section = [doctor.Section("Plan", findings)]
    wrapped = ["".join(piece.text for piece in row) for row in doctor.rows(section, 60)]
    assert max(len(line) for line in wrapped if "x" not in line and "see: " not in line) <= 60
    assert wrapped[3].startswith("  [!]  little")
    assert wrapped[4].startswith("       little")
    assert next(line for line in wrapped if "fix" in line).startswith("       fix: more")
    lines = ["".join(piece.text for piece in row) for row in doctor.rows(section)]
    # The address of the documentation is the installed package's.
    whole = [line for line in lines if not line.startswith("       see: http")]
    assert (len(whole), whole[3].count("little")) == (9, 20)


def test_ledger_between_sessions(tmp_path: Path) -> None:
    """A directory that is none, one that is whole, and a record that is not understood."""
    path = tmp_path / "leases"
    settings = {"gpu_share_leases": str(path)}
    path.write_text("")
    found = only(sessions(examined(ini=settings)), "leases-unusable")
    assert "cannot be opened" in found.fact
    path.unlink()
    assert list(sessions(examined(ini=settings))) == []
    ledger = Ledger(path)
    with ledger.gate():
        ledger.publish(LeaseRecord(1))
    (fine,) = sessions(examined(ini=settings))
    assert fine.fact == f"{path}: 1 session"
    (record,) = path.glob("s-*")
    record.write_bytes(b"\0" * 4096)
    found = only(sessions(examined(ini=settings)), "lease-not-understood")
    assert "it is damaged: it claims nothing" in found.fact
    off = sessions(examined(ini={"gpu_share_leases": "off"}))
    assert "leases are off" in next(off).fact
    ledger.close()


def test_ledger_that_others_do_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without the mount, and in a /tmp that systemd made for one service."""
    found = only(sessions(examined(where=Platform(is_container=True))), "leases-not-mounted")
    assert found.fix == f"docker run -v {MEETING_PLACE}:{MEETING_PLACE}"
    mount = "36 25 8:1 /tmp/systemd-private-1-ci.service-x/tmp /tmp rw - ext4 /dev/sda1 rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: mount)
    assert "PrivateTmp" in only(sessions(examined()), "leases-private").fix
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: mount.replace("systemd-private", "x"))
    assert not [finding for finding in sessions(examined()) if finding.level is not Level.OK]
