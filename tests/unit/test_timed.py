"""A call with a time limit gives its value, its error, or nothing in time."""

from __future__ import annotations

import threading
import time

import pytest

from pytest_gpushare.timed import TimedCall, call_within


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


def test_call_within() -> None:
    assert call_within(10, lambda: "here") == "here"
    assert call_within(10, lambda: 1 // 0) is None
    release = threading.Event()
    assert call_within(0.02, lambda: release.wait(10)) is None
    release.set()
