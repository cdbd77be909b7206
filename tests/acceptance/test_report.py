"""The report of a run: what is in it, and that it is whole or absent, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inner_pytest import inner_command
from jsonschema import Draft202012Validator
from simulator import Device, Machine
from simulator.child import child_process, wait_for

from .conftest import Project

_SCHEMA_FILE = Path(__file__).parents[2] / "pytest_gpushare/report/report-schema.json"
SCHEMA = json.loads(_SCHEMA_FILE.read_text(encoding="utf-8"))
GB = 1024**3
BARS = " ▁▂▃▄▅▆▇█"

SUITE = """
    import time
    import gpusim
    import pytest

    @pytest.mark.parametrize("size", ["1GB", "2GB"])
    def test_model(size):
        with gpusim.alloc(size):
            time.sleep(1.3)

    def test_fails():
        assert False

    @pytest.mark.xfail
    def test_fails_as_it_should():
        assert False

    def test_skips():
        pytest.skip("not here")

    @pytest.fixture
    def broken():
        yield
        raise OSError

    def test_breaks_at_its_end(broken):
        pass
"""


def strict(schema: Any) -> Any:
    """The schema without room for names that it does not know."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **{name: strict(part) for name, part in schema.items()}}


def read(path: Path) -> dict[str, Any]:
    """The document, which is valid, and has no name that the schema does not tell of."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for schema in (SCHEMA, strict(SCHEMA)):
        Draft202012Validator(schema).validate(document)
    return document


def written(output: str) -> list[str]:
    """The reports that the terminal names."""
    return re.findall(r"(?m)^-+ generated VRAM report: (.*?) -+$", output)


def test_document(project: Project, machine: Machine) -> None:
    """What the terminal says, and more, in numbers that agree with the machine's own."""
    project.write(test_project=SUITE)
    result = project.pytest(
        "--gpu-share", "--gpu-share-report=out/run.json", "--gpu-share-report=page.HTML"
    )
    assert result.code == 1, result.out
    assert written(result.out) == [f"{project.path}/out/run.json", f"{project.path}/page.HTML"]
    told = read(project.path / "out" / "run.json")
    assert "<html" in (project.path / "page.HTML").read_text(encoding="utf-8")
    assert sorted(path.name for path in (project.path / "out").iterdir()) == ["run.json"]
    assert (told["run"]["exit_status"], told["run"]["finished"]) == (1, True)
    outcomes = {test["nodeid"].partition("::")[2]: test["outcome"] for test in told["tests"]}
    assert outcomes == {
        "test_model[1GB]": "passed",
        "test_model[2GB]": "passed",
        "test_fails": "failed",
        "test_fails_as_it_should": "xfailed",
        "test_skips": "skipped",
        "test_breaks_at_its_end": "error",
    }
    (device,) = told["devices"]
    (state,) = machine.snapshot()
    assert device["peak_used_bytes"] == state.peak_used
    samples = told["samples"]["devices"][device["uuid"]]
    assert max(samples["used_bytes"]) == state.peak_used
    assert device["peak_workers_bytes"] == max(
        sum(held or 0 for held in row)
        for row in zip(*samples["workers_bytes"].values(), strict=True)
    )
    peaks = {test["nodeid"]: test["peak_bytes"] for test in told["tests"]}
    assert peaks["test_project.py::test_model[2GB]"] == 2 * GB + 600 * 1024**2
    assert [w["id"] for w in told["workers"]] == ["gw0", "gw1"]
    assert all(w["started_s"] < w["ended_s"] and w["pid"] for w in told["workers"])
    # As the terminal's lines, whose width bounds the bars behind them.
    assert [line.rstrip(BARS) for line in told["summary"]] == [
        line.rstrip(BARS) for line in result.out.splitlines() if "VRAM peak" in line
    ]
    assert told["plan"]["settings"]["ollama_vram_reservation_mb"] == {
        "value": "12288",
        "origin": "default",
    }
    assert told["leaks"] == told["hints"] == told["problems"] == []


SLOW = """
    import pathlib, time
    import pytest

    @pytest.mark.parametrize("i", range(2))
    def test_slow(i):
        pathlib.Path("running").touch()
        time.sleep(60)
"""


def interrupted(project: Project, number: int, *arguments: str) -> int:
    """The exit code of a run that is sent a signal while its tests run."""
    project.write(test_project=SLOW)
    with child_process(
        inner_command("--gpu-share", *arguments),
        cwd=project.path,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        wait_for((project.path / "running").exists)
        process.send_signal(number)
        return int(process.wait(60))


@pytest.mark.parametrize("workers", [(), ("-n0",)])
def test_ctrl_c(workers: tuple[str, ...], project: Project, machine: Machine) -> None:
    """What was seen until then is written."""
    assert interrupted(project, signal.SIGINT, "--gpu-share-report=r.json", *workers) == 2
    told = read(project.path / "r.json")
    assert (told["run"]["exit_status"], told["run"]["finished"]) == (2, False)
    assert told["samples"]["devices"]


def test_killed(project: Project, machine: Machine) -> None:
    """Nothing was begun that could be left half written."""
    code = interrupted(project, signal.SIGKILL, "--gpu-share-report=r.json")
    assert code == -signal.SIGKILL
    assert not [path.name for path in project.path.iterdir() if "r.json" in path.name]


def test_secrets_and_what_cannot_be_written(project: Project, machine: Machine) -> None:
    """All that goes wrong is told, and the exit code is that of the tests."""
    project.write(
        test_project="""
        import pytest

        @pytest.mark.parametrize("name", ["hf_verysecret"])
        def test_name(name):
            pass
        """,
    )
    (project.path / "there.json").mkdir()
    home = project.path / "home"
    home.mkdir()
    (home / "config.json").write_text('{"gpu_resource_management": {}}')
    result = project.pytest(
        "--gpu-share",
        "-n1",
        "--gpu-share-report=there.json",
        "--gpu-share-report=test_project.py/r.json",
        "--gpu-share-report=fine.json",
        f"--gpu-share-config={home}/config.json",
        *("-o", "gpu_share_ollama_host=http://me:hunter2@127.0.0.1:9/x?key=abc123"),
        HF_TOKEN="hf_verysecret",
        HOME=str(home),
        GITHUB_STEP_SUMMARY=str(project.path / "there.json"),
    )
    assert result.code == 0, result.out
    assert written(result.out) == [f"{project.path}/fine.json"]
    at = [line for line in result.said if line.startswith("gpu-share: no ")]
    assert at == [
        "gpu-share: no table in GITHUB_STEP_SUMMARY: is a directory",
        f"gpu-share: no report in {project.path}/there.json: there.json is a directory",
        f"gpu-share: no report in {project.path}/test_project.py/r.json: "
        "test_project.py is not a directory",
    ]
    text = (project.path / "fine.json").read_text(encoding="utf-8")
    told = read(project.path / "fine.json")
    for secret in ("hf_verysecret", "hunter2", "abc123", str(home)):
        assert secret not in text
    assert [test["nodeid"] for test in told["tests"]] == ["test_project.py::test_name[***]"]
    assert told["plan"]["settings"]["config"]["value"] == "~/config.json"
    # A suffix that says no format, and a report without a plan.
    result = project.pytest("--gpu-share", "-n1", "--gpu-share-report=r.xml")
    assert (result.code, result.err) == (
        4,
        "ERROR: --gpu-share-report r.xml: no format is known by this name: allowed is a file "
        "that ends in .json or .html\n\n",
    )
    result = project.pytest("--gpu-share-report=none.json")
    assert "--gpu-share-report has no effect without --gpu-share" in result.out
    assert not (project.path / "none.json").exists()


def test_read_only_directory(project: Project, machine: Machine) -> None:
    """Where not even root may write."""
    if not Path("/sys").is_dir():
        pytest.skip("no /sys here")
    result = project.pytest("--gpu-share", "-n1", "--gpu-share-report=/sys/r.json")
    assert result.code == 0
    assert re.fullmatch(
        "gpu-share: no report in /sys/r.json: (permission denied|operation not permitted|"
        "read-only file system)", result.said[-1]
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_files_that_are_not_regular(project: Project, machine: Machine) -> None:
    """A FIFO without a reader, and a device, in the place of files: nothing waits for them."""
    os.mkfifo(project.path / "summary.md")
    learned = [
        project.path / ".pytest_cache" / "v" / "gpushare" / "contexts",
        project.path / ".pytest_cache" / "v" / "gpushare" / "has_needs",
        project.path / ".pytest_cache" / "v" / "gpushare" / "ollama",
        project.path / ".pytest_cache" / "d" / "gpushare" / "needs.json",
    ]
    for path in learned:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    for summary, why in (
        ("summary.md", "no such device or address"),
        ("/dev/full", "not a regular file"),
    ):
        result = project.pytest(
            "--gpu-share", "-n1", "-q", GITHUB_STEP_SUMMARY=str(project.path / summary)
        )
        assert (result.code, result.passed) == (0, 4)
        assert result.said == [f"gpu-share: no table in GITHUB_STEP_SUMMARY: {why}"]


LEAKS = """
    import time
    import gpusim

    kept = []

    def test_leaks():
        kept.append(gpusim.alloc("1GB"))
        time.sleep(1.5)
"""


def test_github(project: Project, machine: Machine) -> None:
    """A table in the job's summary, and an annotation for a leak; without Actions, neither."""
    project.write(test_project=LEAKS)
    summary = project.file("summary.md", "before\n")
    result = project.pytest(
        "--gpu-share", "-n1", GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary)
    )
    assert result.code == 0, result.out
    left = "test_project.py::test_leaks left 1.0 GB of VRAM behind (gw0)"
    title = "title=gpu-share%3A VRAM left behind"
    assert f"::warning file=test_project.py,{title}::{left}" in result.out.splitlines()
    assert f"gpu-share: {left}" in result.out.splitlines()
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n### gpu-share\n")
    row = "at least 3.59 GB | 24.0 GB | at least 1.59 GB | 9.0 GB | 1 |"
    assert f"| GPU 0 NVIDIA GeForce RTX 3090 Ti | {row}" in text
    assert "::warning" not in project.pytest("--gpu-share", "-n0").out


@pytest.mark.parametrize("mode", ["hidden-memory", "zero-memory", "none"])
def test_nvml_tells_nothing_by_process(
    mode: str, project: Project, machine_with: Callable[..., Machine]
) -> None:
    """WSL 2, containers, Windows: the device's own figure is all there is, the rest unknown."""
    machine_with(Device(total="24GB", used="2GB", processes=mode))
    project.write(test_project=LEAKS)
    result = project.pytest("--gpu-share", "-n1", "-v", "--gpu-share-report=r.json", COLUMNS="78")
    assert result.code == 0
    assert [line.rstrip(BARS) for line in result.said[-2:]] == [
        "gpu-share: GPU 0 VRAM peak at least 3.59 of 24.0 GB (up at least 1.59 GB, by which "
        "process is unknown)",
        "  gw0 on GPU 0: VRAM peak unknown",
    ]
    told = read(project.path / "r.json")
    assert [worker["peak_bytes"] for worker in told["workers"]] == [None]
    assert [test["peak_bytes"] for test in told["tests"]] == [None]
    assert told["leaks"] == []


def test_crash(project: Project, machine: Machine) -> None:
    """A worker that dies, and the one that takes its place."""
    project.write(
        test_project="""
        import os

        def test_dies():
            os.kill(os.getpid(), 9)

        def test_lives():
            pass
        """
    )
    result = project.pytest("--gpu-share", "-n1", "--gpu-share-report=r.json")
    assert result.code == 1
    told = read(project.path / "r.json")
    assert [(w["id"], w["role"], w["crashed"]) for w in told["workers"]] == [
        ("gw0", "gpu", True),
        ("gw1", "gpu", False),
    ]
    assert {t["nodeid"].partition("::")[2]: (t["worker"], t["outcome"]) for t in told["tests"]} == {
        "test_dies": ("gw0", "crashed"),
        "test_lives": ("gw1", "passed"),
    }
    assert [event["kind"] for event in told["events"]] == ["worker-crashed"]


def test_what_if(project: Project) -> None:
    """Under --gpu-share-simulate there is a plan, and nothing to watch."""
    result = project.pytest(
        *("--gpu-share", "-q", "--gpu-share-simulate=24GB:used=2GB", "--gpu-share-report=r.json")
    )
    assert (result.code, written(result.out)) == (0, [])
    told = read(project.path / "r.json")
    assert (told["run"]["simulated"], told["samples"]) == (True, {"devices": {}, "leases": []})
    assert [device["peak_used_bytes"] for device in told["devices"]] == [None]
    assert len(told["tests"]) == 4


COUNTED = """
    import time
    import pytest
    import torch

    KEPT = []

    def take(gigabytes):
        return torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda")

    @pytest.fixture(scope="session")
    def model():
        yield take(0.5)

    def test_leaks_and_is_forgiven(model):
        KEPT.append(take(0.3))

    def test_gives_back():
        KEPT.clear()

    def test_leaks():
        KEPT.append(take(0.2))

    @pytest.mark.gpu
    def test_marked(model):
        take(1)

    @pytest.mark.parametrize("n", range(6))
    def test_idle(n):
        time.sleep(0.05)
"""


def test_counters(project: Project, machine: Machine) -> None:
    """Leaks have their test, and peaks are exact."""
    project.with_frameworks()
    project.write(test_project=COUNTED)
    result = project.pytest("--gpu-share", "-n1", "-v", "--gpu-share-report=r.json", COLUMNS="78")
    assert result.code == 0, result.out
    told = read(project.path / "r.json")
    assert [(leak["nodeid"], leak["source"]) for leak in told["leaks"]] == [
        ("test_project.py::test_leaks", "frameworks")
    ]
    left = {test["nodeid"].partition("::")[2]: test["left_bytes"] for test in told["tests"]}
    # The session's model, which brings CUDA up in the first test, is left by nobody.
    assert left["test_leaks_and_is_forgiven"] == pytest.approx(0.3 * GB, rel=0.05)
    assert left["test_gives_back"] == -left["test_leaks_and_is_forgiven"]
    (worker,) = told["workers"]
    peaks = {test["nodeid"].partition("::")[2]: test["peak_bytes"] for test in told["tests"]}
    assert peaks["test_marked"] >= 1.7 * GB + 600 * 1024**2
    assert "gpu-share: test_project.py::test_leaks left 0.2 GB of VRAM behind (gw0)" in result.said
    assert any(line.startswith("  VRAM") and "::test_marked" in line for line in result.said)
    assert worker["peak_bytes"] >= peaks["test_marked"]


def test_internal_error(project: Project, machine: Machine) -> None:
    """What was seen until then is written."""
    project.write(
        conftest="""
        def pytest_runtest_logreport(report):
            raise RuntimeError("broken")
        """
    )
    assert project.pytest("--gpu-share", "-n0", "--gpu-share-report=r.json").code == 3
    told = read(project.path / "r.json")
    assert (told["run"]["exit_status"], told["run"]["finished"]) == (3, False)
