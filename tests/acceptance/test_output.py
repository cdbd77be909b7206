"""What a run prints: whole outputs compared with golden text, and the log."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from simulator import Device, Machine

from .conftest import Project, Result, normal
from .test_plan_table import PAIR, card

Golden = Callable[[Result, str], None]
OllamaWith = Callable[..., object]
SEEDS_GREP = re.compile(r"VRAM|GPU|workers")
# xdist at -v and pytest at any verbosity change their own words between versions: there only
# the plugin's lines are compared.
APPENDS = pytest.mark.skipif(
    pytest.version_tuple < (8, 1), reason="pytest 8.0 cannot append: its workers empty log_file"
)
LEVELS = {"quiet": ["-q"], "default": [], "verbose": ["-v"], "very_verbose": ["-vv"]}


def check_lines(result: Result, golden: Golden, name: str) -> None:
    """The plugin's lines alone, each of which the founding write-up's grep finds."""
    assert all(SEEDS_GREP.search(line) for line in result.said)
    golden(Result(result.code, "\n".join(result.said) + "\n", ""), name)


@pytest.mark.parametrize("level", LEVELS)
def test_resident(
    level: str,
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: OllamaWith,
    golden: Golden,
) -> None:
    """GPU workers beside a loaded model, at four verbosities."""
    machine_with(card("24GB", "22GB"))
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    result = project.pytest("--gpu-share", *LEVELS[level])
    assert (result.code, result.passed, result.err) == (0, 4, "")
    check_lines(result, golden, f"resident_{level}")


@pytest.mark.parametrize("level", LEVELS)
def test_fallback(
    level: str, project: Project, machine_with: Callable[..., Machine], golden: Golden
) -> None:
    """CPU workers for want of VRAM: said at every verbosity, as it is a problem."""
    machine_with(card("10GB", "9.5GB"))
    result = project.pytest(
        "--gpu-share",
        "-n2",
        "-o",
        "gpu_share_ollama_vram_reservation_mb=8192",
        *LEVELS[level],
        OLLAMA_HOST="127.0.0.1:9",
    )
    assert (result.code, result.passed, result.err) == (0, 4, "")
    check_lines(result, golden, f"fallback_{level}")


@pytest.mark.parametrize("level", LEVELS)
def test_two_devices_one_lost(
    level: str, project: Project, machine_with: Callable[..., Machine], golden: Golden
) -> None:
    """Devices of different sizes, one that fell off the bus, settings from two places."""
    machine = machine_with(*PAIR, card("48GB", "40GB", name="NVIDIA RTX A6000"))
    machine.inject("nvmlDeviceGetHandleByIndex_v2", code=15, device=1)
    project.file("pytest.ini", "[pytest]\ngpu_share = true\ngpu_share_safety_buffer_mb = 512MB\n")
    result = project.pytest(
        "-o", "gpu_share_ollama_gpu=0", *LEVELS[level], OLLAMA_HOST="127.0.0.1:9"
    )
    assert (result.code, result.passed, result.err) == (0, 4, "")
    check_lines(result, golden, f"two_devices_{level}")


def test_whole_output(project: Project, machine: Machine, golden: Golden) -> None:
    """All that a run prints: the analysis stands in the header, nothing is said after it."""
    golden(project.pytest("--gpu-share"), "whole")


def test_whole_output_quiet(project: Project, machine: Machine, golden: Golden) -> None:
    """-q tells problems only, and here there is none."""
    golden(project.pytest("--gpu-share", "-q"), "whole_quiet")


def test_colour(project: Project, machine: Machine) -> None:
    """A problem is yellow where pytest uses colour, and plain where it does not."""
    project.environment["OLLAMA_HOST"] = "127.0.0.1:9"
    arguments = ("--gpu-share", "-n1", "-o", "gpu_share_min_vram_per_worker_gb=20")
    line = "gpu-share: 1 CPU worker (insufficient VRAM per worker: 9.0 GB usable, 20.0 GB needed"
    coloured = project.pytest(*arguments, "--color=yes")
    assert f"\x1b[33m{line}" in coloured.out
    assert "\x1b[33m  GPU 0" not in coloured.out
    quiet = project.pytest(*arguments, "--color=yes", "-q")
    assert f"\x1b[33m{line}" in quiet.out
    assert "\x1b" not in project.pytest(*arguments).out


def test_ascii_terminal(project: Project, machine: Machine) -> None:
    """A terminal that lacks the multiplication sign gets an x, not an escape."""
    result = project.pytest("--gpu-share", PYTHONIOENCODING="ascii")
    assert result.said[0].startswith("gpu-share: 2 GPU workers x 4.5 GB = 9.0 GB (")


@APPENDS
@pytest.mark.parametrize("level", ["-q", "-v"])
def test_log(level: str, project: Project, machine: Machine) -> None:
    """The lines stand in pytest's log file, where the founding write-up looks for them."""
    project.file("pytest.ini", "[pytest]\nlog_file = run.log\nlog_file_level = INFO\n")
    result = project.pytest("--gpu-share", level, OLLAMA_HOST="127.0.0.1:9")
    assert result.code == 0
    log = (project.path / "run.log").read_text(encoding="utf-8")
    assert [re.sub(r"^(\w+) +(\S+):(\S+?):\d+ ", r"\1 \2 ", line) for line in log.splitlines()][
        :3
    ] == [
        "INFO pytest_gpushare gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB "
        "(limited by max_workers_per_gb; preset conservative)",
        "INFO pytest_gpushare GPU 0 NVIDIA GeForce RTX 3090 Ti: total 24.0 GB, available 22.0 GB",
        "INFO pytest_gpushare VRAM: Ollama reservation 12.0 GB, safety buffer 1.0 GB, "
        "usable for tests 9.0 GB",
    ]
    assert all(SEEDS_GREP.search(line) for line in log.splitlines())


@APPENDS
def test_log_needs_no_level(project: Project, machine: Machine) -> None:
    """`log_file` alone is enough: the logger has a level of its own."""
    result = project.pytest("--gpu-share", "-o", "log_file=run.log")
    assert "GPU workers" in (project.path / "run.log").read_text(encoding="utf-8"), result.out


@APPENDS
def test_log_has_the_end_too(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """The verdict on Ollama and tests that ran out of memory stand in `log_file` as well."""
    ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    project.write(
        test_project="""
            import gpusim

            def test_too_large():
                gpusim.alloc("30GB")
        """
    )
    result = project.pytest("--gpu-share", "-n1", "-o", "log_file=run.log")
    assert result.code == 1
    log = (project.path / "run.log").read_text(encoding="utf-8")
    assert "gpu-share: Ollama kept qwen2.5:14b on the GPU (10.8 GB, 100 %)" in log
    assert "test_project.py::test_too_large ran out of VRAM" in log


def test_selection_without_gpu_tests(project: Project, machine: Machine) -> None:
    """`-m "not gpu"`: nothing is placed on a GPU, and nothing is said to be unmarked."""
    project.write(
        test_project="""
            import os
            import pytest

            @pytest.mark.gpu
            def test_gpu():
                pass

            def test_cpu():
                assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        """
    )
    result = project.pytest("--gpu-share", "-n2", "-m", "not gpu")
    assert (result.code, result.passed) == (0, 1), result.out
    assert result.said == ["gpu-share: 2 CPU workers (no GPU: -m 'not gpu' selects no GPU test)"]
    result = project.pytest("--gpu-share", "-n2", "-m", "not slow")
    assert result.said[0].startswith("gpu-share: 2 GPU workers"), result.out


def test_partly_on_the_cpu(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """A model that spilled before the run is shown for what it is."""
    machine_with(Device(total="24GB", used="20GB"))
    server = ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    result = project.pytest("--gpu-share", "-n1")
    assert result.code == 0
    assert re.fullmatch(
        r"  Ollama 0\.33\.0 at 127\.0\.0\.1:PORT: qwen2\.5:14b 10\.8 GB, 2\d % on GPU\n",
        normal(result.said[-2] + "\n"),
    ), (result.said, server)
    assert re.fullmatch(
        r"gpu-share: Ollama had a part of qwen2\.5:14b on the CPU before the tests began "
        r"\(2\.\d+ GB of 10\.8 GB on the GPU\): a loaded model is never moved; free VRAM, "
        r"then reload it \(ollama stop qwen2\.5:14b\)",
        result.said[-1],
    )
