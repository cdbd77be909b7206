"""How long the server keeps the models that this run loaded, and the requests that change it."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.catalog import loaded_models
from pytest_gpushare.ollama.client import (
    Connection,
    NonsenseError,
    StatusError,
    UnreachableError,
    connect,
)
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.timed import TimedCall

ASK_LIMIT = 5.0
"""Seconds for a question."""

SHORT = "10m"
"""Keep-alive of a model that the server itself would unload at once."""

SHORTEST = 15.0
"""Seconds; a server that keeps models for less gets a keep-alive of ours while the run lives."""

LOOK_EVERY = 60.0
"""Seconds between looks at how long the server keeps our models."""

RESTORE_LIMIT = 3.0
"""Seconds that the end of the run waits for it."""

_TICK = 0.05
_NOTHING_YET = 5.0
"""Seconds until it is seen that a model was loaded; no more than `SHORTEST` / 3."""
_DEFAULT = "5m"
_FOREVER = 365 * 86400.0


class PreloadedModel(NamedTuple):
    """A model that this run loaded."""

    model: LoadedModel
    """As it was right after."""
    pid: int | None = None
    """Its process; None where NVML does not show it."""
    keep_alive: float | None = None
    """Seconds for which the server itself keeps it; infinite where it never unloads it, 0 where
    it unloads at once. None where that is unknown."""
    is_prolonged: bool = False
    """Whether it was loaded with a keep-alive of ours, since the server's own is too short."""
    options: Mapping[str, int] = {}
    """Those of its load: a request without them would load it again."""


def request(
    server: Address,
    name: str,
    keep_alive: str | int | None,
    deadline: float,
    opened: Callable[[Connection], object],
    options: Mapping[str, int] | None = None,
) -> None:
    """Load a model, or keep a loaded one for so long; nothing is generated.

    None: for as long as the server itself keeps it. 0 unloads it. Raises `TimeoutError`,
    `UnreachableError` or `NonsenseError`.
    """
    body: dict[str, object] = {"model": name}
    if keep_alive is not None:
        body["keep_alive"] = keep_alive
    if options:
        body["options"] = dict(options)
    try:
        _post(server, "/api/generate", {**body, "stream": False}, deadline, opened)
    except StatusError as error:
        if error.status != 400:
            raise
        # Models that only embed cannot generate; they are loaded by embedding nothing.
        _post(server, "/api/embed", {**body, "input": ""}, deadline, opened)


def ask(
    server: Address,
    deadline: float | None = None,
    opened: Callable[[Connection], object] = lambda _: None,
) -> tuple[LoadedModel, ...]:
    """What is loaded now. Raises as `request` does."""
    with contextlib.closing(connect(server, opened)) as connection:
        return loaded_models(connection, deadline or time.monotonic() + ASK_LIMIT).models


def _post(
    server: Address,
    path: str,
    body: dict[str, object],
    deadline: float,
    opened: Callable[[Connection], object],
) -> None:
    with contextlib.closing(connect(server, opened)) as connection:
        connection.post(path, json.dumps(body).encode(), deadline)


@contextlib.contextmanager
def hanging_up() -> Iterator[Callable[[Connection], None]]:
    """Hang up the connections that were opened, also at Ctrl-C: that ends a load."""
    connections: list[Connection] = []
    try:
        yield connections.append
    finally:
        for connection in connections:
            connection.hang_up()


def seconds_left(model: LoadedModel, now: float) -> float | None:
    """Seconds until the server unloads a model; None where it does not say, and negative while a
    request runs. `now` is a Unix time."""
    match = re.fullmatch(
        r"(\d{4,6}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", model.expires_at
    )
    if match is None:
        return None
    if len(match[1]) > 19:
        return float("inf")
    try:
        zone = "+00:00" if match[3] == "Z" else match[3]
        at = datetime.fromisoformat(f"{match[1]}{zone}").astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
    left = at.timestamp() + float(match[2] or 0) - now
    return float("inf") if left > _FOREVER else left


def load_kept(
    load: Callable[[str | None], object],
    find: Callable[[], LoadedModel | None],
    pids: Callable[[], frozenset[int] | None],
    options: Mapping[str, int],
) -> PreloadedModel | None:
    """Have a model loaded; None where it is gone at once.

    `load` sends the request with a keep-alive, `find` reads the model as it is listed. First
    without a keep-alive, so that the server's own is seen; a server that unloads at once, or
    within seconds, is asked a second time to keep it for longer.
    """
    before = pids()
    load(None)
    model, now = find(), time.time()
    own = 0.0 if model is None else seconds_left(model, now)
    is_prolonged = own is None or own <= SHORTEST
    if is_prolonged:
        load(SHORT)
        model = find()
    if model is None:
        return None
    after = pids()
    new = after - before if before is not None and after is not None else frozenset()
    return PreloadedModel(
        model,
        pid=next(iter(new)) if len(new) == 1 else None,
        # What is in the past, by a clock that differs, says nothing.
        keep_alive=None if own is None or own < 0 else own,
        is_prolonged=is_prolonged,
        options=options,
    )


def unload(
    server: Address,
    model: PreloadedModel,
    limit: float,
    is_there: Callable[[], bool],
    is_over: Callable[[], bool] = lambda: False,
) -> bool:
    """Unload a model that this run loaded; whether it is gone within so many seconds."""
    until = time.monotonic() + limit
    try:
        with hanging_up() as opened:
            request(server, model.model.name, 0, until, opened, model.options)
        while is_there():
            if time.monotonic() > until or is_over():
                return False
            time.sleep(_TICK)
    except (TimeoutError, UnreachableError, NonsenseError):
        return False
    return True


class KeepAlive:
    """The service that keeps the models that this run loaded from running out.

    A renewal is a request, and a request without options reloads a model that was loaded with
    some. So it is sent only for a model that would run out before the next look, and that is
    still the one that was loaded: digest, context, size and process. It asks for no more than
    the server's own keep-alive, so that nothing stays longer when the run ends, however it ends.
    """

    def __init__(
        self,
        server: Address,
        ours: list[PreloadedModel],
        pids: Callable[[], frozenset[int] | None] = lambda: None,
        every: float = LOOK_EVERY,
    ) -> None:
        """`ours` may grow meanwhile. `pids` are Ollama's processes that hold VRAM, `every` the
        seconds between looks."""
        self._server, self.pids, self._every = server, pids, every
        self._kept = ours
        self._expected: dict[str, float] = {}
        """Name -> the Unix time at which it runs out, as it was seen after our last request."""
        self.given_up: list[str] = []
        """A sentence on each model that is not kept any more."""
        self.used_by_others: Callable[[], Collection[str]] = frozenset
        """The models that other sessions use now: their keep-alive is left as it is."""
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._has_begun = self._is_restored = False

    def start(self) -> None:
        """Look from now on; harmless when called twice."""
        if not self._has_begun:
            self._has_begun = True
            threading.Thread(target=self._watch, name="gpu-share-keep", daemon=True).start()

    def stop(self) -> None:
        """Restore a keep-alive that is not the server's own; harmless when called twice."""
        self._stop.set()
        with self._lock:
            if self._is_restored:
                return
            self._is_restored = True
        prolonged = [each for each in self._kept if each.is_prolonged]
        if prolonged:
            used = self.used_by_others()
            prolonged = [each for each in prolonged if each.model.name not in used]
        if not prolonged:
            return
        until = time.monotonic() + RESTORE_LIMIT
        with hanging_up() as opened:
            TimedCall(lambda: self._restore(prolonged, until, opened), "restore").wait(
                RESTORE_LIMIT
            )

    def give_up(self) -> None:
        """Neither keep the models nor restore anything: they are unloaded."""
        self._stop.set()
        with self._lock:
            self._is_restored = True

    def _watch(self) -> None:
        while not self._stop.wait(every := self._pause()):
            # A server that is gone, or busy, is asked again at the next look.
            with contextlib.suppress(TimeoutError, UnreachableError, NonsenseError):
                if self._kept:
                    self._look(every, lambda _: None)

    def _pause(self) -> float:
        """Seconds until the next look."""
        if not self._kept:
            return min(_NOTHING_YET, self._every)
        own = [each.keep_alive or 0 for each in list(self._kept) if not each.is_prolonged]
        return max(1.0, min(self._every, min(own, default=3 * self._every) / 3))

    def _look(self, every: float, opened: Callable[[Connection], object]) -> None:
        until = time.monotonic() + ASK_LIMIT
        there = {model.name: model for model in ask(self._server, until, opened)}
        for ours in list(self._kept):
            now = there.get(ours.model.name)
            why = self._not_ours(ours, now)
            if why:
                self._kept.remove(ours)
                self.given_up.append(f"{ours.model.name} was not kept loaded any more: {why}")
                continue
            assert now is not None
            left = seconds_left(now, time.time())
            # In the past while a request runs: the end of that request renews it.
            if left is not None and 0 <= left < 2 * every and not self._stop.is_set():
                self._renew(ours, opened)

    def _not_ours(self, ours: PreloadedModel, now: LoadedModel | None) -> str:
        """Why a model is not to be touched any more; empty where it is as we loaded it."""
        before = ours.model
        if now is None:
            return "it was unloaded"
        if (now.digest, now.context, now.size) != (before.digest, before.context, before.size):
            return "another client loaded it with other settings"
        pids = self.pids()
        if ours.pid is not None and pids is not None:
            return "" if ours.pid in pids else "another client reloaded it"
        # Without processes to compare, somebody's request may have reloaded it unseen.
        left, expected = seconds_left(now, time.time()), self._expected.get(before.name)
        if expected is None:
            first = seconds_left(before, time.time())
            expected = None if first is None else time.time() + first
        if left is None or expected is None or left == expected == float("inf"):
            return ""
        if abs(time.time() + left - expected) > 2.0:
            return "another client used it, and whether it was reloaded cannot be seen here"
        return ""

    def _renew(self, ours: PreloadedModel, opened: Callable[[Connection], object]) -> None:
        keep_alive = SHORT if ours.is_prolonged else _duration(ours.keep_alive)
        deadline = time.monotonic() + 60.0
        request(self._server, ours.model.name, keep_alive, deadline, opened, ours.options)
        for model in ask(self._server, None, opened):
            left = seconds_left(model, time.time())
            if model.name == ours.model.name and left is not None:
                self._expected[model.name] = time.time() + left

    def _restore(
        self,
        prolonged: Sequence[PreloadedModel],
        until: float,
        opened: Callable[[Connection], object],
    ) -> None:
        with contextlib.suppress(TimeoutError, UnreachableError, NonsenseError):
            there = {model.name: model for model in ask(self._server, until, opened)}
            for ours in prolonged:
                if not self._not_ours(ours, there.get(ours.model.name)):
                    own = _duration(ours.keep_alive)
                    request(self._server, ours.model.name, own, until, opened, ours.options)


def _duration(seconds: float | None) -> str | int:
    """A keep-alive as the server reads it; Ollama's default where it is unknown."""
    if seconds is None:
        return _DEFAULT
    return f"{round(seconds)}s" if round(seconds) else 0
