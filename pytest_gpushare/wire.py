"""The plugin's own channels between controller and workers: xdist's accept only its messages.

Messages are (kind, payload) with builtin types. Handlers run in the thread in which execnet
receives, so they must be quick and must not wait. All kinds, with the modules that send and
receive them, the main receiver first; a worker's requests to the dispatcher travel as xdist's
event `unscheduled`, so that they arrive in xdist's own thread and in order with its reports.

To the controller:

    kind           payload                         sent by                  received by
    -------------  ------------------------------  -----------------------  ------------------------
    collected      what the tests need, by index   worker/runner.py         dispatch/distribution.py
    here           PID                             worker/memory.py         session/run.py
                                                                            session/exclusive.py
    overwritten    text: what changed it           worker/plugin.py         session/run.py
    test           figures of a test that is over  worker/memory.py         session/run.py
                                                                            dispatch/distribution.py
    own            bytes that it holds by NVML     worker/memory.py         session/run.py
    kept           PIDs that wider fixtures keep   worker/memory.py         session/run.py
    ran-others     node id: it started processes   worker/memory.py         session/run.py
    ollama-answer  tokens and seconds              worker/ollama_fixture.py session/llm.py
    oom            test that ran out of memory     worker/oom_retry.py      session/exclusive.py
    quiet          answer to `pause`, bytes held   worker/oom_retry.py      session/exclusive.py
    alone-over     outcome of the second attempt   worker/oom_retry.py      session/exclusive.py

To the controller, as `unscheduled`:

    asked          test, `start` or `end`          worker/runner.py         dispatch/executor.py
    emptied        bytes by visible device         worker/runner.py         dispatch/executor.py
    raise          number, bytes, takes less       worker/runner.py         dispatch/executor.py
    returned       tests given back                worker/runner.py         dispatch/executor.py

To a worker:

    dispatch       none: the plugin dispatches     dispatch/executor.py     worker/runner.py
    run            tests, needs, refusals          dispatch/executor.py     worker/runner.py
    admit          test that waited, its need      dispatch/executor.py     worker/runner.py
    park           none: nothing follows for now   dispatch/executor.py     worker/runner.py
    empty          whether to tear down, too       dispatch/executor.py     worker/runner.py
    recall         none: give tests back           dispatch/executor.py     worker/runner.py
    raised         answer to `raise`               dispatch/executor.py     worker/runner.py
    pause          number: rest after this test    session/exclusive.py     worker/memory.py
    resume         number of the `pause`           session/exclusive.py     worker/memory.py
    alone          the device is its own, or not   session/exclusive.py     worker/oom_retry.py
    lease          path of the session's record    session/session_record.py      worker/plugin.py
    closed         none: the channel has ended     worker/plugin.py         worker/plugin.py
                                                                            worker/runner.py
                                                                            worker/memory.py
                                                                            worker/oom_retry.py
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

Handler = Callable[[str, Any], None]
"""Called with the worker's id and the payload."""

MOST_EARLY = 1000
"""Messages that are kept until somebody listens to their kind."""


class Links:
    """The controller's ends of the channels, by worker."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {}
        self._early: dict[str, list[tuple[str, Any]]] = {}
        self._ends: dict[str, Callable[[Any], object]] = {}
        self._lock = threading.Lock()

    def on(self, kind: str, handler: Handler) -> None:
        """Receive messages of this kind from every worker, also those that have already arrived."""
        with self._lock:
            self._handlers.setdefault(kind, []).append(handler)
            early = self._early.pop(kind, [])
        for worker, payload in early:
            _call(handler, worker, payload)

    def open(self, channel: Any, worker: str) -> Any:
        """Take the controller's end of a worker's channel; returns the channel."""
        channel.setcallback(partial(self.receive, worker))
        self.attach(worker, channel.send)
        return channel

    def attach(self, worker: str, send: Callable[[Any], object]) -> None:
        """Send a worker's messages here: in a run without workers, the process itself."""
        with self._lock:
            self._ends[worker] = send

    def close(self, worker: str) -> None:
        """Send nothing more to a worker that is gone."""
        with self._lock:
            self._ends.pop(worker, None)

    def send(self, worker: str, kind: str, payload: Any = None) -> bool:
        """Send a worker something; False where it is not there (any more)."""
        with self._lock:
            send = self._ends.get(worker)
        if send is None:
            return False
        try:
            send((kind, payload))
        except OSError:
            # Its process has died; xdist will say so.
            return False
        return True

    def receive(self, worker: str, message: Any) -> None:
        """Pass a message to its handler; malformed ones are dropped."""
        if not (isinstance(message, tuple) and len(message) == 2):
            return
        kind, payload = message
        with self._lock:
            handlers = list(self._handlers.get(kind, ()))
            # A worker may have collected before the controller has registered its handler.
            if not handlers and sum(map(len, self._early.values())) < MOST_EARLY:
                self._early.setdefault(kind, []).append((worker, payload))
        for handler in handlers:
            _call(handler, worker, payload)


def _call(handler: Handler, worker: str, payload: Any) -> None:
    # An error here would end execnet's receiver, and with it the worker.
    with contextlib.suppress(Exception):
        handler(worker, payload)


PLACEMENT = "gpushare_place"
"""The key of workerinput with the worker's place; unlike the environment, not inherited."""

CONTEXT = "gpushare_context"
"""The key of workeroutput with [name of the device, bytes of a CUDA context]."""

ITSELF = "this process"
"""The name of the worker where there are no workers."""


class Link:
    """This process's end of the private channel to its controller."""

    def __init__(self, send: Callable[[Any], object]) -> None:
        self._send = send
        self._handlers: dict[str, list[Callable[[Any], None]]] = {}

    def send(self, kind: str, payload: Any) -> None:
        """Send the controller something, in builtin types; one that is gone gets nothing."""
        with contextlib.suppress(OSError):
            self._send((kind, payload))

    def on(self, kind: str, handler: Callable[[Any], None]) -> None:
        """Receive messages of this kind; the handler runs in the thread that receives."""
        self._handlers.setdefault(kind, []).append(handler)

    def receive(self, message: Any) -> None:
        """Pass a message of the controller to its handler."""
        kind, payload = message
        for handler in self._handlers.get(kind, ()):
            # An error here would end execnet's receiver, and with it this worker.
            with contextlib.suppress(Exception):
                handler(payload)


_H = TypeVar("_H", bound=Hashable)

_MOST_TESTS = 10_000_000
"""Beyond that a message is not believed."""


def squeezed(values: Iterable[_H]) -> tuple[list[_H], list[int]]:
    """The different values, and runs of them: number of the value, length, and so on."""
    numbers: dict[_H, int] = {}
    runs: list[int] = []
    before = -1
    for value in values:
        number = numbers.setdefault(value, len(numbers))
        if number == before:
            runs[-1] += 1
        else:
            runs += (number, 1)
        before = number
    return list(numbers), runs


def spread(values: Sequence[_H], runs: Sequence[int]) -> list[_H]:
    """The values one by one, from what `squeezed` made of them."""
    if sum(runs[1::2]) > _MOST_TESTS:
        raise ValueError("too many tests")
    result: list[_H] = []
    for number, length in zip(runs[::2], runs[1::2], strict=True):
        result += [values[number]] * length
    return result
