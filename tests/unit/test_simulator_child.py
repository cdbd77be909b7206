"""Child processes of the tests: interruptible, and gone at the end of their block."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from simulator.child import child_process, wait_for
from simulator.store import start_time

SLEEPS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print(child.pid, flush=True); time.sleep(60)",
]


@pytest.fixture
def ignored() -> Iterator[None]:
    """SIGINT is ignored, as in a background job of a shell without job control."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def test_interrupted_where_sigint_is_ignored(ignored: None) -> None:
    """The child gets a SIGINT like any process of a terminal; here it stays ignored."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with child_process(SLEEPS, **options) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert process.returncode == -signal.SIGINT


def test_killed_where_the_block_fails() -> None:
    """With its whole process group, if it has one of its own."""
    with (
        pytest.raises(ZeroDivisionError),
        child_process(PARENT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process,
    ):
        grandchild = int(process.stdout.readline())
        assert start_time(grandchild) is not None
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: start_time(grandchild) is None)


def test_killed_where_it_does_not_end() -> None:
    """It has so long after the block, and that is an error of the test."""
    with (
        pytest.raises(subprocess.TimeoutExpired),
        child_process(SLEEPS, limit=0.2, stdout=subprocess.DEVNULL) as process,
    ):
        pass
    assert process.returncode == -signal.SIGKILL
