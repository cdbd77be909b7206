"""What runs beside the tests: what fails is reported, and takes nothing else with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from pytest_gpushare.service import AtSigterm, Services


class Recorded:
    """A service that notes what is done with it, and may fail at that."""

    def __init__(self, name: str, done: list[str], fails: str = "") -> None:
        self._name, self._done, self._fails = name, done, fails

    def start(self) -> None:
        self._do("start")

    def stop(self) -> None:
        self._do("stop")

    def _do(self, what: str) -> None:
        self._done.append(f"{what} {self._name}")
        if what == self._fails:
            raise OSError("no more threads")


def test_one_that_cannot_start_is_left_out() -> None:
    done, problems = list[str](), list[str]()
    bad = AtSigterm(Recorded("b", done, fails="start"))
    services = Services([Recorded("a", done), bad, Recorded("c", done)], problems.append)
    services.start()
    assert problems == ["recorded could not start: no more threads"]
    assert not services.runs(bad)
    services.stop()
    services.stop()
    assert done == ["start a", "start b", "start c", "stop c", "stop a"]


def test_one_that_cannot_stop_holds_up_no_other() -> None:
    done, problems = list[str](), list[str]()
    services = Services([Recorded("a", done)], problems.append)
    services.start()
    services.add(Recorded("b", done, fails="stop"))
    services.stop()
    assert problems == ["recorded could not stop: no more threads"]
    assert done == ["start a", "start b", "stop b", "stop a"]


@pytest.fixture
def sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_signal_is_given_back(sigterm: None) -> None:
    """Also where two services wait for it, and only where nobody else does."""
    first, second = AtSigterm(Recorded("a", [])), AtSigterm(Recorded("b", []))
    first.start()
    first.start()
    second.start()
    second.stop()
    first.stop()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first.start()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    first.stop()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
