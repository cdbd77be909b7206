"""Several sessions on one host share its device: no test is lost because of another session."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from acceptance.conftest import Project
from acceptance.sessions import (
    DECLARED,
    LARGE_TESTS,
    NO_OLLAMA,
    SLEEPER,
    Session,
    leases_directory,
    passed,
    records,
    sizes,
    start,
    wait_for,
)
from inner_pytest import inner_command
from simulator import Machine
from simulator.child import child_process
from simulator.store import start_time

__all__ = ["start"]


@pytest.mark.parametrize("module", [LARGE_TESTS, DECLARED], ids=["undeclared", "declared"])
def test_two_sessions(
    start: Callable[..., Session], machine: Machine, project: Project, module: str
) -> None:
    """Both sessions pass all their tests: the second waits for what the first has leased."""
    options = ("-o", "gpu_share_preset=no-ollama", "-n3")
    first = start(module, *options)
    wait_for(lambda: len(records(project)) == 1)
    second = start(module, *options)
    outputs = [first.finish(), second.finish()]
    assert [passed(output) for output in outputs] == [4, 4], "\n".join(outputs)
    if module is LARGE_TESTS:
        assert "waiting for 3.0 GB of VRAM for a GPU worker" in outputs[1]
        assert f"pid {first.process.pid}, " in outputs[1]
    assert list(leases_directory(project).glob("s-*")) == []


COLLIDING = """
    import pathlib, time
    import gpusim, pytest

    OWN = pathlib.Path.cwd()

    def note(what, number):
        (OWN.parent / f"{what}-{OWN.name}-{number}").touch()

    def meet(what, number):
        note(what, number)
        until = time.monotonic() + 60
        while len(list(OWN.parent.glob(f"{what}-*"))) < 4:
            assert time.monotonic() < until
            time.sleep(0.01)

    @pytest.mark.parametrize("number", range(2))
    def test_large(number):
        meet("begun", number)
        try:
            with gpusim.alloc("10GB"):
                meet("tried", number)
        finally:
            note("tried", number)
"""


def test_without_leases_they_collide(start: Callable[..., Session], machine: Machine) -> None:
    """The same two sessions with leases off: this is what the leases are for.

    No test allocates before all four have begun, or gives back before all have tried.
    """
    options = ("-o", "gpu_share_preset=no-ollama", "-o", "gpu_share_leases=off")
    both = [start(COLLIDING, *options, "-n2"), start(COLLIDING, *options, "-n2")]
    output = "\n".join([session.finish() for session in both])
    # Two of them have room at once; the others get a second attempt.
    ran_out = re.findall(r"test_large\[\d\] ran out of VRAM.*: GPU 0 had", output)
    assert len(ran_out) == 2, output


def test_slots_come_back(start: Callable[..., Session], machine: Machine, project: Project) -> None:
    """A second session takes the slots of workers that have ended, beside the first one."""
    first = start(SLEEPER, *NO_OLLAMA, "-n3")
    wait_for((first.path.parent / "worktree1" / "sleeps").exists)
    output = start(LARGE_TESTS, *NO_OLLAMA, "-n1").finish()
    assert passed(output) == 4
    assert "1 GPU worker × 14.0 GB" in output
    assert re.search(r"GPU 0: 7\.0 GB of VRAM is leased by pid \d+, \w+, in .*worktree1", output)
    first.kill()


def test_worker_that_has_ended_holds_nothing(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Its process ends while others go on: its context would be missing in the slot given back."""
    module = SLEEPER + "\n    def test_quick():\n        gpusim.alloc('1GB')\n"
    first = start(module, *NO_OLLAMA, "-n2")
    wait_for((first.path.parent / "worktree1" / "sleeps").exists)
    context = 600 * 1024**2
    wait_for(lambda: machine.snapshot()[0].used == 6 * 1024**3 + context)
    output = start(LARGE_TESTS, *NO_OLLAMA, "-n1").finish()
    assert "1 GPU worker × 10.5 GB" in output
    assert passed(output) == 4
    first.kill()


def test_explicit_wait_is_a_limit(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """With `--gpu-share-wait` the session falls back when the time is over, naming who holds."""
    first = start(SLEEPER, *NO_OLLAMA, "-n1")
    wait_for(lambda: any(map(_leases, records(project))))
    output = start(
        "def test_nothing():\n    pass\n", "--gpu-share-wait=1", *NO_OLLAMA, "-n1"
    ).finish()
    who = r"pid \d+, \w+, in .*worktree1: \d+\.\d+ GB"
    waited = re.search(rf"waited (\d+) s for VRAM: {who}", output)
    assert waited is not None, output
    # By default it would be five minutes.
    assert 1 <= int(waited.group(1)) < 60
    assert "CPU worker" in output
    assert passed(output) == 1
    refused = start(
        "def test_nothing():\n    pass\n",
        "--gpu-share-wait=0.2",
        "-n1",
        "-o",
        "gpu_share_fallback_to_cpu_when_constrained=false",
        *NO_OLLAMA,
    )
    output = refused.finish()
    assert refused.process.returncode == 4
    assert "worktree1" in output
    first.kill()


SHOWS_FREE = """
    import pathlib
    import gpusim

    def pytest_gpushare_plan(plan):
        pathlib.Path("free").write_text(str(gpusim.mem_get_info()[0]))
"""


def test_killed_holder(start: Callable[..., Session], machine: Machine, project: Project) -> None:
    """The waiter starts within 2 s after the holder was killed, and not before its VRAM is back."""
    first = start(SLEEPER, *NO_OLLAMA, "-n1")
    marker = first.path.parent / "worktree1" / "sleeps"
    wait_for(marker.exists)
    second = start(LARGE_TESTS, *NO_OLLAMA, conftest=SHOWS_FREE)
    wait_for(lambda: any(record["ticket"] for record in records(project)))
    time.sleep(0.3)
    os.kill(first.process.pid, signal.SIGKILL)
    waited = wait_for(lambda: any(_leases(record) for record in records(project)
                                  if record["pid"] == second.process.pid), 60)  # fmt: skip
    assert waited < 2
    assert passed(second.finish()) == 4
    free = int((second.path.parent / "worktree2" / "free").read_text())
    assert free == 22 * 1024**3


def test_workers_end_with_their_controller(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Workers whose controller was killed end within half a second or so, in the middle of a
    test too; by execnet alone they go on for up to 15 s."""
    module = SLEEPER + "\n    def test_waits():\n        time.sleep(60)\n"
    session = start(module, *NO_OLLAMA, "-n2")
    wait_for((session.path.parent / "worktree1" / "sleeps").exists)
    wait_for(lambda: any(len(_workers(record)) == 2 for record in records(project)))
    (record,) = records(project)
    workers = _workers(record)
    os.kill(session.process.pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(start_time, workers))) < 3
    assert machine.snapshot()[0].used == 2 * 1024**3


def _workers(record: dict[str, object]) -> list[int]:
    workers = record["workers"]
    assert isinstance(workers, list)
    return [worker[1] for worker in workers]


def _leases(record: dict[str, object]) -> bool:
    return any(sizes(record))


@pytest.mark.parametrize("fault", ["file", "fifo", "link"])
def test_directory_that_is_none(
    start: Callable[..., Session], machine: Machine, project: Project, fault: str
) -> None:
    """One line says that nothing is leased, and the tests run."""
    path = leases_directory(project)
    if fault == "file":
        path.write_text("")
    elif fault == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/nowhere")
    output = start(LARGE_TESTS, "-o", "gpu_share_preset=no-ollama", "-n2").finish()
    assert output.count("no VRAM is leased: ") == 1
    assert passed(output) == 4


def test_nothing_is_leased(project: Project, machine: Machine) -> None:
    """A run that only collects leaves no trace, and `plan` does not either."""
    project.pytest("--gpu-share", "--collect-only")
    project.command([sys.executable, "-m", "pytest_gpushare", "plan"])
    assert not leases_directory(project).exists()


def test_plan_and_doctor_say_that_a_run_would_wait(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Where a run would wait for another session they name that one, and what it then gets."""
    held = start(SLEEPER, *NO_OLLAMA, "-n1")
    wait_for((held.path.parent / "worktree1" / "sleeps").exists)
    ini = "[pytest]\ngpu_share_preset = no-ollama\ngpu_share_min_vram_per_worker_gb = 5.5\n"
    project.file("pytest.ini", ini)
    command = [sys.executable, "-m", "pytest_gpushare"]
    who = rf"pid {held.process.pid}, \w+, in \S*worktree1: 21\.0 GB"
    plan = project.command([*command, "plan", "-n2"]).out
    assert plan.startswith("gpu-share: 2 GPU workers × 10.5 GB"), plan
    wanted = f"a run would wait for VRAM first, and then start with this plan: {who}"
    assert re.search(wanted, plan), plan
    assert "CPU worker" not in plan
    doctor = project.command([*command, "doctor", "--", "-n2"]).out
    assert re.search(
        rf"a run would wait for VRAM of {who}[^;]*; it would then start\s+2 GPU workers × 10\.5 GB",
        re.sub(r"\s+", " ", doctor),
    ), doctor
    at_once = project.command([*command, "plan", "-n2", "--", "--gpu-share-wait=0"]).out
    assert at_once.startswith("gpu-share: 2 CPU workers (insufficient VRAM"), at_once
    assert "5.5 GB needed, other sessions lease VRAM; " in at_once
    held.kill()


def test_record_of_a_run(start: Callable[..., Session], machine: Machine, project: Project) -> None:
    """The record names the leases, the workers and the tests; nobody else can write it."""
    start(SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1")
    wait_for(lambda: any(record["workers"] and record["total"] for record in records(project)))
    (record,) = records(project)
    (path,) = leases_directory(project).glob("s-*")
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.stat().st_size == 4096
    assert leases_directory(project).stat().st_mode & 0o7777 == 0o1777
    assert (record["done"], record["total"]) == (0, 1)
    uuid = machine.snapshot()[0].uuid
    devices = record["devices"]
    assert isinstance(devices, dict)
    assert devices[uuid][0] == 21 * 1024**3
    output = project.command([sys.executable, "-m", "pytest_gpushare", "watch", "--once"]).out
    assert "leases 21.0 GB, 0 of 1 tests done" in output


HOLD = [sys.executable, "-m", "pytest_gpushare", "hold"]


def test_hold(start: Callable[..., Session], machine: Machine, project: Project) -> None:
    """A command has its VRAM, passes its exit code on, and a run beside it waits for the rest."""
    project.file("enough", "")
    script = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'] , flush=True); sys.exit(7)"
    result = project.command([*HOLD, "--vram", "8GB", "--", sys.executable, "-c", script])
    assert (result.code, result.out.strip()) == (7, machine.snapshot()[0].uuid)
    refused = project.command([*HOLD, "--vram", "23GB", "--", "true"])
    assert refused.code == 4
    assert "23.0 GB of VRAM is not available on GPU 0" in refused.err
    never = project.command([*HOLD, "--vram", "30GB", "--wait", "90", "--", "true"])
    assert never.err == "ERROR: 30.0 GB of VRAM is more than GPU 0 has: 24.0 GB\n"
    other = project.command([*HOLD, "--vram", "8GB", "--device", "3", "--", "true"])
    assert (other.code, other.err) == (4, "ERROR: no device 3: there is 0\n")
    assert project.command([*HOLD, "--vram", "8GB", "--", "/nowhere"]).code == 4
    assert project.command([*HOLD, "--vram", "much", "--", "true"]).code == 2


def test_hold_without_a_gpu(project: Project) -> None:
    """The reason for which there is none, as in the header of a run."""
    refused = project.command([*HOLD, "--vram", "8GB", "--", "true"])
    absence = "NVML library not found: is the NVIDIA driver installed?"
    assert refused.code == 4
    assert refused.err.startswith(f"ERROR: no device 0: {absence}")


def test_hold_follows_the_configuration_file(
    start: Callable[..., Session], machine: Machine, project: Project, tmp_path: Path
) -> None:
    """The ledger and the wait of the project in whose directory it is started."""
    ledger = tmp_path / "ledger"
    project.file("pytest.ini", f"[pytest]\ngpu_share_leases = {ledger}\ngpu_share_wait = 0.5\n")
    command = [*HOLD, "--vram", "20GB", "--", "sleep", "60"]
    with child_process(command, env=project.environment, cwd=project.path) as process:
        wait_for(lambda: len(list(ledger.glob(f"s-{process.pid}-*"))) == 1)
        refused = project.command([*HOLD, "--vram", "8GB", "--", "true"])
        assert refused.code == 4
        assert "8.0 GB of VRAM is not available on GPU 0 after " in refused.err
        assert f"pid {process.pid}, " in refused.err
        # The command that it runs ends with it.
        process.terminate()
    assert not leases_directory(project).exists()
    project.file("pytest.ini", "[pytest]\ngpu_share_leases = off\n")
    assert project.command([*HOLD, "--vram", "99GB", "--", "true"]).code == 0


def test_acquire_in_a_test_follows_its_run(project: Project, machine: Machine) -> None:
    """What goes beyond the slot is leased in the ledger of the run."""
    ledger = project.path / "ledger"
    project.write(
        test_project="""
            import pathlib
            from pytest_gpushare.leases import acquire

            def records():
                return len(list(pathlib.Path("ledger").glob("s-*")))

            def test_more():
                assert records() == 1
                with acquire("0", "2GB"):
                    assert records() == 1
                with acquire("0", "8GB") as lease:
                    assert lease.size == 8 * 2**30
                    assert records() == 2
                assert records() == 1
        """
    )
    result = project.pytest(
        "--gpu-share", "-n3", "-o", f"gpu_share_leases={ledger}",
        "-o", "gpu_share_preset=no-ollama", "-o", "gpu_share_max_workers_per_gpu=3",
        "-o", "gpu_share_safety_buffer_mb=4096",
        "-o", "gpu_share_min_vram_per_worker_gb=5",
    )  # fmt: skip
    assert result.passed == 1, result.out
    assert list(ledger.glob("s-*")) == []


def test_run_inside_hold(project: Project, machine: Machine) -> None:
    """It plans with the VRAM of the lease, and takes no second one."""
    inside = inner_command("--gpu-share", "-o", "gpu_share_preset=no-ollama", "-n1")
    result = project.command([*HOLD, "--vram", "8GB", "--", *inside])
    assert "1 GPU worker × 8.0 GB" in result.out
    assert result.code == 0


def test_lease_outlives_a_killed_hold(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """The command inherits the record: the VRAM is its own until it ends."""
    with child_process(
        [*HOLD, "--vram", "20GB", "--", "sleep", "60"], env=project.environment, cwd=project.path
    ) as process:
        wait_for(lambda: bool(records(project)))
        wait_for(lambda: bool(_children(process.pid)))
        (child,) = _children(process.pid)
        process.kill()
        process.wait(10)
        result = project.command([*HOLD, "--vram", "8GB", "--wait", "0", "--", "true"])
        assert result.code == 4
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: project.command([*HOLD, "--vram", "8GB", "--", "true"]).code == 0)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_run_without_leases_is_shown(
    start: Callable[..., Session], machine: Machine, project: Project, tmp_path: Path
) -> None:
    """With `gpu_share_leases = off` its record claims nothing, so nobody waits for it."""
    module = SLEEPER.replace("4GB", "1GB")
    off = start(module, "-o", "gpu_share_leases=off", "-o", "gpu_share_preset=no-ollama", "-n1")
    wait_for((tmp_path / "worktree1" / "sleeps").exists)
    wait_for(lambda: any(record["total"] for record in records(project)))
    (record,) = records(project)
    assert (record["pid"], record["devices"], record["ticket"]) == (off.process.pid, {}, 0)
    watched = project.command([sys.executable, "-m", "pytest_gpushare", "watch", "--once"]).out
    (line,) = re.findall(rf"session {off.process.pid} in .*", watched)
    assert "0 of 1 tests done" in line
    assert ", leases " not in line
    output = start(LARGE_TESTS, *NO_OLLAMA, "-n1").finish()
    assert passed(output) == 4
    assert "leased by" not in output
    assert "waiting for" not in output


SCALED = """
    from pytest_gpushare import waiting_line
    from pytest_gpushare.leases import lessee
    lessee.DEFAULT_WAIT, waiting_line.LOG_INTERVAL = 10.0, 2.0
"""

LONG = """
    import time
    import gpusim, pytest

    @pytest.mark.parametrize("i", range(4))
    def test_long(i):
        with gpusim.alloc("3GB"):
            time.sleep(4)
"""


def test_two_sessions_of_long_tests_with_every_default(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """In a time that goes 30 times as fast: the second waits longer than its limit of five
    minutes, as the first one gets on, with a line a minute, and loses nothing."""
    first = start(LONG, "-n1", conftest=SCALED)
    wait_for(lambda: any(map(_leases, records(project))))
    second = start(LONG.replace("range(4)", "range(1)"), conftest=SCALED)
    outputs = [first.finish(120), second.finish(120)]
    assert [passed(output) for output in outputs] == [4, 1], "\n".join(outputs)
    waits = re.findall(r"waiting for [\d.]+ GB of VRAM for a GPU worker, (\d+) s", outputs[1])
    assert int(waits[0]) == 0
    assert int(waits[-1]) > 10
    assert len(waits) >= 4
    assert "run at the same time" in outputs[1]
    assert all("CPU worker" not in output for output in outputs)


def test_several_sessions_and_a_killed_one(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Mixed presets, with and without needs; one is killed in the middle. Nobody loses a test."""
    killed = start(SLEEPER, "-o", "gpu_share_preset=no-ollama", "-n1")
    wait_for((killed.path.parent / "worktree1" / "sleeps").exists)
    sessions = [
        start(LARGE_TESTS, "-n2", "-o", "gpu_share_preset=no-ollama"),
        start(DECLARED, "-n2", "-o", "gpu_share_preset=no-ollama packed"),
        start(LARGE_TESTS, "-n1", "-o", "gpu_share_ollama_vram_reservation_mb=4096"),
    ]
    wait_for(lambda: sum(bool(record["ticket"]) for record in records(project)) == 3, 60)
    os.kill(killed.process.pid, signal.SIGKILL)
    outputs = [session.finish(120) for session in sessions]
    assert [passed(output) for output in outputs] == [4, 4, 4], "\n".join(outputs)
    assert all("CPU worker" not in output for output in outputs)


STARTS = """
    import pathlib, time
    import gpusim, pytest

    while not pathlib.Path("{go}").exists():
        time.sleep(0.02)

    # What a session gave back at its end would let the next two start at the same time.
    @pytest.mark.gpu(vram="2GB")
    def test_declared():
        order, until = pathlib.Path("{order}"), time.monotonic() + 60
        with order.open("a") as file:
            print(pathlib.Path.cwd().name, file=file)
        with gpusim.alloc("1GB"):
            while len(order.read_text().split()) < 6 and time.monotonic() < until:
                time.sleep(0.02)
"""


def test_first_tests_in_order_of_arrival(
    start: Callable[..., Session], machine: Machine, project: Project, tmp_path: Path
) -> None:
    """Also where there is room for several: each takes all of it until it knows its needs."""
    module = STARTS.format(go=tmp_path / "go", order=tmp_path / "order")
    options = ("-o", "gpu_share_preset=no-ollama packed", "-n1",
               "-o", "gpu_share_min_vram_per_worker_gb=2")  # fmt: skip
    sessions = []
    for number in range(1, 7):
        sessions.append(start(module, *options))
        wait_for(lambda number=number: len(records(project)) == number)
    (tmp_path / "go").touch()
    outputs = [session.finish() for session in sessions]
    assert [passed(output) for output in outputs] == [1] * 6, "\n".join(outputs)
    first = (tmp_path / "order").read_text().split()
    assert first == [f"worktree{number}" for number in range(1, 7)]
