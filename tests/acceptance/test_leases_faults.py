"""A ledger that fails, or in which somebody planted something: one line, no hang, no lost test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from acceptance.conftest import Project
from acceptance.sessions import (
    LARGE_TESTS,
    SLEEPER,
    Session,
    leases_directory,
    passed,
    records,
    start,
    wait_for,
)
from simulator import Machine
from simulator.child import child_process

from pytest_gpushare.leases import locks
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord, to_bytes

__all__ = ["start"]

NO_OLLAMA = ("-o", "gpu_share_preset=no-ollama")
PACKED = ("-o", "gpu_share_preset=no-ollama packed", "-n1")

IN_GATE = """
import os, sys, time
from pathlib import Path
from pytest_gpushare.leases.ledger import Ledger
with Ledger(Path(sys.argv[1])).gate():
    print("held", flush=True)
    time.sleep(120)
"""

LASTS = """
    import pathlib, time
    import gpusim, pytest

    @pytest.mark.gpu(vram="5GB")
    def test_lasts():
        with gpusim.alloc("2GB"):
            pathlib.Path("sleeps").write_text("")
            time.sleep(600)
"""

MANY = """
    import pathlib, time
    import gpusim, pytest

    @pytest.mark.parametrize("i", range(12))
    @pytest.mark.gpu(vram="5GB")
    def test_declared(i):
        pathlib.Path("began").write_text("")
        with gpusim.alloc("4GB"):
            time.sleep(0.3)
"""


@pytest.fixture
def stopped_in_gate(project: Project) -> Iterator[Callable[[], None]]:
    """Have a process stop (SIGSTOP) while it holds the gate."""
    with ExitStack() as stack:

        def stop() -> None:
            command = [sys.executable, "-c", IN_GATE, str(leases_directory(project))]
            process = stack.enter_context(child_process(command, stdout=subprocess.PIPE))
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            os.kill(process.pid, signal.SIGSTOP)
            stack.callback(process.kill)

        yield stop


def test_process_stopped_inside_the_gate(
    start: Callable[..., Session], machine: Machine, stopped_in_gate: Callable[[], None]
) -> None:
    """Whoever starts goes on without a lease, with a warning."""
    stopped_in_gate()
    output = start(LARGE_TESTS, *NO_OLLAMA, "-n1").finish()
    assert passed(output) == 4, output
    assert output.count("no VRAM is leased: ") == 1
    assert "was held by another process for 2 s" in output.replace("\n", " ")


def test_process_stopped_inside_the_gate_during_a_run(
    start: Callable[..., Session],
    machine: Machine,
    project: Project,
    stopped_in_gate: Callable[[], None],
) -> None:
    """A session keeps its lease, does not grow, and loses no test."""
    first = start(LASTS, *PACKED)
    wait_for((first.path.parent / "worktree1" / "sleeps").exists)
    second = start(MANY, *PACKED, "--gpu-share-report=report.json")
    place = second.path.parent / "worktree2"
    wait_for((place / "began").exists)
    stopped_in_gate()
    assert wait_for(lambda: second.process.poll() is not None, 120) < 30
    output = second.finish()
    assert passed(output) == 12, output
    report = json.loads((place / "report.json").read_text())
    (event,) = [event for event in report["events"] if event["kind"] == "leases-unknown"]
    assert "the leases of other sessions are not known: " in event["text"]
    assert "was held by another process for 2 s" in event["text"]
    (lease,) = {lease["session"] for lease in report["samples"]["leases"]}
    assert lease.startswith(f"pid {first.process.pid}, ")


def stop_outside_the_gate(pid: int, gate: Path) -> None:
    """Stop a process at a moment at which it does not hold the gate."""
    descriptor = os.open(gate, os.O_RDONLY)
    try:
        for _ in range(100):
            os.kill(pid, signal.SIGSTOP)
            if locks.lock_within(0.2, descriptor):
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.03)
        pytest.fail("it holds the gate all the time")
    finally:
        os.close(descriptor)


def test_waiter_that_is_stopped(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """The next one gets the VRAM within 6 s of its return."""
    holder = start(SLEEPER, *NO_OLLAMA, "-n1")
    wait_for((holder.path.parent / "worktree1" / "sleeps").exists)
    stopped = start(SLEEPER, *NO_OLLAMA, "-n1")
    wait_for(lambda: any(record["ticket"] for record in records(project)))
    stop_outside_the_gate(stopped.process.pid, leases_directory(project) / "gate")
    last = start(LARGE_TESTS, *NO_OLLAMA, "-n1")
    wait_for(lambda: sum(bool(record["ticket"]) for record in records(project)) == 2)
    os.kill(holder.process.pid, signal.SIGKILL)
    pid = last.process.pid
    assert (
        wait_for(lambda: any(r["pid"] == pid and not r["ticket"] for r in records(project)), 60) < 7
    )
    assert passed(last.finish()) == 4


@pytest.fixture
def planted(project: Project) -> Iterator[Path]:
    """Records that are locked, so alive, and that nobody can understand."""
    directory = leases_directory(project)
    directory.mkdir(mode=0o777)
    contents = {
        "s-1-random.json": os.urandom(4096),
        "s-2-short.json": b'{"v":1,"pid":77,"devi',
        "s-3-newer.json": b'{"v":9}',
        "s-4-empty.json": b"",
    }
    held = []
    for name, content in contents.items():
        (directory / name).write_bytes(content)
        held.append(os.open(directory / name, os.O_RDONLY))
        assert locks.try_shared(held[-1])
    (directory / "s-5-link.json").symlink_to("/etc/passwd")
    os.mkfifo(directory / "s-6-fifo.json")
    (directory / "s-7-directory.json").mkdir()
    yield directory
    for descriptor in held:
        os.close(descriptor)


def test_records_that_nobody_understands(
    start: Callable[..., Session], machine: Machine, planted: Path
) -> None:
    """A line for each that is alive; links, FIFOs and directories are none."""
    output = start(LARGE_TESTS, *NO_OLLAMA, "-n1").finish()
    assert passed(output) == 4, output
    text = " ".join(output.split())
    for name in ("s-1-random", "s-2-short", "s-4-empty"):
        assert text.count(f"session record {name}.json cannot be read (it is damaged)") == 1
    assert text.count("s-3-newer.json cannot be read (a newer version of pytest-gpushare") == 1
    assert "s-5" not in text
    assert "s-6" not in text
    assert "s-7" not in text


def test_claim_of_more_than_is_left(
    start: Callable[..., Session], machine: Machine, project: Project
) -> None:
    """Whoever claims it is named by the owner of the file, which nobody can forge."""
    uuid = machine.snapshot()[0].uuid
    record = LeaseRecord(1, "elsewhere", "/srv/a", "nobody", devices={uuid: DeviceLease(24 << 30)})
    path = leases_directory(project) / "s-1-claim.json"
    path.parent.mkdir(mode=0o777)
    path.write_bytes(to_bytes(record))
    descriptor = os.open(path, os.O_RDONLY)
    assert locks.try_shared(descriptor)
    output = start("def test_it():\n    pass\n", *NO_OLLAMA, "-n1", "--gpu-share-wait=0").finish()
    os.close(descriptor)
    assert passed(output) == 1, output
    text = " ".join(output.split())
    assert f"GPU 0: uid {os.getuid()} claims 24.0 GB of VRAM, more than is left there" in text


@pytest.mark.parametrize("what", ["files", "directory"])
def test_cleaned_in_the_middle(
    start: Callable[..., Session], machine: Machine, project: Project, what: str
) -> None:
    """Who cleans /tmp ends no test; a record that was removed is published again."""
    first = start(LASTS, *PACKED)
    wait_for((first.path.parent / "worktree1" / "sleeps").exists)
    session = start(MANY, *PACKED)
    wait_for((session.path.parent / "worktree2" / "began").exists)
    if what == "files":
        for path in leases_directory(project).iterdir():
            path.unlink()
        wait_for(lambda: len(records(project)) == 2)
    else:
        shutil.rmtree(leases_directory(project))
    output = session.finish()
    assert passed(output) == 12, output
