"""Ollama's models loaded before the workers are counted, and kept loaded while the tests run.

The only part of the plugin that changes anything in Ollama, and only where the user asked for it.
It leaves the server as it was: nothing that somebody else loaded is evicted or reloaded, nothing
stays half on the CPU, and a model stays no longer than the server itself keeps it.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.gpu.sampler import Live, LiveVram
from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.catalog import blob_of
from pytest_gpushare.ollama.client import NonsenseError, StatusError, UnreachableError, connect
from pytest_gpushare.ollama.keep_alive import (
    ASK_LIMIT,
    SHORT,
    SHORTEST,
    PreloadedModel,
    ask,
    hanging_up,
    request,
    seconds_left,
)
from pytest_gpushare.ollama.models import (
    OLLAMA,
    LoadedModel,
    ModelFacts,
    OllamaFacts,
    described,
    full_name,
)
from pytest_gpushare.ollama.prediction import MARGIN, SHARE, KnownSizes
from pytest_gpushare.ollama.reservation import Source, need_of, server_of
from pytest_gpushare.ollama.spill import NO_GPU, uses_no_gpu
from pytest_gpushare.text import printable
from pytest_gpushare.timed import TimedCall
from pytest_gpushare.units import format_gb

LOAD_LIMIT = 600.0
"""Seconds that one model may take; a large one from a slow disk takes minutes."""

UNLOAD_LIMIT = 10.0
"""Seconds until a model that was unloaded must be gone; VRAM may come back late."""

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

    ours: tuple[PreloadedModel, ...] = ()
    events: tuple[str, ...] = ()
    """A sentence on each of them."""
    problems: tuple[Problem, ...] = ()


class VramFacts(NamedTuple):
    """What is known of VRAM while models are loaded."""

    needs: Mapping[str, int] = {}
    """Full name of a model -> bytes that its process will take with all of it on the GPU."""
    devices: int = 1
    """Devices that Ollama may choose from."""
    free: Callable[[], int | None] = lambda: None
    """Bytes that are free on the roomiest device; None where NVML does not report them."""
    pids: Callable[[], frozenset[int] | None] = lambda: None
    """Ollama's processes that hold VRAM; None where NVML does not show processes."""
    most_models: int | None = None
    """OLLAMA_MAX_LOADED_MODELS, where it is set; None: unknown."""
    used_by_others: Callable[[], Collection[str]] = frozenset
    """Full names of the models that other sessions of this host use now."""


def preload(
    names: Sequence[str],
    ollama: OllamaFacts,
    vram: VramFacts,
    progress: Callable[[str], object],
    loaded: list[PreloadedModel],
) -> Preloaded:
    """Load the models that are not loaded, one after another; what is loaded is left as it is.

    `progress` is called about five times a second while a model is being loaded. `loaded` grows
    with each model that was loaded, so that whoever interrupts this knows what to undo.
    """
    server = ollama.server
    if not ollama.answered or server is None:
        why = ollama.problem or "it was not asked"
        text = f"Ollama at {ollama.address} cannot load it: {why}"
        return Preloaded(problems=tuple(Problem(name, text) for name in names))
    loader = _ModelLoader(server, ollama, vram, progress, loaded)
    wanted: dict[str, str] = {}
    for name in names:
        wanted.setdefault(full_name(name), name)
    return loader.load(wanted)


class _ModelLoader:
    """Loads the models of one run."""

    def __init__(
        self,
        server: Address,
        ollama: OllamaFacts,
        vram: VramFacts,
        progress: Callable[[str], object],
        loaded: list[PreloadedModel],
    ) -> None:
        self._server, self._vram, self._progress = server, vram, progress
        self._facts = {full_name(model.name): model for model in ollama.relied_on}
        self._there = {full_name(model.name): model for model in ollama.models}
        self._blobs: dict[str, str] = {}
        self._ours = loaded
        self._events: list[str] = []
        self._problems: list[Problem] = []

    def load(self, wanted: Mapping[str, str]) -> Preloaded:
        """Load all of them; `wanted`: full name -> name as the user wrote it."""
        named = set(wanted)
        missing = [
            name
            for full, name in wanted.items()
            if full not in self._there and not self._facts_of(name).is_remote
        ]
        for number, name in enumerate(missing, 1):
            of = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
            same = self._same_file(self._facts_of(name))
            if same is not None:
                problem = self._difference(name, same)
            else:
                problem = self._obstacle(name, named) or self._load(name, of)
            if problem:
                self._problems.append(Problem(name, problem))
        self._look_again()
        return Preloaded(tuple(self._ours), tuple(self._events), tuple(self._problems))

    def _facts_of(self, name: str) -> ModelFacts:
        return self._facts.get(full_name(name), ModelFacts(name))

    def _obstacle(self, name: str, named: set[str]) -> str:
        """Why a model is not to be loaded; empty where nothing speaks against it."""
        facts = self._facts_of(name)
        if facts.is_missing:
            return facts.problem
        most, ours = self._vram.most_models, {full_name(each.model.name) for each in self._ours}
        strangers = [m.name for full, m in self._there.items() if full not in named | ours]
        if strangers and (most is None or len(self._there) >= most):
            return (
                f"{strangers[0]} is loaded, and loading another model might evict it: unload it "
                f"(ollama stop {strangers[0]}), name it in gpu_share_ollama_models too, or set "
                "OLLAMA_MAX_LOADED_MODELS for the tests as it is set for the server"
            )
        need, free = self._vram.needs.get(full_name(name)), self._vram.free()
        needed = 0 if need is None else self._free_needed(need)
        if free is not None and free < needed:
            return (
                f"it does not fit wholly on the GPU: it needs {format_gb(needed)} of free "
                f"VRAM, and {format_gb(free)} are free; it was not loaded"
            )
        return ""

    def _free_needed(self, need: int) -> int:
        """Bytes that must be free for a model: beside others Ollama takes 80 % of them."""
        least = need + MARGIN
        if self._there or self._vram.devices > 1:
            least = max(least, -(-need * SHARE[1] // SHARE[0]))
        return least

    def _difference(self, name: str, same: LoadedModel) -> str:
        """Why a model must not be loaded beside the one of the same file; empty where requests
        for it go to that one's process as it is."""
        context = self._facts_of(name).num_ctx
        if context and same.context and context != same.context:
            return (
                f"it has the file of {same.name}, which is loaded with {same.context} tokens of "
                f"context: loading it with its {context} would replace that one"
            )
        self._events.append(f"{name} has the file of {same.name}, which Ollama has loaded")
        return ""

    def _same_file(self, facts: ModelFacts) -> LoadedModel | None:
        """The loaded model that runs from the same file: it would be the same process."""
        for model in self._there.values():
            if facts.digest and model.digest == facts.digest:
                return model
        if not facts.blob:
            return None
        for name, model in self._there.items():
            if name not in self._blobs:
                known = self._facts.get(name)
                self._blobs[name] = known.blob if known and known.blob else self._blob(model.name)
            if self._blobs[name] == facts.blob:
                return model
        return None

    def _blob(self, name: str) -> str:
        try:
            with contextlib.closing(connect(self._server, lambda _: None)) as connection:
                return blob_of(connection, name, time.monotonic() + ASK_LIMIT)
        except (TimeoutError, UnreachableError, NonsenseError):
            return ""

    def _load(self, name: str, of: str) -> str:
        """Why it could not be loaded as a whole; empty where it was."""
        free, began = self._vram.free(), time.monotonic()
        before = self._vram.pids()
        try:
            own = self._loaded(name, of)
        except (TimeoutError, UnreachableError, NonsenseError) as error:
            room = _free_text(free) if getattr(error, "status", 500) >= 500 else ""
            return f"{_reason(error)}{room}"
        if own is None:
            return f"it was gone as soon as it was loaded{_free_text(free)}"
        model = own.model
        if model.is_spilled:
            return f"{_does_not_fit(model, free)}; {self._unload(model)}"
        after = self._vram.pids()
        new = after - before if before is not None and after is not None else frozenset()
        pid = next(iter(new)) if len(new) == 1 else None
        self._ours.append(own._replace(pid=pid))
        self._there[full_name(model.name)] = model
        seconds = time.monotonic() - began
        self._events.append(f"Ollama loaded {described(model)} before the tests ({seconds:.0f} s)")
        return ""

    def _loaded(self, name: str, of: str) -> PreloadedModel | None:
        """The model as Ollama lists it once it is loaded; None where it does not.

        First without a keep-alive, so that the server's own is seen; a server that unloads at
        once, or within seconds, is asked a second time to keep it for longer.
        """
        self._ask_to_load(name, None, of)
        model, now = self._find(name, ask(self._server)), time.time()
        own = 0.0 if model is None else seconds_left(model, now)
        if model is not None and own is not None and own > SHORTEST:
            return PreloadedModel(model, keep_alive=own)
        self._ask_to_load(name, SHORT, of)
        model = self._find(name, ask(self._server))
        if model is None:
            return None
        # What is in the past, by a clock that differs, says nothing.
        own = None if own is None or own < 0 else own
        return PreloadedModel(model, keep_alive=own, is_prolonged=True)

    def _ask_to_load(self, name: str, keep_alive: str | None, of: str) -> None:
        until = time.monotonic() + LOAD_LIMIT
        with hanging_up() as opened:
            call = TimedCall(
                lambda: request(self._server, name, keep_alive, until, opened), "preload"
            )
            while not call.wait(_TICK) and call.seconds <= LOAD_LIMIT:
                self._progress(f"Ollama loads {name} into VRAM, {call.seconds:.0f} s{of}")
            call.result()

    def _find(self, name: str, models: Sequence[LoadedModel]) -> LoadedModel | None:
        return next((m for m in models if full_name(m.name) == full_name(name)), None)

    def _unload(self, model: LoadedModel) -> str:
        """Unload a model that we loaded, and wait until it is gone; what became of it."""
        if full_name(model.name) in self._vram.used_by_others():
            return "another session uses it, so it was not unloaded"
        until = time.monotonic() + UNLOAD_LIMIT
        try:
            request(self._server, model.name, 0, until, lambda _: None)
            while self._find(model.name, ask(self._server)) is not None:
                if time.monotonic() > until:
                    return "it could not be unloaded again"
                time.sleep(0.05)
        except (TimeoutError, UnreachableError, NonsenseError):
            return "it could not be unloaded again"
        return "it was unloaded again"

    def _look_again(self) -> None:
        """Which models that were loaded are gone: loading one may have evicted another."""
        if not self._ours:
            return
        try:
            there = {full_name(model.name) for model in ask(self._server)}
        except (TimeoutError, UnreachableError, NonsenseError):
            return
        last = self._ours[-1].model.name
        for ours in list(self._ours):
            if full_name(ours.model.name) not in there:
                self._ours.remove(ours)
        for name, model in self._there.items():
            if name not in there:
                text = f"it was evicted when {last} was loaded: the server does not keep both"
                self._problems.append(Problem(model.name, text))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"it was not loaded within {LOAD_LIMIT:g} s"
    if isinstance(error, StatusError):
        words = _WORDS.get(error.status, "the server refuses")
        return f"{words} (status {error.status})"
    text = printable(str(error), 200)
    return text or "nothing listens there any more"


def _free_text(free: int | None) -> str:
    return "" if free is None else f"; {format_gb(free)} of VRAM were free"


def _does_not_fit(model: LoadedModel, free: int | None) -> str:
    if free is not None and uses_no_gpu(model, free):
        return f"Ollama put it into RAM, though {format_gb(free)} of VRAM were free: {NO_GPU}"
    return f"it does not fit wholly on the GPU: {described(model)}{_free_text(free)}"


def vram_of(
    settings: Settings,
    gpus: GpuFacts,
    ollama: OllamaFacts,
    live: LiveVram | None,
    environment: Mapping[str, str],
    sizes: KnownSizes,
) -> VramFacts:
    """What is known of VRAM before models are loaded; `live` reads the devices."""
    server = server_of(settings, gpus, ollama, sizes)
    needs = {}
    for model in ollama.relied_on:
        need = need_of(model, server, sizes)
        # A name alone says too little to forbid a load; the file has to fit in any case.
        needs[full_name(model.name)] = (
            model.file_bytes or 0 if need.source is Source.NAME else need.vram
        )
    most = environment.get("OLLAMA_MAX_LOADED_MODELS", "").strip()
    return VramFacts(
        needs,
        devices=max(1, len(gpus.all_devices)),
        free=_free(live),
        pids=ollama_pids(live),
        most_models=int(most) if re.fullmatch(r"[1-9][0-9]{0,3}", most) else None,
    )


def _free(live: LiveVram | None) -> Callable[[], int | None]:
    """A function that gives the most bytes free on one device; None where they are unknown."""
    if live is None:
        return lambda: None
    return lambda: max((m.free for m in live.memory(0.0).devices.values()), default=None)


def ollama_pids(live: Live | None) -> Callable[[], frozenset[int] | None]:
    """A function that gives Ollama's processes that hold VRAM; None where they are not shown."""

    def read() -> frozenset[int] | None:
        lists = list(live.processes(0.0).devices.values()) if live is not None else []
        if not lists or any(processes is None for processes in lists):
            return None
        return frozenset(p.pid for ps in lists for p in ps or () if p.neighbour == OLLAMA)

    return read


class ProgressLine:
    """A line of the terminal that is written over; a log, which would keep all, gets none."""

    def __init__(self) -> None:
        stream = sys.stderr
        self._stream = stream if stream is not None and stream.isatty() else None
        self._width = 0

    def show(self, text: str) -> None:
        """What is going on."""
        if self._stream is not None:
            line = f"gpu-share: {text}"
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._stream.flush()
            self._width = len(line)

    def clear(self) -> None:
        """Leave the line empty."""
        if self._stream is not None and self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._stream.flush()
