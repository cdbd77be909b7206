"""A test that ran out of memory beside others is run once more, alone on its device.

It happens inside the test's own protocol, before any report is made: the failed attempt's
function scope is torn down, the neighbours rest, and set-up and call run again. So there is one
set of reports, `-x`, `--lf` and junit XML see one outcome, fixtures of wider scopes live on, and
a worker that dies in the middle loses this one test, as in any run.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.attempt import end_function, error_of_unittest, excinfos, renew
from pytest_gpushare.run.caches import clear_frames, empty
from pytest_gpushare.run.caps import cap_of

if TYPE_CHECKING:
    from pytest_gpushare.run.torch_cap import TorchCap
    from pytest_gpushare.worker import Link

SECTION = "gpu-share"
"""The title of the report's section, and the name of junit's property, with an underscore."""

_ANSWER_WITHIN = 10.0
"""Seconds for the controller's first answer; it reads NVML for it, with a limit of its own."""


class Retry:
    """The plugin that watches set-up and call of each test of a GPU process."""

    def __init__(self, link: Link, cap: TorchCap, memory: Mapping[str, Any]) -> None:
        self._link = link
        self._cap = cap
        self._context = int(memory["context"])
        self._may_empty = memory["empty_caches"] != "never"
        self._answers: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._timer: Any = None
        """pytest-timeout's settings, while its timer runs for this test."""
        self.begin()
        link.on("alone", self._answers.put)
        link.on("closed", lambda _: self._answers.put({"verdict": "gone"}))

    def begin(self) -> None:
        """Before a test."""
        self.attempts = 1
        self.note = ""
        """What is said of a test that ran out of memory, for its report."""
        self._looked = self._inside = self._waits = self._ran_again = False
        self._phase = ""
        self._subtests = False
        self._why = ""

    def over(self, item: pytest.Item, outcome: str) -> None:
        """After a test: the neighbours may go on."""
        if self._waits:
            self._end(item, outcome)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Set up, and once more alone where that ran out of memory."""
        __tracebackhide__ = True
        if self._inside:
            return (yield)
        try:
            return (yield)
        except Exception as error:
            if not self._starts_again(item, error):
                raise
        self._run_again(item, "setup")
        return None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Call, and once more with a new set-up, alone, where that ran out of memory."""
        __tracebackhide__ = True
        if self._inside:
            return (yield)
        self._phase = "call"
        try:
            result = yield
        except Exception as error:
            self._phase = ""
            if not self._starts_again(item, error):
                raise
        else:
            self._phase = ""
            kept = error_of_unittest(item)
            if kept is None or not self._starts_again(item, kept):
                return result
            del kept, result
        self._run_again(item, "call")
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Say in the report what happened, and how long the attempt took that counts."""
        if self._phase:
            self._subtests = True
            return (yield)
        # A set-up that went well the second time says nothing yet: the call is to come.
        if not self._why or self.note or (call.when == "setup" and call.excinfo is None):
            return (yield)
        self.note = self._sentence(failed=call.excinfo is not None or bool(excinfos(item)))
        item.user_properties.append((SECTION.replace("-", "_"), self.note))
        report = yield
        report.sections.append((SECTION, self.note))
        return report

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, settings: Any) -> None:
        """pytest-timeout starts its timer; it does so anew for the second attempt."""
        self._timer = settings

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        """It stops its timer."""
        self._timer = None

    def _starts_again(self, item: pytest.Item, error: BaseException) -> bool:
        """Whether the test is to run once more; then the device is its own already."""
        # A forked child has no thread that hears the controller; of an xfail the error may be
        # what the test is about.
        if self._looked or os.getpid() != self._pid or item.get_closest_marker("xfail"):
            return False
        from pytest_gpushare.run.oom import ran_out

        said = ran_out(error)
        if not said:
            return False
        self._looked = True
        answer = self._ask(item, said)
        if answer is None:
            return False
        self._why = str(answer["text"])
        if answer["verdict"] != "wait":
            return False
        self._waits = True
        settings, began = self._stop_timer(item), time.monotonic()
        if not self._tear_down(item, error):
            self._end(item, "failed")
            return False
        granted = self._wait(float(answer["patience"]))
        if granted is None:
            self._why += (
                f"; not run again, as its neighbours were busy for {time.monotonic() - began:.0f} s"
            )
            self._end(item, "failed")
            return False
        self._cap.set(cap_of(int(granted["budget"]), self._context))
        if settings is not None:
            item.ihook.pytest_timeout_set_timer(item=item, settings=settings)
        self.attempts, self._ran_again = 2, True
        return True

    def _run_again(self, item: pytest.Item, when: str) -> None:
        __tracebackhide__ = True
        self._inside = True
        try:
            renew(item)
            item.ihook.pytest_runtest_setup(item=item)
            if when == "call":
                self._phase = "call"
                item.ihook.pytest_runtest_call(item=item)
        finally:
            self._inside, self._phase = False, ""

    def _ask(self, item: pytest.Item, said: str) -> Mapping[str, Any] | None:
        from pytest_gpushare.run.peaks import held

        while not self._answers.empty():
            self._answers.get()
        again = not self._subtests
        told = {"nodeid": item.nodeid, "said": said, "held": held(), "again": again}
        self._link.send("oom", told)
        return self._wait(_ANSWER_WITHIN)

    def _wait(self, seconds: float) -> Mapping[str, Any] | None:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        return None if answer.get("verdict") == "gone" else answer

    def _tear_down(self, item: pytest.Item, error: BaseException) -> bool:
        """End the first attempt's function scope, and give back all that can be given."""
        clear_frames(error)
        try:
            end_function(item)
        except Exception as second:
            self._why += f"; not run again, as its teardown failed: {type(second).__name__}"
            return False
        if self._may_empty:
            empty()
        return True

    def _stop_timer(self, item: pytest.Item) -> Any:
        settings = self._timer
        if settings is not None:
            item.ihook.pytest_timeout_cancel_timer(item=item)
        return settings

    def _end(self, item: pytest.Item, outcome: str) -> None:
        self._waits = False
        self._cap.set(None)
        told = {"nodeid": item.nodeid, "outcome": outcome, "ran": self._ran_again}
        self._link.send("alone-over", told)

    def _sentence(self, *, failed: bool) -> str:
        if not self._ran_again:
            return f"ran out of memory: {self._why}"
        again = "failed again alone" if failed else "passed alone"
        return f"ran out of memory under sharing, {again}: {self._why}"
