"""A call with a time limit gives its value, its error, or nothing in time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pytest_gpushare import timed
from pytest_gpushare.timed import TimedCall, call_within

BUSY = "while True: pass"


def test_value_and_error() -> None:
    call = TimedCall(lambda: 3)
    assert call.wait(10)
    assert (call.value, call.result(), call.is_over) == (3, 3, True)

    def fail() -> int:
        raise ValueError("no")

    failing = TimedCall(fail)
    assert failing.wait(10)
    assert failing.value is None
    with pytest.raises(ValueError, match="no"):
        failing.result()


def test_a_call_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    call = TimedCall(lambda: release.wait(10))
    began = time.monotonic()
    assert not call.wait(0.05)
    assert 0.04 < time.monotonic() - began < 5
    with pytest.raises(TimeoutError):
        call.result()
    release.set()
    assert call.wait(10)
    assert call.result() is True


def test_time_without_a_cpu_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that runs something else instead, a call is not taken for one that hangs."""
    starved = [0.0]
    monkeypatch.setattr(timed, "_waited", lambda _: starved[0])
    release = threading.Event()
    call = TimedCall(lambda: release.wait(10))
    began = time.monotonic()
    assert not call.wait_until(began + 0.05)
    assert time.monotonic() - began < 5
    starved[0] = 8.0
    threading.Timer(0.3, release.set).start()
    assert call.wait_until(began + 0.1)
    assert call.result() is True


def test_time_without_a_cpu_is_known() -> None:
    own = threading.get_native_id()
    if not Path(f"/proc/self/task/{own}/schedstat").exists():
        pytest.skip("this system does not report it")
    assert timed._waited((own,)) >= 0
    until = time.monotonic() + 30
    before = timed._waited((own,))
    workers = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        while timed._waited((own,)) == before and time.monotonic() < until:
            sum(range(100_000))
        assert timed._waited((own,)) > before
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(10)


def test_call_within() -> None:
    assert call_within(10, lambda: "here") == "here"
    assert call_within(10, lambda: 1 // 0) is None
    release = threading.Event()
    assert call_within(0.02, lambda: release.wait(10)) is None
    release.set()
