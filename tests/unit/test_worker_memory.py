"""What a GPU worker says of tests that ran other processes, which no framework counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.worker import counters, memory
from pytest_gpushare.worker.memory import Meter, reaped
from pytest_gpushare.worker.oom_retry import Retry, StartBarrier

MB = 2**20


class Run:
    """A worker whose tests are functions; what it sends is in `sent`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.calls = 0
        self.framework: dict[str, Any] = {}
        """What stands in `sys.modules`: nothing, or torch."""
        monkeypatch.setattr(counters, "may_count", lambda: bool(self.framework))
        monkeypatch.setattr(counters, "counts", self._counts)
        monkeypatch.setattr(memory, "reaped", self._reaped)
        # What other tests of this process have started is not this worker's.
        before = memory.own_children()
        children = memory.own_children
        monkeypatch.setattr(memory, "own_children", lambda: children() - before)
        link: Any = SimpleNamespace(send=lambda kind, payload: self.sent.append((kind, payload)))
        nothing: Any = SimpleNamespace(
            begin=lambda: None, over=lambda *_: None, prepare=lambda: None, set=lambda _: None,
            size=None, attempts=1, note="",
        )  # fmt: skip
        settings = {"context": 0, "empty_caches": "never"}
        barrier = StartBarrier(lambda *_: None, lambda: None)
        self.meter = Meter(link, barrier, nothing, nothing, settings, nothing)

    def _counts(self, **_: bool) -> Mapping[Any, Any] | None:
        held = counters.Count(MB, MB, MB, MB)
        return {("torch", 0): held} if self.framework else None

    def _reaped(self) -> object:
        self.calls += 1
        return reaped()

    def test(self, *command: str) -> None:
        """Run a test, which runs this command."""
        item: Any = SimpleNamespace(nodeid="t", stash=pytest.Stash())
        protocol = self.meter.pytest_runtest_protocol(item)
        next(protocol)
        if command:
            subprocess.run(command, check=True, timeout=60)
        with pytest.raises(StopIteration):
            protocol.send(None)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.sent]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say what was reaped")
def test_of_processes_that_tests_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that earlier tests ran are the worker's, too, but not those of a test that counts."""
    run = Run(monkeypatch)
    run.test(sys.executable, "-c", "")
    assert run.sent == []
    run.framework["torch"] = None
    run.test()
    assert run.kinds == ["ran-others", "test"]
    assert run.sent[-1][1]["exact"]
    run.test(sys.executable, "-c", "")
    assert run.kinds == ["ran-others", "test", "test"]
    assert not run.sent[-1][1]["exact"]


def test_of_tests_beside_which_no_framework_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They spare the system calls, but for the first one."""
    run = Run(monkeypatch)
    for _ in range(3):
        run.test()
    assert (run.calls, run.sent) == (1, [])


def test_wrappers_are_few() -> None:
    """Each costs every test several microseconds: none is round what is made for each phase."""
    plugins = pytest.PytestPluginManager()
    link: Any = SimpleNamespace(on=lambda *_: None)
    nothing: Any = None
    settings = {"context": 0, "empty_caches": "never"}
    retry = Retry(link, nothing, settings, nothing)
    ours = retry, Meter(link, nothing, retry, nothing, settings, nothing)
    for plugin in ours:
        plugins.register(plugin)
    wrappers = [
        found.function.__name__
        for plugin in ours
        for caller in plugins.get_hookcallers(plugin) or ()
        for found in caller.get_hookimpls()
        if found.plugin is plugin and (found.hookwrapper or found.wrapper)
    ]
    assert sorted(wrappers) == [
        "pytest_fixture_setup",
        "pytest_runtest_call",
        "pytest_runtest_protocol",
        "pytest_runtest_setup",
    ]
