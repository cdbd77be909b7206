"""A test that ran out of memory beside others is run once more, alone on its device.

It happens inside the test's own protocol, before any report is made: the failed attempt's
function scope is torn down, the neighbours rest, and set-up and call run again. So there is one
set of reports, `-x`, `--lf` and junit XML see one outcome, fixtures of wider scopes live on, and
a worker that dies in the middle loses this one test, as in any run.
"""

from __future__ import annotations

import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat.pytest_items import end_function, error_of_unittest, excinfos, renew
from pytest_gpushare.leases import most_for_test
from pytest_gpushare.planning.caps import cap_of
from pytest_gpushare.worker.counters import clear_frames, empty, errors_of, held

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from pluggy import Result

    from pytest_gpushare.wire import Link
    from pytest_gpushare.worker.framework_caps import TorchCap


_TYPES = {
    # torch >= 2.5; before, torch.cuda.OutOfMemoryError lay in torch.cuda.
    ("torch", "OutOfMemoryError"),
    ("cupy", "OutOfMemoryError"),
    ("tensorflow", "ResourceExhaustedError"),
    ("pycuda", "MemoryError"),
}
"""(first part of the module, name) of errors that mean it whatever they say."""

_WORDS = re.compile(
    r"""
    CUDA_ERROR_OUT_OF_MEMORY | cudaErrorMemoryAllocation | hipErrorOutOfMemory
    | CUBLAS_STATUS_ALLOC_FAILED | CUDNN_STATUS_ALLOC_FAILED | CUSOLVER_STATUS_ALLOC_FAILED
    | CUFFT_ALLOC_FAILED | CUSPARSE_STATUS_ALLOC_FAILED | HIPBLAS_STATUS_ALLOC_FAILED
    | \b(?:CUDA|HIP)\ (?:error:\ )?out\ of\ memory\b
    | \bRESOURCE_EXHAUSTED:\ .{0,200}?(?:out\ of\ memory|failed\ to\ allocate|allocating)
    | \bRMM\ failure\b | \bout_of_memory:\s
    | \bOOM\ when\ allocating\ tensor\b
    | \bcuMem(?:Alloc|Create)\w*\ failed:\ out\ of\ memory
    | \bCUDA\ failure\ 2:\ out\ of\ memory | \bStatus:\ out\ of\ memory
    | \bFree\ memory\ on\ device\ .{0,80}on\ startup\ is\ less\ than\ desired
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""What drivers, libraries and frameworks write, and people hardly do."""

_OWN_WORDS = (AssertionError, LookupError, TypeError, AttributeError, NameError, Warning)
"""Errors whose text is the test's own, or that of its mistake."""

_OWN_NAMES = {"AssertionError", "Failed", "KeyError", "IndexError", "TypeError", "AttributeError"}

_RAISED = re.compile(
    r"^(?:E\s{1,3})?(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exhausted\w*|OutOfMemory\w*))"
    r":\ (?P<said>.*)",
)
_MOST_TEXT = 200_000


def ran_out(error: BaseException | None) -> str:
    """What the failure says, on one line, if it ran out of memory on a GPU; else empty.

    The error itself, what it was raised from or while handling, and the members of a group are
    looked at; the texts of tracebacks that other processes sent are read.
    """
    for each in errors_of(error):
        if _means_it(each):
            return _one_line(f"{type(each).__qualname__}: {_text(each)}")
    return ""


def ran_out_by_text(text: str) -> str:
    """The same of a failure's report, where only its text is there; else empty.

    Only lines count that name what was raised, the first of each block that pytest marks.
    """
    for kind, said in _raised(text[-_MOST_TEXT:]):
        module, _, name = kind.rpartition(".")
        if name in _OWN_NAMES:
            continue
        if (module.partition(".")[0], name) in _TYPES or _WORDS.search(said):
            return _one_line(f"{name}: {said}")
    return ""


def _means_it(error: BaseException) -> bool:
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if names & _TYPES:
        return True
    if not isinstance(error, Exception) or isinstance(error, _OWN_WORDS):
        # pytest.fail and pytest.skip raise no Exception: their words are the test's own.
        return False
    text = _text(error)
    if "Traceback (most recent call last)" in text:
        # What a child process failed with, such as torch.multiprocessing's.
        return bool(ran_out_by_text(text))
    return _WORDS.search(text) is not None and not _is_plain(error)


def _is_plain(error: BaseException) -> bool:
    """Whether it is an error of Python's own kind that says so in a quotation of somebody else."""
    return type(error) in (ValueError, OSError) and not _WORDS.match(_text(error).lstrip())


def _raised(text: str) -> Iterator[tuple[str, str]]:
    marked = False
    for line in text.splitlines():
        first_of_block = not (marked and line.startswith("E "))
        marked = line.startswith("E ")
        if first_of_block and (match := _RAISED.match(line)):
            yield match["type"], match["said"]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MOST_TEXT]
    except Exception:
        return ""


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:199]}…"


class StartBarrier:
    """Keeps the next test back while another worker has the device to itself.

    The main thread enters before a test and leaves after it; requests come in the thread that
    receives. Whatever is done at rest is done with the lock held, so no test starts meanwhile.
    """

    def __init__(
        self, send: Callable[[str, Any], object], give_back: Callable[[], int | None]
    ) -> None:
        self._send = send
        self._give_back = give_back
        """Empties caches; returns the bytes that are held still, None where unknown."""
        self._changed = threading.Condition()
        self._running = False
        self._pause: int | None = None
        """The number of the request to rest; None: tests may run."""

    def enter(self) -> None:
        """Before a test: wait while the device is another's."""
        with self._changed:
            while self._pause is not None:
                self._changed.wait()
            self._running = True

    def leave(self) -> None:
        """After a test: obey what was asked for meanwhile."""
        with self._changed:
            self._running = False
            if self._pause is not None:
                self._rest()

    def pause(self, number: int) -> None:
        """Rest from the end of the running test on, and say so under this number."""
        with self._changed:
            self._pause = number
            if not self._running:
                self._rest()

    def resume(self, number: int) -> None:
        """Go on, if the request to rest was this one."""
        with self._changed:
            if self._pause == number:
                self.open()

    def open(self, _payload: object = None) -> None:
        """Never wait again: the controller is gone, and pauses no worker any more."""
        with self._changed:
            self._pause = None
            self._changed.notify_all()

    def _rest(self) -> None:
        self._send("quiet", {"number": self._pause, "held": self._give_back()})


SECTION = "gpu-share"
"""The title of the report's section, and the name of junit's property, with an underscore."""

_ANSWER_WITHIN = 10.0
"""Seconds for the controller's first answer; it reads NVML for it, with a limit of its own."""


class _DeferredError:
    """Raises, in the one teardown of a test, what tearing down its first attempt raised."""

    def __init__(self, error: Exception, plugins: pytest.PytestPluginManager) -> None:
        self._error = error
        self._plugins = plugins

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """Raise it behind the teardown of what is wider."""
        __tracebackhide__ = True
        self._plugins.unregister(self)
        try:
            yield
        except Exception as wider:
            raise BaseExceptionGroup("errors during test teardown", [wider, self._error]) from None
        raise self._error


class _Explanations:
    """The plugin that adds to the report of a test that it ran out of memory, and how its second
    attempt ended; registered when the first one does."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add a section, and a property for junit."""
        note = self._retry.explanation(item, call)
        if note:
            item.user_properties.append((SECTION.replace("-", "_"), note))
        report = yield
        if note:
            report.sections.append((SECTION, note))
        return report


class Retry:
    """The plugin that watches set-up and call of each test of a GPU process."""

    def __init__(
        self, link: Link, cap: TorchCap, memory: Mapping[str, Any], look: Callable[..., object]
    ) -> None:
        """`look` is `OwnVram.look`."""
        self._link = link
        self._cap = cap
        self._look = look
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
        self._was_asked = self._inside = self._waits = self._ran_again = False
        self._is_calling = False
        self._subtests = False
        self._why = ""

    def over(self, item: pytest.Item, outcome: str) -> None:
        """After a test: the neighbours may go on."""
        if self._waits:
            self._end(item, outcome)

    # Old-style wrappers: an error in pytest's own code would be shown without its traceback if it
    # passed through a frame of ours.

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Result[Any], None]:
        """Set up, and once more alone where that ran out of memory."""
        outcome = yield
        error = outcome.exception
        if self._inside or error is None:
            return
        if isinstance(error, Exception) and self._starts_again(item, error):
            del error
            self._run_again(item, "setup", outcome)
        if outcome.exception is not None:
            self._look(item.nodeid)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Result[Any], None]:
        """Call, and once more with a new set-up, alone, where that ran out of memory."""
        if self._inside:
            yield
            return
        self._is_calling = True
        outcome = yield
        self._is_calling = False
        error = error_of_unittest(item) if outcome.exception is None else outcome.exception
        if isinstance(error, Exception) and self._starts_again(item, error):
            del error
            self._run_again(item, "call", outcome)
        # Its teardown is about to give back what it holds.
        self._look(item.nodeid)

    def reports(self) -> None:
        """A report is about to be made; one that is made during the call is of a subtest."""
        if self._is_calling:
            self._subtests = True

    def explanation(self, item: pytest.Item, call: pytest.CallInfo[None]) -> str:
        """What the report that is about to be made says of a lack of memory; mostly nothing."""
        # A set-up that went well the second time says nothing yet: the call is to come.
        if (
            self._is_calling
            or not self._why
            or self.note
            or (call.when == "setup" and call.excinfo is None)
        ):
            return ""
        self.note = self._sentence(failed=call.excinfo is not None or bool(excinfos(item)))
        return self.note

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, settings: Any) -> None:
        """pytest-timeout starts its timer; once more for the second attempt."""
        self._timer = settings

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        """It stops its timer."""
        self._timer = None

    def _starts_again(self, item: pytest.Item, error: BaseException) -> bool:
        """Whether the test is to run once more; then the device is its own already."""
        # A forked child has no thread that receives from the controller; the error may be what an
        # xfail is about.
        if self._was_asked or os.getpid() != self._pid or item.get_closest_marker("xfail"):
            return False

        said = ran_out(error)
        if not said:
            return False
        self._was_asked = True
        self._look(item.nodeid, urgent=True)
        answer = self._ask(item, said)
        if answer is None:
            return False
        self._why = str(answer["text"])
        plugins = item.config.pluginmanager
        if not plugins.has_plugin("gpu-share-explanations"):
            # Most runs have nothing to explain, and its hook is called for each phase.
            plugins.register(_Explanations(self), "gpu-share-explanations")
        if answer["verdict"] != "wait":
            return False
        self._waits = True
        settings, began = self._timer, time.monotonic()
        if settings is not None:
            item.ihook.pytest_timeout_cancel_timer(item=item)
        # Its fixtures are kept until it is sure that it runs again: its teardown comes but once.
        clear_frames(error)
        if self._may_empty:
            empty()
        granted = self._wait(float(answer["patience"]))
        if granted is None:
            waited = time.monotonic() - began
            self._why += f"; not run again, as its neighbours were busy for {waited:.0f} s"
        if settings is not None:
            item.ihook.pytest_timeout_set_timer(item=item, settings=settings)
        if granted is None or not self._tear_down(item):
            self._end(item, "failed")
            return False
        self._cap.set(cap_of(most_for_test(int(granted["budget"])), self._context))
        self.attempts, self._ran_again = 2, True
        return True

    def _run_again(self, item: pytest.Item, when: str, outcome: Result[Any]) -> None:
        __tracebackhide__ = True
        # It holds the first attempt's error.
        outcome.force_result(None)
        self._inside = True
        try:
            renew(item)
            item.ihook.pytest_runtest_setup(item=item)
            if when == "call":
                self._is_calling = True
                item.ihook.pytest_runtest_call(item=item)
        except BaseException as error:
            outcome.force_exception(error)
        finally:
            self._inside = self._is_calling = False

    def _ask(self, item: pytest.Item, said: str) -> Mapping[str, Any] | None:
        while not self._answers.empty():
            self._answers.get()
        again = not self._subtests
        message = {"nodeid": item.nodeid, "said": said, "held": held(), "again": again}
        self._link.send("oom", message)
        return self._wait(_ANSWER_WITHIN)

    def _wait(self, seconds: float) -> Mapping[str, Any] | None:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        return None if answer.get("verdict") == "gone" else answer

    def _tear_down(self, item: pytest.Item) -> bool:
        """End the first attempt's function scope, and give back all that can be given."""
        try:
            end_function(item)
        except Exception as second:
            # The user's own error: the report of the teardown has it.
            plugins = item.config.pluginmanager
            plugins.register(_DeferredError(second, plugins), "gpu-share-kept-error")
            self._why += f"; not run again, as its teardown failed: {type(second).__name__}"
            return False
        try:
            # The hooks of others go in pairs. What comes next is this test.
            item.ihook.pytest_runtest_teardown(item=item, nextitem=item)
        except Exception as second:
            self._why += f"; the first teardown failed: {type(second).__name__}"
        if self._may_empty:
            empty()
        return True

    def _end(self, item: pytest.Item, outcome: str) -> None:
        self._waits = False
        self._cap.set(None)
        message = {"nodeid": item.nodeid, "outcome": outcome, "ran": self._ran_again}
        self._link.send("alone-over", message)

    def _sentence(self, *, failed: bool) -> str:
        if not self._ran_again:
            return f"ran out of memory: {self._why}"
        again = "failed again alone" if failed else "passed alone"
        return f"ran out of memory under sharing, {again}: {self._why}"
