"""Ollama's models loaded before the workers are counted, so that they have their place first.

The only part of the plugin that changes anything in Ollama, and only where the user asked for it.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pytest_gpushare.ollama.messages import placed
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts, full_name
from pytest_gpushare.ollama.prediction import MARGIN, OVERHEAD
from pytest_gpushare.text import printable
from pytest_gpushare.units import format_gb

LOAD_LIMIT = 600.0
"""Seconds that one model may take; a large one from a slow disk takes minutes."""

KEEP_ALIVE = "1h"
"""For how long Ollama keeps what we loaded, should this process die; else it is renewed."""

ASK_LIMIT = 5.0
"""Seconds for any other question."""

_TICK = 0.2
_WORDS = {
    400: "it cannot be loaded",
    403: "the server refuses",
    404: "the server has no such model: ollama pull it",
    500: "the server failed to load it",
    503: "the server is busy",
}


class Problem(NamedTuple):
    """A model that could not be loaded as a whole."""

    model: str
    text: str


class Preloaded(NamedTuple):
    """What became of the models."""

    ours: tuple[LoadedModel, ...] = ()
    """Those that we loaded, as they were right after."""
    told: tuple[str, ...] = ()
    """A sentence on each of them."""
    problems: tuple[Problem, ...] = ()


def preload(
    names: Sequence[str],
    ollama: OllamaFacts,
    free: Callable[[], int | None],
    progress: Callable[[str], object],
    loaded: list[LoadedModel],
) -> Preloaded:
    """Load the models that are not loaded, one after another; what is loaded is left as it is.

    `free` tells the bytes of free VRAM on the roomiest device, `progress` is called about
    five times a second while a model is being loaded. `loaded` grows with each model that was
    loaded, so that whoever interrupts this knows what to undo.
    """
    server = ollama.server
    if not ollama.answered or server is None:
        why = ollama.problem or "it was not asked"
        text = f"Ollama at {ollama.address} cannot load it: {why}"
        return Preloaded(problems=tuple(Problem(name, text) for name in names))
    remote = {full_name(model.name) for model in ollama.relied_on if model.is_remote}
    there = {full_name(model.name) for model in ollama.models}
    wanted: dict[str, str] = {}
    for name in names:
        wanted.setdefault(full_name(name), name)
    missing = [name for full, name in wanted.items() if full not in there | remote]
    told: list[str] = []
    problems: list[Problem] = []
    for number, name in enumerate(missing, 1):
        of = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
        before, began = free(), time.monotonic()
        try:
            model = _load(server, name, of, progress)
        except (TimeoutError, UnreachableError, NonsenseError) as error:
            room = _room(before) if getattr(error, "status", 500) >= 500 else ""
            problems.append(Problem(name, f"{_reason(error)}{room}"))
            continue
        if model is None:
            problems.append(Problem(name, f"it was gone as soon as it was loaded{_room(before)}"))
            continue
        loaded.append(model)
        seconds = time.monotonic() - began
        told.append(f"Ollama loaded {placed(model)} before the tests ({seconds:.0f} s)")
        if model.is_spilled:
            problems.append(Problem(name, _does_not_fit(model, before)))
    return Preloaded(tuple(loaded), tuple(told), tuple(problems))


def _load(
    server: Address, name: str, of: str, progress: Callable[[str], object]
) -> LoadedModel | None:
    """The model as Ollama lists it once it is loaded; None where it does not."""
    until = time.monotonic() + LOAD_LIMIT
    with _hanging_up() as opened:
        call = _Call(lambda: set_keep_alive(server, name, KEEP_ALIVE, until, opened))
        while not call.wait(_TICK):
            progress(f"Ollama loads {name} into VRAM, {call.seconds:.0f} s{of}")
        call.result()
    return next((m for m in ask(server) if full_name(m.name) == full_name(name)), None)


def set_keep_alive(
    server: Address,
    name: str,
    keep_alive: str | int,
    deadline: float,
    opened: Callable[[Connection], object],
) -> None:
    """Keep a model for so long, and load it if it is not loaded; nothing is generated.

    Raises `TimeoutError`, `UnreachableError` or `NonsenseError`.
    """
    body: dict[str, object] = {"model": name, "keep_alive": keep_alive}
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
    """What is loaded now. Raises as `set_keep_alive` does."""
    connection = connect(server, opened)
    with contextlib.closing(connection):
        return loaded_models(connection, deadline or time.monotonic() + ASK_LIMIT).models


def _post(
    server: Address,
    path: str,
    body: dict[str, object],
    deadline: float,
    opened: Callable[[Connection], object],
) -> None:
    connection = connect(server, opened)
    with contextlib.closing(connection):
        connection.post(path, json.dumps(body).encode(), deadline)


class _Call:
    """A call in a daemon thread, so that Ctrl-C is heard while it lasts."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._error: Exception | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="gpu-share-preload", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """For how long it has been under way."""
        return time.monotonic() - self._began

    def wait(self, seconds: float) -> bool:
        """Whether it is over, or took too long; waits for so many seconds at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive() or self.seconds > LOAD_LIMIT

    def result(self) -> None:
        """Raises what it raised, or `TimeoutError`."""
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error = error


@contextlib.contextmanager
def _hanging_up() -> Iterator[Callable[[Connection], None]]:
    """Hang up the connections that were opened, also at Ctrl-C: that ends a load."""
    connections: list[Connection] = []
    try:
        yield connections.append
    finally:
        for connection in connections:
            connection.hang_up()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"it was not loaded within {LOAD_LIMIT:g} s"
    if isinstance(error, StatusError):
        words = _WORDS.get(error.status, "the server refuses")
        return f"{words} (status {error.status})"
    text = printable(str(error), 200)
    return text or "nothing listens there any more"


def _room(free: int | None) -> str:
    return "" if free is None else f"; {format_gb(free)} of VRAM were free"


def _does_not_fit(model: LoadedModel, free: int | None) -> str:
    needs = format_gb(model.size + OVERHEAD + MARGIN)
    return f"it does not fit: {placed(model)}; it needs {needs}{_room(free)}"


RENEW = 1800.0
"""Seconds between renewals, half of what Ollama is told."""

RESTORE_LIMIT = 3.0
"""Seconds that the end of the run waits for it."""

_USUAL = "5m"
"""What Ollama takes where its OLLAMA_KEEP_ALIVE is not set."""


class KeptLoaded:
    """The service that renews the keep-alive of our models, and gives it back at the end."""

    def __init__(
        self, server: Address, ours: Sequence[LoadedModel], usual: str | int = _USUAL
    ) -> None:
        """`usual` is the keep-alive that they get back."""
        self._server, self._ours, self._usual = server, list(ours), usual
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._is_restored = False

    def start(self) -> None:
        """Renew from now on."""
        threading.Thread(target=self._renew, name="gpu-share-keep", daemon=True).start()

    def stop(self) -> None:
        """Give the keep-alive back; harmless when called twice."""
        self._stop.set()
        with self._lock:
            if self._is_restored:
                return
            self._is_restored = True
        until = time.monotonic() + RESTORE_LIMIT
        connections: list[Connection] = []
        thread = threading.Thread(
            target=self._tell,
            args=(self._usual, until, connections.append),
            name="gpu-share-restore",
            daemon=True,
        )
        thread.start()
        thread.join(RESTORE_LIMIT)
        for connection in connections if thread.is_alive() else ():
            connection.hang_up()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW):
            self._tell(KEEP_ALIVE, time.monotonic() + 60.0, lambda _: None)

    def _tell(
        self, keep_alive: str | int, until: float, opened: Callable[[Connection], object]
    ) -> None:
        # A server that is gone, or busy, keeps nothing that could be put right.
        with contextlib.suppress(Exception):
            there = {model.name: model for model in ask(self._server, until, opened)}
            for ours in self._ours:
                # One that somebody sent away, or loaded with other options, is theirs now: a
                # request of ours would load it once more.
                if _is_same(there.get(ours.name), ours):
                    set_keep_alive(self._server, ours.name, keep_alive, until, opened)


def usual_keep_alive(environment: Mapping[str, str]) -> str | int:
    """OLLAMA_KEEP_ALIVE, where it is set here as it should be for the server; else 5 minutes."""
    text = environment.get("OLLAMA_KEEP_ALIVE", "").strip().strip("\"'")
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return int(text)
    if re.fullmatch(r"-?([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|µs|ms|s|m|h))+", text):
        return text
    return _USUAL


def _is_same(now: LoadedModel | None, ours: LoadedModel) -> bool:
    if now is None:
        return False
    return (now.digest, now.context, now.size) == (ours.digest, ours.context, ours.size)
