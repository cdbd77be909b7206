"""Sessions whose tests have needs lease by the test: they run at the same time."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable

import pytest
from acceptance.conftest import Project
from acceptance.sessions import LARGE_TESTS, SLEEPER, Session, passed, records, start, wait_for
from simulator import Device, Machine
from simulator.child import child_process

__all__ = ["start"]

PACKED = ("-o", "gpu_share_preset=no-ollama packed")


def suite_of(need: str, count: int, seconds: float | str, keeps: str = "", more: str = "") -> str:
    """A module of tests that need so much VRAM each; a session fixture keeps some of it."""
    return f"""
        import pathlib, time
        import gpusim, pytest

        @pytest.fixture(scope="session")
        def kept():
            return gpusim.alloc("{keeps}") if "{keeps}" else None

        @pytest.mark.parametrize("i", range({count}))
        @pytest.mark.gpu(vram="{need}")
        def test_declared(i, kept):
            pathlib.Path(f"began{{i}}").write_text("")
            with gpusim.alloc("{more or "1GB"}"):
                time.sleep({seconds})
    """


def test_newcomer_runs_beside_a_session_that_goes_on(
    start: Callable[..., Session], project: Project, machine: Machine
) -> None:
    """It gets what its largest test needs, and no worker of the first is stopped for that."""
    place = project.path.parent / "worktree1"
    # However long the second one takes, tests of the first are left.
    seconds = f"0.4 if not pathlib.Path({str(place / 'enough')!r}).exists() else 0"
    first = start(suite_of("8GB", 400, seconds, more="7GB"), *PACKED, "-n2")
    wait_for((place / "began2").exists)
    second = start(suite_of("10GB", 3, 0.2, more="9GB"), *PACKED, "-n1")
    output = second.finish(60)
    assert first.process.poll() is None
    assert passed(output) == 3, output
    (place / "enough").touch()
    output = first.finish()
    assert passed(output) == 400, output
    assert "ended:" not in output


@pytest.mark.timeout(240)
def test_eight_sessions_with_fixtures_that_stay(
    start: Callable[..., Session], machine: Machine
) -> None:
    """On 9 GB for tests: contexts and fixtures stay, and every session ends."""
    module = suite_of("3GB", 3, 0.1, keeps="500MB")
    options = ("-o", "gpu_share_min_vram_per_worker_gb=1", "-n1")
    sessions = [start(module, *options) for _ in range(8)]
    outputs = [session.finish(200) for session in sessions]
    assert [passed(output) for output in outputs] == [3] * 8, "\n".join(outputs)


@pytest.mark.parametrize("options", [(), ("-o", "gpu_share_min_vram_per_worker_gb=1")])
def test_two_sessions_with_tests_of_7_of_9_gb(
    start: Callable[..., Session], machine: Machine, options: tuple[str, ...]
) -> None:
    """One after the other, or in turns where a worker may be small."""
    module = suite_of("7GB", 3, 0.1, more="6GB")
    sessions = [start(module, "-n2", *options) for _ in range(2)]
    outputs = [session.finish() for session in sessions]
    assert [passed(output) for output in outputs] == [3, 3], "\n".join(outputs)


def test_one_test_left_holds_no_more_than_it_needs(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    first = start(suite_of("4GB", 1, 60), *PACKED, "-n2")
    wait_for((first.path.parent / "worktree1" / "began0").exists)
    output = start(suite_of("16GB", 2, 0.1, more="15GB"), *PACKED, "-n1").finish()
    assert passed(output) == 2, output
    assert first.process.poll() is None


def test_what_others_keep_for_ollama_is_waited_for(
    start: Callable[..., Session], project: Project, machine: Machine
) -> None:
    """12 GB that only the other session keeps limit no test for longer than that one lives."""
    first = start(suite_of("4GB", 8, 0.5), "-n1")
    wait_for((first.path.parent / "worktree1" / "began0").exists)
    declared = start(suite_of("14GB", 2, 0.1, more="13GB"), *PACKED, "-n1")
    large = ("-o", "gpu_share_min_vram_per_worker_gb=14")
    undeclared = start(LARGE_TESTS, "-o", "gpu_share_preset=no-ollama", "-n1", *large)
    outputs = [session.finish() for session in (first, declared, undeclared)]
    assert [passed(output) for output in outputs] == [8, 2, 4], "\n".join(outputs)
    assert "CPU worker" not in outputs[2]


HOLD = [sys.executable, "-m", "pytest_gpushare", "hold"]


SEVERAL = """
    import json, os, pathlib
    import gpusim, pytest

    @pytest.mark.gpu(vram="2GB")
    def test_first():
        pathlib.Path("began").write_text("")

    @pytest.mark.gpu(vram="10GB", devices=2)
    def test_both():
        with gpusim.alloc("9GB", 0), gpusim.alloc("9GB", 1):
            pathlib.Path("both").write_text("")
"""


def test_need_on_several_devices_is_leased_in_one_step(
    start: Callable[..., Session], project: Project, machine_with: Callable[..., Machine]
) -> None:
    """While one of them is another session's, nothing is leased on the other one for it."""
    machine_with(Device(total="24GB"), Device(total="24GB"))
    command = [*HOLD, "--device", "1", "--vram", "18GB", "--", "sleep", "60"]
    seen = set[tuple[int, ...]]()
    with child_process(command, env=project.environment, cwd=project.path) as holder:
        wait_for(lambda: bool(records(project)))
        session = start(SEVERAL, *PACKED, "-n1", "-o", "gpu_share_visible_devices=all")
        place = session.path.parent / "worktree1"

        def look() -> None:
            for record in records(project):
                devices = record["devices"]
                assert isinstance(devices, dict)
                if record["pid"] == session.process.pid and record["since"]:
                    seen.add(tuple(((share or [0])[0]) >> 30 for share in devices.values()))

        wait_for((place / "began").exists, 60)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            look()
            time.sleep(0.01)
        assert not (place / "both").exists()
        holder.terminate()
        until = time.monotonic() + 60
        while session.process.poll() is None and time.monotonic() < until:
            look()
            time.sleep(0.005)
    output = session.finish()
    assert passed(output) == 2, output
    # Where either has so much, the other one has it too.
    assert [sizes for sizes in seen if max(sizes) >= 10 > min(sizes)] == []
    assert any(max(sizes) < 10 for sizes in seen)
    assert any(min(sizes) >= 10 for sizes in seen)


def test_waits_for_any_of_several_devices(
    start: Callable[..., Session], project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Once one of them is granted, it waits for the other no longer."""
    machine_with(Device(total="24GB", used="2GB"), Device(total="24GB", used="2GB"))
    holders = [
        child_process(
            [*HOLD, "--device", device, "--vram", "20GB", "--", "sleep", "60"],
            env=project.environment,
            cwd=project.path,
        )
        for device in "01"
    ]
    with holders[0] as first, holders[1] as second:
        wait_for(lambda: len(records(project)) == 2)
        session = start(SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1")

        def shares() -> list[list[int]]:
            found = [r for r in records(project) if r["pid"] == session.process.pid]
            devices = found[0]["devices"] if found else {}
            assert isinstance(devices, dict)
            return [[*share, 0, 0][:2] for share in devices.values()]

        wait_for(lambda: sum(want > 0 for _, want in shares()) == 2)
        first.terminate()
        wait_for(lambda: any(lease for lease, _ in shares()))
        assert [want for _, want in shares()] == [0, 0]
        assert sum(lease > 0 for lease, _ in shares()) == 1
        session.kill()
        second.terminate()


def holding(start: Callable[..., Session]) -> Session:
    """A session whose test holds its lease for good, once it does."""
    holder = start(SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1",
                   "-o", "gpu_share_safety_buffer_mb=4096")  # fmt: skip
    wait_for((holder.path.parent / "worktree1" / "sleeps").exists)
    return holder


def test_fails_naming_the_holder(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """A session that makes no progress is waited for as long as for any other program."""
    holder = holding(start)
    session = start(suite_of("6GB", 1, 0.1), *PACKED, "-n1",
                    "-o", "gpu_share_pressure_timeout_s=2")  # fmt: skip
    output = session.finish()
    assert "1 failed" in output or "1 error" in output, output
    text = " ".join(output.split())
    assert "no GPU for this test: it needs 6.0 GB, and 3.0 GB was left on GPU 0 for 2 s" in text
    assert re.search(rf"leased by pid {holder.process.pid}, \w+, in \S*worktree1: 18\.0 GB", text)


def test_lease_of_another_counts_where_the_driver_is_slow(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """What is free is not known in time then, though it is known who holds how much."""
    holding(start)
    session = start(suite_of("6GB", 1, 0.1), *PACKED, "-n1",
                    "-o", "gpu_share_pressure_timeout_s=8")  # fmt: skip
    wait_for(lambda: any(record["ticket"] for record in records(project)))
    for number in range(12):
        # One late answer at a time, at any of the readings of a step.
        machine.inject("nvmlDeviceGetMemoryInfo*", delay=1.3, first=number % 5, count=1)
        time.sleep(0.5)
        machine.clear_injections()
    output = session.finish()
    assert "1 failed" in output or "1 error" in output, output
    assert not (session.path.parent / "worktree2" / "began0").exists()


def test_waits_as_long_as_the_holder_makes_progress(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Then a lease does not count towards the time that tests wait for VRAM at most."""
    module = """
        import pathlib, time
        import pytest

        @pytest.mark.parametrize("i", range(8))
        def test_slow(i):
            pathlib.Path("sleeps").write_text("")
            time.sleep(1)
    """
    holder = start(module, "-o", "gpu_share_preset=no-ollama", "-n1",
                   "-o", "gpu_share_safety_buffer_mb=4096")  # fmt: skip
    wait_for((holder.path.parent / "worktree1" / "sleeps").exists)
    session = start(suite_of("6GB", 1, 0.1), *PACKED, "-n1",
                    "-o", "gpu_share_pressure_timeout_s=3")  # fmt: skip
    output = session.finish()
    assert passed(output) == 1, output
    assert passed(holder.finish()) == 8


def test_interrupted_while_it_waits(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Ctrl-C ends the wait at once, and no record stays."""
    holder = start(SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1")
    wait_for((holder.path.parent / "worktree1" / "sleeps").exists)
    session = start(SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1")
    wait_for(lambda: any(record["ticket"] for record in records(project)))
    time.sleep(1)
    os.kill(session.process.pid, signal.SIGINT)
    # The other one would hold its VRAM for minutes.
    assert wait_for(lambda: session.process.poll() is not None, 90) < 10
    output = session.finish()
    assert session.process.returncode == pytest.ExitCode.INTERRUPTED, output
    assert len(records(project)) == 1
