"""Models of Ollama's that are loaded for tests while a run goes on, unloaded again, or pulled."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.ollama.client import NonsenseError, StatusError, UnreachableError, connect
from pytest_gpushare.ollama.keep_alive import (
    PreloadedModel,
    ask,
    hanging_up,
    load_kept,
    request,
    unload,
)
from pytest_gpushare.text import printable
from pytest_gpushare.timed import TimedCall

if TYPE_CHECKING:
    from pytest_gpushare.ollama.address import Address
    from pytest_gpushare.ollama.models import LoadedModel
    from pytest_gpushare.ollama.run_models import RunModel

UNLOAD_LIMIT = 30.0
"""Seconds until a model that was unloaded must be gone, its VRAM included."""

_TICK = 0.05
_RETRY = 0.5
"""Seconds between two tries while the server is busy."""
_MOST_PULL = 64 * 1024 * 1024
"""Bytes of progress that a server may send while it pulls."""


class ModelLoadError(Exception):
    """A model cannot be loaded; the text has the server's own words."""


class ReadyModel(NamedTuple):
    """A model that its tests can use now."""

    model: LoadedModel
    own: PreloadedModel | None = None
    """What this session loaded; None where it was loaded already."""
    seconds: float = 0.0


class Loader:
    """Loads and unloads models of one server; for one thread."""

    def __init__(
        self,
        server: Address,
        pids: Callable[[], frozenset[int] | None],
        is_over: Callable[[], bool],
    ) -> None:
        """`pids` are Ollama's processes that hold VRAM; `is_over` ends what is under way."""
        self._server, self._pids, self._is_over = server, pids, is_over

    def there(self, wanted: RunModel) -> LoadedModel | None:
        """The model as it is loaded now; None where it is not, or nobody says."""
        with contextlib.suppress(TimeoutError, UnreachableError, NonsenseError):
            return self._find(wanted)
        return None

    def load(self, wanted: RunModel, limit: float) -> ReadyModel:
        """Have a model loaded with its options, within so many seconds. Raises `ModelLoadError`.

        A model that is there gets no request.
        """
        found = self.there(wanted)
        if found is not None:
            return ReadyModel(found)
        began = time.monotonic()
        until = began + limit
        try:
            own = load_kept(
                lambda keep_alive: self._ask_to_load(wanted, keep_alive, until),
                lambda: self._find(wanted),
                self._pids,
                wanted.options,
            )
        except (TimeoutError, UnreachableError, NonsenseError) as error:
            raise ModelLoadError(_reason(error, limit)) from None
        if own is None:
            raise ModelLoadError("it was gone as soon as it was loaded")
        return ReadyModel(own.model, own, time.monotonic() - began)

    def unload(self, own: PreloadedModel) -> bool:
        """Unload what this session loaded, and wait until it is gone, its process too."""
        return unload(self._server, own, UNLOAD_LIMIT, lambda: self._is_there(own), self._is_over)

    def _is_there(self, own: PreloadedModel) -> bool:
        if any(model.name == own.model.name for model in ask(self._server)):
            return True
        pids = self._pids()
        return own.pid is not None and pids is not None and own.pid in pids

    def pull(self, name: str, limit: float, progress: Callable[[str, int | None], object]) -> None:
        """Pull a model within so many seconds. Raises `ModelLoadError`.

        `progress` is called with the server's words and per cent, where it reports them.
        """
        until = time.monotonic() + limit
        body = json.dumps({"model": name, "stream": True}).encode()

        def receive(line: bytes) -> None:
            status, share, problem = _progress_of(line)
            if problem:
                raise ModelLoadError(problem)
            progress(status, share)

        def pull(opened: Callable[..., object]) -> None:
            with contextlib.closing(connect(self._server, opened)) as connection:
                connection.post_lines("/api/pull", body, until, receive, _MOST_PULL)

        with hanging_up() as opened:
            call = TimedCall(lambda: pull(opened), "pull")
            try:
                self._wait(call, until)
            except ModelLoadError as error:
                raise ModelLoadError(f"it cannot be pulled: {error}") from None
            except (TimeoutError, UnreachableError, NonsenseError) as error:
                raise ModelLoadError(f"it cannot be pulled: {_reason(error, limit)}") from None

    def _find(self, wanted: RunModel) -> LoadedModel | None:
        return next((model for model in ask(self._server) if wanted.is_same(model)), None)

    def _ask_to_load(self, wanted: RunModel, keep_alive: str | None, until: float) -> None:
        """Repeats the request while the server is busy with loads of others."""
        while True:
            with hanging_up() as opened:
                ask_for = partial(request, self._server, wanted.name, keep_alive, until, opened)
                call = TimedCall(partial(ask_for, wanted.options), "load")
                try:
                    self._wait(call, until)
                    return
                except StatusError as error:
                    if error.status != 503 or time.monotonic() + _RETRY > until:
                        raise
            time.sleep(_RETRY)

    def _wait(self, call: TimedCall[None], until: float) -> None:
        while not call.wait(_TICK):
            if time.monotonic() > until or self._is_over():
                raise TimeoutError
        call.result()


def _progress_of(line: bytes) -> tuple[str, int | None, str]:
    """(words, per cent, problem) of a line that the server sends while it pulls."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "", None, ""
    if not isinstance(value, dict):
        return "", None, ""
    problem = value.get("error")
    if isinstance(problem, str):
        return "", None, printable(problem, 300)
    status, total, done = value.get("status"), value.get("total"), value.get("completed")
    words = printable(status, 80) if isinstance(status, str) else ""
    if type(total) is int and type(done) is int and 0 <= done <= total and total:
        return words, done * 100 // total, ""
    return words, None, ""


def _reason(error: Exception, limit: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {limit:g} s"
    if isinstance(error, StatusError):
        return error.words or f"status {error.status}"
    return printable(str(error), 200) or "nothing listens there any more"
