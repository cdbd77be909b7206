"""`pytest-gpushare doctor` on broken machines: each trap is named, with what fixes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine, Mig

from .conftest import Project, Result, clean_environment, normal

COMMAND = [sys.executable, "-m", "pytest_gpushare", "doctor"]
OllamaWith = Callable[..., Any]
MachineWith = Callable[..., Machine]


class DoctorOutput:
    """What doctor said, by code."""

    def __init__(self, result: Result) -> None:
        self.result = result
        document = json.loads(result.out)
        findings = [f for section in document["sections"] for f in section["findings"]]
        self.all = findings
        self.codes = {f["code"]: f for f in findings if f["code"]}
        assert result.code == int(any(f["level"] == "broken" for f in findings))
        assert document["broken"] == sum(f["level"] == "broken" for f in findings)
        assert all(f["fix"] for f in findings if f["level"] != "ok")
        assert result.err == ""

    def level(self, code: str) -> str:
        return str(self.codes[code]["level"]) if code in self.codes else ""

    def fact(self, code: str) -> str:
        return str(self.codes[code]["fact"])

    def fix(self, code: str) -> str:
        return str(self.codes[code]["fix"])


def doctor(project: Project, *arguments: str, **environment: str | None) -> DoctorOutput:
    return DoctorOutput(project.command([*COMMAND, "--json", *arguments], **environment))


# Several machines in one process, as starting Python takes as long as the rest.
MANY = """
import contextlib, io, json, os, sys
from simulator import Machine
from pytest_gpushare.cli.main import main

for environment, injections in json.load(sys.stdin):
    os.environ.update(environment)
    machine = Machine.open()
    machine.clear_injections()
    for injection in injections:
        machine.inject(**injection)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["doctor", "--json"])
    print(json.dumps([code, out.getvalue(), ""]))
    for name in environment:
        del os.environ[name]
"""


def doctors(
    project: Project, machines: Sequence[tuple[Mapping[str, str], Any]]
) -> list[DoctorOutput]:
    """What doctor says for each environment and fault of the project's machine."""
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps(machines),
        cwd=project.path,
        env=project.environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [DoctorOutput(Result(*json.loads(line))) for line in done.stdout.splitlines()]


def pretend_installed(project: Project, tmp_path: Path, **versions: str) -> Path:
    """Distributions by their metadata alone; returns the folder, which is first on the path."""
    folder = tmp_path / "packages"
    folder.mkdir(exist_ok=True)
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
    before = project.environment.get("PYTHONPATH", "")
    project.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    return folder


def test_healthy(
    project: Project, machine: Machine, ollama_with: OllamaWith, golden: Callable[..., None]
) -> None:
    """Nothing to fix; all that a bug report needs, word for word."""
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    project.file("pytest.ini", "[pytest]\ngpu_share = true\ngpu_share_safety_buffer_mb = 1GB\n")
    result = project.command(COMMAND)
    assert (result.code, result.err) == (0, "")
    golden(Result(0, versionless(result.out), ""), "doctor_healthy")


def test_golden_of_a_broken_machine(
    project: Project, machine_with: MachineWith, golden: Callable[..., None]
) -> None:
    """How findings and fixes look."""
    machine = machine_with(Device(), Device(compute_mode=2))
    machine.inject("nvmlDeviceGetHandleByIndex_v2", code=15, device=0)
    project.write(conftest='import os\nos.environ["CUDA_VISIBLE_DEVICES"] = "0"\n')
    result = project.command(COMMAND, OLLAMA_HOST="127.0.0.1:9")
    assert (result.code, result.err) == (1, "")
    golden(Result(1, versionless(result.out), ""), "doctor_broken")


def versionless(text: str) -> str:
    """The output without what differs between the machines that run this test."""
    text = re.sub(r"(\[ok\]) \S+ \S+ on Linux .*", r"\1 PYTHON on SYSTEM", text)
    text = re.sub(r"(\[ok\] (?:pytest|pytest-xdist|nvidia-ml-py|httpx)) \S+", r"\1 VERSION", text)
    text = re.sub(r"(?m)^  \[ok\] (torch|JAX|none of torch).*\n", "  [ok] FRAMEWORKS\n", text)
    text = re.sub(r"; from a container the host is .* listen on 0\.0\.0\.0", "", text)
    return re.sub(r"pytest-gpushare \d\S*", "pytest-gpushare VERSION", normal(text))


# --- the library and the driver ---


def test_no_library(project: Project) -> None:
    report = doctor(project, KUBERNETES_SERVICE_HOST=None)
    assert report.level("nvml-missing") == "broken"
    assert "NVML library not found" in report.fact("nvml-missing")
    assert re.search("install the NVIDIA driver|--gpus all", report.fix("nvml-missing"))
    assert report.level("no-gpu-for-tests") == "look"


WRONG_DRIVERS = {
    18: ("driver-mismatch", "reboot"),
    9: ("driver-not-loaded", "sudo modprobe nvidia"),
    4: ("nvml-no-permission", "ls -l /dev/nvidia*"),
    999: ("nvml-unknown", "nvidia-smi"),
}


def test_wrong_driver(project: Project, machine: Machine) -> None:
    """Each error of NVML when it starts; the last one in a container that was given no GPU."""
    faults = [({}, [{"function": "nvmlInit*", "code": number}]) for number in WRONG_DRIVERS]
    faults[-1] = ({"NVIDIA_VISIBLE_DEVICES": "void"}, faults[-1][1])
    report = doctors(project, faults)
    for (code, fix), one in zip(WRONG_DRIVERS.values(), report, strict=True):
        assert one.level(code) == "broken"
        assert fix in one.fix(code)
    assert ["container-without-gpu" in one.codes for one in report] == [False, False, False, True]


def test_devices(project: Project, machine_with: MachineWith) -> None:
    """A lost GPU, one without permission, both compute modes, MIG, unified memory."""
    machine = machine_with(
        Device(),
        Device(),
        Device(compute_mode=2),
        Device(compute_mode=3),
        Device(total="40GB", capability=(8, 0), mig=(Mig(total="10GB"),)),
        Device(memory="unsupported", name="NVIDIA GB10"),
    )
    machine.inject("nvmlDeviceGetHandleByIndex_v2", code=15, device=0)
    machine.inject("nvmlDeviceGetHandleByIndex_v2", code=4, device=1)
    machine.inject("nvmlDeviceGetMigDeviceHandleByIndex", code=6, device=4)
    report = doctor(project)
    levels = {
        "gpu-lost": "broken",
        "gpu-no-permission": "broken",
        "compute-mode": "look",
        "mig-without-instance": "broken",
        "unified-memory": "look",
    }
    assert {code: report.level(code) for code in levels} == levels
    assert report.fix("gpu-lost").startswith("sudo nvidia-smi -i 0 --gpu-reset")
    modes = [f for f in report.all if f["code"] == "compute-mode"]
    assert [(f["level"], f["fix"]) for f in modes] == [
        ("broken", "sudo nvidia-smi -i 2 -c DEFAULT"),
        ("look", "sudo nvidia-smi -i 3 -c DEFAULT"),
    ]
    assert report.fix("mig-without-instance").startswith("sudo nvidia-smi mig -i 4 -cgi")


VISIBLE = {
    "0,0": ("visible-twice", "broken", "export CUDA_VISIBLE_DEVICES with each device once"),
    "7": ("visible-unknown", "broken", "nvidia-smi -L"),
    "0,7": ("visible-unknown", "look", "nvidia-smi -L"),
    "": ("visible-empty", "broken", "unset CUDA_VISIBLE_DEVICES"),
    "1": ("visible-order", "look", "export CUDA_DEVICE_ORDER=PCI_BUS_ID"),
}


def test_visibility(project: Project, machine_with: MachineWith) -> None:
    """What an outer CUDA_VISIBLE_DEVICES may have wrong."""
    machine_with(Device(), Device(total="16GB", name="NVIDIA GeForce RTX 4080"))
    report = doctors(project, [({"CUDA_VISIBLE_DEVICES": value}, []) for value in VISIBLE])
    for (code, level, fix), one in zip(VISIBLE.values(), report, strict=True):
        assert one.level(code) == level
        assert fix in one.fix(code)


# --- Ollama ---


def test_ollama_down(project: Project, machine: Machine) -> None:
    report = doctor(project, OLLAMA_HOST="http://me:hunter2@127.0.0.1:9/?token=hunter3")
    assert report.level("ollama-silent") == "look"
    assert "127.0.0.1:9 (OLLAMA_HOST): nothing listens there" in report.fact("ollama-silent")
    assert "ollama serve" in report.fix("ollama-silent")
    assert "hunter" not in report.result.out


def test_ollama_spilled_and_old(
    project: Project, machine_with: MachineWith, ollama_with: OllamaWith
) -> None:
    machine_with(Device(total="24GB", used="20GB"))
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b", version="0.24.0")
    report = doctor(project)
    assert report.level("ollama-spilled") == "look"
    found = re.search(r"14b: [\d.]+ of 10.8 GB \(\d+ %\) on the GPU", report.fact("ollama-spilled"))
    assert found is not None
    assert "ollama stop qwen2.5:14b" in report.fix("ollama-spilled")
    assert report.level("ollama-old") == "look"
    assert "update Ollama" in report.fix("ollama-old")
    assert report.level("no-room") == "look"
    assert "free VRAM" in report.fix("no-room")


@pytest.mark.parametrize(
    ("total", "used", "least", "reservation"),
    [("10GB", "0.5GB", "3.0", 5632), ("12GB", "0.5GB", "5.0", 5632), ("8GB", "0.5GB", "3.0", 3584)],
)
def test_a_smaller_reservation(
    total: str,
    used: str,
    least: str,
    reservation: int,
    project: Project,
    machine_with: MachineWith,
    ollama_with: OllamaWith,
) -> None:
    """What doctor says for a small card is what gives a GPU worker there."""
    machine_with(Device(total=total, used=used))
    ollama_with({})
    project.file("pytest.ini", f"[pytest]\ngpu_share_min_vram_per_worker_gb = {least}\n")
    way = doctor(project).fix("no-room").split(";")[0]
    assert way == f"gpu_share_ollama_vram_reservation_mb = {reservation}"
    result = project.pytest("--gpu-share", "-o", way.replace(" ", ""))
    assert result.said[0].startswith("gpu-share: 1 GPU worker "), result.out


def test_which_device_ollama_uses(
    project: Project, machine_with: MachineWith, ollama_with: OllamaWith
) -> None:
    machine_with(Device(), Device())
    ollama_with({"qwen2.5:14b": "10.8GB"})
    report = doctor(project)
    assert report.level("ollama-device-unknown") == "look"
    assert report.fix("ollama-device-unknown").startswith("gpu_share_ollama_gpu = 0")


# --- packages ---


def test_deprecated_pynvml(project: Project, machine: Machine, tmp_path: Path) -> None:
    """Its metadata, and an old one's package, which hides the module of nvidia-ml-py."""
    folder = pretend_installed(project, tmp_path, pynvml="13.0.1")
    report = doctor(project)
    assert report.level("pynvml-deprecated") == "look"
    assert "pip uninstall -y pynvml" in report.fix("pynvml-deprecated")
    (folder / "pynvml").mkdir()
    (folder / "pynvml" / "__init__.py").write_text(
        "import warnings\nwarnings.warn('The pynvml package is deprecated', FutureWarning)\n"
    )
    report = doctor(project, PYTHONWARNINGS="error::FutureWarning")
    assert report.level("pynvml-deprecated") == "broken"
    assert report.level("pynvml-unusable") == "broken"


def test_old_packages(project: Project, machine: Machine, tmp_path: Path) -> None:
    """An xdist that is too old, and tools that cannot read UUIDs."""
    pretend_installed(
        project, tmp_path, pytest_xdist="3.5.0", httpx="0.20.0", deepspeed="0.18.0", vllm="0.20.1"
    )
    report = doctor(project)
    assert report.level("xdist-old") == "broken"
    assert 'pip install "pytest-xdist>=3.6.1"' in report.fix("xdist-old")
    assert report.level("package-old") == "broken"
    tools = [finding for finding in report.all if finding["code"] == "uuid-tools"]
    assert [finding["fact"].split()[0] for finding in tools] == ["vllm", "deepspeed"]
    assert {finding["fix"] for finding in tools} == {"gpu_share_device_names = index"}


@pytest.mark.parametrize("is_left_out", [False, True])
def test_plugin_of_anyio(project: Project, machine: Machine, is_left_out: bool) -> None:
    """It is named where pytest loads it, with the way to leave it out, which works."""
    if is_left_out:
        project.file("pytest.ini", "[pytest]\naddopts = -p no:anyio\n")
    facts = [finding["fact"] for finding in doctor(project).all]
    assert any("addopts = -p no:anyio" in fact for fact in facts) is not is_left_out


def test_no_xdist(project: Project, tmp_path: Path, nvml_library: Path) -> None:
    """In an environment of its own: all that is installed here, but xdist."""
    python = environment_without(tmp_path / "venv", r"(pytest_)?xdist\b.*|pytest_xdist-.*")
    command = [str(python), "-m", "pytest_gpushare", "doctor", "--json"]
    report = DoctorOutput(project.command(command))
    assert report.level("xdist-missing") == "broken"
    assert 'pip install "pytest-xdist>=3.6.1"' in report.fix("xdist-missing")


def environment_without(path: Path, pattern: str) -> Path:
    """A virtual environment with links to what is installed here; returns its Python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(path)],
        check=True,
        env=clean_environment(),
        timeout=120,
    )
    own = sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)})
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.fullmatch(pattern, entry.name):
            Path(own, entry.name).symlink_to(entry)
    return path / "bin" / "python"


@pytest.mark.parametrize(
    ("environment", "arguments", "code"),
    [
        ({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, (), "autoload-off"),
        ({"PYTEST_ADDOPTS": "-p no:xdist"}, (), "xdist-off"),
        ({}, ("--", "--nonsense"), "pytest-refuses"),
    ],
)
def test_how_pytest_starts(
    environment: Mapping[str, str],
    arguments: tuple[str, ...],
    code: str,
    project: Project,
    machine: Machine,
) -> None:
    report = doctor(project, *arguments, **environment)
    assert report.level(code) == ("broken" if code == "pytest-refuses" else "look")


# --- settings and project ---


def test_wrong_settings(project: Project, machine: Machine) -> None:
    """Named with file and key; what is report besides goes by the defaults."""
    project.file("pytest.ini", "[pytest]\ngpu_share = true\ngpu_share_safety_bufer_mb = 1\n")
    report = doctor(project)
    assert report.level("settings-refused") == "broken"
    assert "pytest.ini: unknown key 'gpu_share_safety_bufer_mb'" in report.fact("settings-refused")
    assert any("a run would start 2 GPU workers" in f["fact"] for f in report.all)


def test_settings_of_another_machine(project: Project, machine: Machine) -> None:
    """A device that is not here."""
    report = doctor(project, "--", "-o", "gpu_share_ollama_gpu=5")
    assert report.level("run-refused") == "broken"
    assert "names no device of this machine" in report.fact("run-refused")


def test_traps_of_the_project(project: Project, machine: Machine) -> None:
    """A JSON file that asks for nothing, strict reading, no room, and conftests that overwrite."""
    project.file(
        "pytest.ini",
        "[pytest]\nfilterwarnings = error\naddopts = --strict-config\ngpu_share_cap_vram = false\n",
    )
    project.file(
        "performance_config.json",
        '{"gpu_resource_management": {"ollama_vram_reservation_mb": 20480}}',
    )
    project.write(conftest='import os\nos.environ["CUDA_VISIBLE_DEVICES"] = "0"\n')
    (project.path / "sub").mkdir()
    project.file("sub/conftest.py", 'import os\nprint(os.environ.get("CUDA_VISIBLE_DEVICES"))\n')
    report = doctor(project)
    assert "pytest-refuses" not in report.codes
    assert report.level("json-alone") == "look"
    assert report.fix("json-alone").startswith("gpu_share = true")
    assert report.level("strict-config") == "look"
    assert "performance_config.json" in report.fix("strict-config")
    assert report.level("no-room") == "look"
    assert report.fix("no-room").startswith("gpu_share_ollama_vram_reservation_mb = 18432; or ")
    overwriting = [f["fact"] for f in report.all if f["code"] == "conftest-overwrites"]
    assert len(overwriting) == 1
    assert overwriting[0].startswith("conftest.py:2 sets CUDA_VISIBLE_DEVICES")
    fixed = ("--", "-o", "gpu_share_ollama_vram_reservation_mb=18432")
    assert "no-room" not in doctor(project, *fixed).codes


def test_slow_plugin_and_secrets(project: Project, machine: Machine) -> None:
    """What pytest prints while it starts is not in the way, and no variable's value leaks."""
    project.write(loud='print("noise")\nimport os; os.write(1, b"noise\\n")\n')
    report = doctor(
        project,
        PYTEST_ADDOPTS="-p loud",
        PYTHONPATH=os.pathsep.join([str(project.path), project.environment["PYTHONPATH"]]),
        API_TOKEN="hunter2",
    )
    assert "pytest-refuses" not in report.codes
    assert "noise" not in report.result.out
    assert "hunter" not in report.result.out


def test_models_and_device_of_ollama(
    project: Project, machine_with: MachineWith, ollama_with: OllamaWith
) -> None:
    """A model that is not there, a reservation that is too small, and another device than named."""
    machine_with(Device(), Device())
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    report = doctor(
        project,
        "--",
        *("-o", "gpu_share_ollama_models=qwen2.5:14b nothere:7b"),
        *("-o", "gpu_share_ollama_vram_reservation_mb=2048", "-o", "gpu_share_ollama_gpu=1"),
    )
    models = [finding for finding in report.all if finding["code"] == "ollama-models"]
    assert [finding["level"] for finding in models] == ["look", "look"]
    assert models[0]["fix"] == "ollama pull nothere:7b"
    assert "would hold its models" in models[1]["fix"]
    assert report.level("ollama-elsewhere") == "look"
    assert "gpu_share_ollama_gpu = auto" in report.fix("ollama-elsewhere")
