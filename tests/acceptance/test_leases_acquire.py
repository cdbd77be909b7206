"""`leases.acquire` inside tests: it raises the running test's need."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from acceptance.conftest import Project
from acceptance.sessions import SLEEPER, Session, passed, records, start, wait_for
from simulator import Machine
from simulator.child import child_process

__all__ = ["start"]

HELPERS = """
    import json, os, pathlib, time
    import gpusim, pytest
    from pytest_gpushare.leases import LeaseUnavailable, acquire

    def leased():
        found = []
        for path in pathlib.Path(os.environ["PYTEST_GPUSHARE_LEASES"]).glob("s-*"):
            found += [s[0] / 2**30 for s in json.loads(path.read_text())["devices"].values()]
        return sorted(found)
"""

RAISED = (
    HELPERS
    + """
    @pytest.mark.gpu(vram="2GB")
    def test_more():
        with acquire("0", "12GB"):
            with gpusim.alloc("11GB"):
                pathlib.Path("raised").write_text(repr(leased()))
                time.sleep(2)
"""
)


@pytest.mark.parametrize("workers", ["-n1", "-n0"])
def test_need_of_the_running_test_is_raised(
    project: Project, machine: Machine, workers: str
) -> None:
    """One record says it all: 12 GB, not 2 beside 12; it falls again with the block."""
    body = """
    @pytest.mark.gpu(vram="2GB")
    def test_more():
        with acquire("0", "3GB"):
            with acquire("0", "5GB", wait=20), gpusim.alloc("7GB"):
                assert leased() == [1.0, 8.0]
            time.sleep(0.5)
        with pytest.raises(LeaseUnavailable):
            with acquire("0", "22GB", wait=0.2):
                pass
"""
    project.write(test_project=HELPERS + body)
    hold = ["-m", "pytest_gpushare", "hold", "--vram", "1GB", "--"]
    command = [sys.executable, *hold, "sleep", "60"]
    with child_process(command, env=project.environment, cwd=project.path) as process:
        wait_for(lambda: bool(records(project)))
        result = project.pytest("--gpu-share", workers, "-o", "gpu_share_preset=no-ollama packed")
        process.terminate()
    assert result.passed == 1, result.out


def test_second_attempt_after_running_out_of_memory(project: Project, machine: Machine) -> None:
    """Alone on the device it leases what is there, so that no other session counts on that."""
    body = """
    def wait_for(name):
        until = time.monotonic() + 20
        while not pathlib.Path(name).exists() and time.monotonic() < until:
            time.sleep(0.02)

    @pytest.mark.gpu(vram="14GB")
    def test_neighbour():
        with gpusim.alloc("13GB"):
            pathlib.Path("held").write_text("")
            wait_for("tried")
            time.sleep(0.5)

    @pytest.mark.gpu(vram="2GB")
    def test_takes_more():
        wait_for("held")
        pathlib.Path("tried").write_text("")
        with gpusim.alloc("11GB"):
            assert leased()[0] == 1.0
            assert 12.0 < leased()[1] <= 20.0
"""
    project.write(test_project=HELPERS + body)
    with child_process(
        [sys.executable, "-m", "pytest_gpushare", "hold", "--vram", "1GB", "--", "sleep", "60"],
        env=project.environment,
        cwd=project.path,
    ) as process:
        wait_for(lambda: bool(records(project)))
        result = project.pytest("--gpu-share", "-n2", "-o", "gpu_share_preset=no-ollama packed")
        process.terminate()
    assert result.passed == 2, result.out
    assert "passed alone" in " ".join(result.out.split()), result.out


def test_another_session_waits_for_it(
    start: Callable[..., Session], project: Project, machine: Machine
) -> None:
    """And its tests are not out of memory: what was acquired is leased before it is taken."""
    packed = ("-o", "gpu_share_preset=no-ollama packed", "-n1")
    first = start(RAISED, *packed)
    wait_for((first.path.parent / "worktree1" / "raised").exists)
    module = """
        import gpusim, pytest

        @pytest.mark.parametrize("i", range(3))
        @pytest.mark.gpu(vram="14GB")
        def test_large(i):
            with gpusim.alloc("13GB"):
                pass
    """
    output = start(module, *packed).finish()
    assert passed(output) == 3, output
    output = first.finish()
    assert passed(output) == 1, output


def test_waits_for_another_session_and_gives_up(
    start: Callable[..., Session], project: Project, machine: Machine
) -> None:
    """The error names who holds what."""
    holder = start(
        SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1",
        "-o", "gpu_share_safety_buffer_mb=12288",
    )  # fmt: skip
    wait_for((holder.path.parent / "worktree1" / "sleeps").exists)
    body = """
    @pytest.mark.gpu(vram="2GB")
    def test_more():
        with acquire("0", "14GB"):
            pass
"""
    session = start(
        HELPERS + body, "-o", "gpu_share_preset=no-ollama packed", "-n1", "--gpu-share-wait=1"
    )
    text = " ".join(session.finish().split())
    assert "14.0 GB of VRAM is not available for this test after 1 s: " in text
    assert f"leased by pid {holder.process.pid}, " in text


def test_without_a_ledger_nothing_is_leased(project: Project, machine: Machine) -> None:
    """A file where the directory should be, and one whose gate is no file."""
    project.file("a-file", "")
    (project.path / "a-gate" / "gate").mkdir(parents=True)
    for directory, why in (("a-file", "cannot be opened"), ("a-gate", "cannot be locked")):
        hold = [sys.executable, "-m", "pytest_gpushare", "hold", "--vram", "1GB"]
        result = project.command([*hold, "--leases", str(project.path / directory), "--", "true"])
        assert result.code != 0
        assert "no VRAM is leased: " in result.err
        assert why in result.err
