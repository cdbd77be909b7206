"""GPU and CPU tests in one pool: who runs what, in which order, with which fixtures."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from inner_pytest import inner_command
from simulator import Machine
from simulator.child import child_process, wait_for

from .conftest import Project

# Each test writes down where it ran; GPU tests hold VRAM meanwhile.
POOL = """
    import os, pathlib, time
    import gpusim
    import pytest

    def note(name):
        with open("log.txt", "a") as log:
            print(name, os.environ["PYTEST_GPUSHARE_ROLE"], file=log)

    @pytest.mark.parametrize("i", range(12))
    def test_cpu(i):
        note(f"cpu{i}")
        time.sleep(0.02)

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(6))
    def test_gpu(i):
        with gpusim.alloc("3GB"):
            note(f"gpu{i}")
            time.sleep(0.05)
"""


def log_of(project: Project) -> list[list[str]]:
    """The words of each line that the tests wrote."""
    return [line.split() for line in Path(project.path, "log.txt").read_text().splitlines()]


def test_routing(project: Project, machine: Machine) -> None:
    """Marked tests run on GPU workers; every test runs once."""
    project.write(test_project=POOL)
    result = project.pytest("--gpu-share", "-o", "gpu_share_cpu_workers=2", "-v")
    assert (result.code, result.passed, result.workers) == (0, 18, 4), result.out
    assert result.said[0].startswith("gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB, 2 CPU workers")
    lines = log_of(project)
    assert len(lines) == len({name for name, _ in lines}) == 18
    assert {role for name, role in lines if name.startswith("gpu")} == {"gpu"}
    assert machine.snapshot()[0].oom_count == 0


def test_workers_that_collect_before_the_controller_listens(
    project: Project, machine: Machine
) -> None:
    """What they tell of their tests is not lost, however slow the controller is."""
    project.write(test_project=POOL)
    project.file(
        "conftest.py",
        """
        import time
        import pytest

        @pytest.hookimpl(wrapper=True)
        def pytest_sessionstart(session):
            yield
            if not hasattr(session.config, "workerinput"):
                time.sleep(4)
        """,
    )
    result = project.pytest("--gpu-share", "-o", "gpu_share_cpu_workers=2")
    assert (result.code, result.passed) == (0, 18), result.out
    assert {role for name, role in log_of(project) if name.startswith("gpu")} == {"gpu"}


BESIDE = ("--gpu-share", "-o", "gpu_share_cpu_workers=1", "-o", "gpu_share_max_workers_per_gpu=1")
"""One GPU worker and one CPU worker."""

FATAL = """
    import os, signal, time
    import gpusim
    import pytest

    @pytest.mark.parametrize("i", range(4))
    def test_cpu(i):
        time.sleep(0.05)

    def test_cpu_dies():
        os.kill(os.getpid(), signal.SIGKILL)

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(4))
    def test_gpu(i):
        with gpusim.alloc("6GB"):
            if i == 1:
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_crash_while_holding(project: Project, machine: Machine) -> None:
    """A dead worker's test fails once, its VRAM is free again, and all others run."""
    project.write(test_project=FATAL)
    result = project.pytest(*BESIDE)
    assert (result.code, result.passed) == (1, 7), result.out
    assert "crashed while running 'test_project.py::test_gpu[1]'" in result.out
    assert "crashed while running 'test_project.py::test_cpu_dies'" in result.out
    assert "2 failed" in result.out
    assert machine.snapshot()[0].oom_count == 0
    assert machine.snapshot()[0].used == 2 * 2**30


def test_no_replacement(project: Project, machine: Machine) -> None:
    """With restarting disabled the run ends, as stock xdist's does."""
    project.write(test_project=FATAL)
    result = project.pytest(*BESIDE, "--max-worker-restart=0")
    assert result.code == 1, result.out
    assert "worker restarting disabled" in result.out


FAILING = """
    import time
    import pytest

    @pytest.mark.parametrize("i", range(40))
    def test_cpu(i):
        time.sleep(0.02)

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(10))
    def test_gpu(i):
        assert i
"""


def test_stop_at_the_first_failure(project: Project, machine: Machine) -> None:
    """-x ends the run with tests left, and --lf begins with what failed."""
    project.write(test_project=FAILING)
    cache = ("-p", "cacheprovider")
    result = project.pytest(*BESIDE, "-x", *cache)
    assert "stopping after 1 failures" in result.out
    assert result.code == 2 or "1 failed" in result.out, result.out
    assert result.passed < 49
    again = project.pytest(*BESIDE, "--lf", *cache)
    assert (again.code, again.passed) == (1, 0), again.out
    assert "1 failed" in again.out


SKIPPING = """
    import os
    import pytest

    HAS_GPU = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))

    @pytest.fixture
    def cuda():
        if not HAS_GPU:
            pytest.skip("CUDA is not available")

    @pytest.mark.skipif(not HAS_GPU, reason="needs CUDA")
    def test_skipif():
        assert HAS_GPU

    @pytest.mark.skip(reason="broken")
    def test_broken():
        pass

    def test_no_network():
        pytest.skip("no network")

    @pytest.mark.parametrize("device", ["cpu", *(["cuda"] if HAS_GPU else [])])
    def test_device(device):
        assert device == "cpu" or HAS_GPU

    @pytest.mark.gpu
    def test_gpu():
        assert HAS_GPU
"""


def test_no_test_is_lost(project: Project, machine: Machine) -> None:
    """What markers skip without a GPU, or what GPU workers alone collect, runs there."""
    (project.path / "test_project.py").unlink()
    project.write(test_skips=SKIPPING)
    result = project.pytest(*BESIDE, "--gpu-share-strict", "-rs")
    assert (result.code, result.passed) == (0, 4), result.out
    assert "2 skipped" in result.out
    assert result.said[-2:] == [
        "gpu-share: run on GPU workers, since markers skip it without a GPU: "
        "1 test; mark with gpu what needs one",
        "gpu-share: workers collected different tests: 1 only GPU workers, 0 only CPU workers; "
        "each test ran where it was collected",
    ]


def test_lost_in_a_fixture(project: Project, machine: Machine) -> None:
    """A test that skips itself on a CPU worker for lack of a GPU is told, an error under strict."""
    (project.path / "test_project.py").unlink()
    text = SKIPPING.replace(
        "def test_no_network():", "def test_fixture(cuda): pass\n\n    def test_no_network():"
    )
    project.write(test_skips=text)
    result = project.pytest(*BESIDE, "--gpu-share-strict", "-k", "fixture")
    assert result.code == 1, result.out
    assert (
        "gpu-share: skipped on CPU workers for lack of a GPU: 1 test; mark with gpu what needs "
        "one: test_skips.py::test_fixture (CUDA is not available) "
        "(an error under --gpu-share-strict)"
    ) in result.out
    assert "gpu-share: no GPU test was selected: none of" in result.out


WAITING = """
    import os, pathlib, signal, time
    import gpusim
    import pytest

    @pytest.mark.gpu(vram="6GB")
    def test_holds():
        pathlib.Path("pids").mkdir(exist_ok=True)
        with gpusim.alloc("5GB"):
            pathlib.Path("pids", str(os.getpid())).touch()
            time.sleep(float(os.environ["SECONDS"]))

    @pytest.mark.gpu(vram="6GB")
    @pytest.mark.parametrize("i", range(2))
    def test_waits(i):
        with gpusim.alloc("5GB"):
            pass
"""
KILLER = """
    import os, pathlib, signal, threading, time

    def kill(pids):
        while not pathlib.Path("pids").exists() or not list(pathlib.Path("pids").iterdir()):
            time.sleep(0.02)
        holder = int(next(pathlib.Path("pids").iterdir()).name)
        while len(pids) < 2:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(next(pid for pid in pids if pid != holder), signal.SIGKILL)

    pids = set()

    def pytest_testnodeready(node):
        # A worker that was sent nothing yet: it waits for VRAM.
        pids.add(node.gateway._rinfo().pid)
        if len(pids) == 1:
            threading.Thread(target=kill, args=(pids,), daemon=True).start()
"""


def test_crash_while_waiting(project: Project, machine: Machine) -> None:
    """A worker that dies with nothing to do takes no test with it."""
    project.write(test_project=WAITING, conftest=KILLER)
    result = project.pytest("--gpu-share", SECONDS="1.5")
    assert (result.code, result.passed) == (0, 3), result.out
    assert "node down" in result.out
    assert machine.snapshot()[0].oom_count == 0


def test_interrupt(project: Project, machine: Machine) -> None:
    """Ctrl-C ends the run at once; no process and no VRAM stay behind."""
    project.write(test_project=WAITING)
    command = inner_command("--gpu-share")
    with child_process(
        command,
        cwd=project.path,
        env={**project.environment, "SECONDS": "60"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        pids = project.path / "pids"
        wait_for(lambda: pids.exists() and list(pids.iterdir()))
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        took = time.monotonic() - began
    assert process.returncode == 2, out
    assert "KeyboardInterrupt" in out
    assert took < 30
    holder = int(next(pids.iterdir()).name)
    wait_for(lambda: machine.snapshot()[0].used == 2 * 2**30)
    with pytest.raises(ProcessLookupError):
        os.kill(holder, 0)


NEIGHBOURS = """
    import pathlib, time
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(3))
    def test_gpu(i):
        time.sleep(0.01)

    @pytest.mark.gpu
    def test_flaky():
        first = not pathlib.Path("seen").exists()
        pathlib.Path("seen").touch()
        assert not first

    @pytest.mark.gpu
    @pytest.mark.timeout(1)
    @pytest.mark.flaky(reruns=0)
    def test_too_slow():
        time.sleep(30)

    def test_cpu():
        pass
"""


def test_beside_other_plugins(project: Project, machine: Machine) -> None:
    """Reruns and time-outs go on as ever, through GPU workers too; and a random order."""
    for name in ("pytest_rerunfailures", "pytest_timeout"):
        pytest.importorskip(name, reason=f"{name} is not installed here")
    project.write(test_project=NEIGHBOURS)
    others = ["rerunfailures", "timeout"]
    result = project.pytest(*BESIDE, "--reruns=1", "--timeout-method=signal", beside=others)
    assert (result.code, result.passed) == (1, 5), result.out
    assert "1 failed, 5 passed, 1 rerun" in result.out
    assert "Timeout" in result.out
