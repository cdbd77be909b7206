"""Ollama's models loaded before the workers are counted, and kept loaded while the tests run.

The only part of the plugin that changes anything in Ollama, and only where the user asked for it.
It leaves the server as it was: nothing that somebody else loaded is evicted or reloaded, nothing
stays half on the CPU, and a model stays no longer than the server itself keeps it.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.gpu.readings import Live, LiveVram
from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.catalog import blob_of
from pytest_gpushare.ollama.client import NonsenseError, StatusError, UnreachableError, connect
from pytest_gpushare.ollama.keep_alive import (
    ASK_LIMIT,
    PreloadedModel,
    ask,
    hanging_up,
    load_kept,
    request,
    unload,
)
from pytest_gpushare.ollama.models import (
    OLLAMA,
    LoadedModel,
    ModelFacts,
    OllamaFacts,
    described,
    full_name,
)
from pytest_gpushare.ollama.prediction import MARGIN, KnownSizes, free_needed
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
    largest: int | None = None
    """Bytes of the largest of them; None where NVML does not report it."""
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
        need, largest = self._vram.needs.get(full_name(name), 0), self._vram.largest
        if largest is not None and largest < need + MARGIN:
            which = "largest device" if self._vram.devices > 1 else "device"
            return (
                f"it does not fit wholly on the GPU: it needs {format_gb(need + MARGIN)} of free "
                f"VRAM, and the {which} has {format_gb(largest)}; it was not loaded"
            )
        most, ours = self._vram.most_models, {full_name(each.model.name) for each in self._ours}
        strangers = [m.name for full, m in self._there.items() if full not in named | ours]
        if strangers and (most is None or len(self._there) >= most):
            return (
                f"{strangers[0]} is loaded, and loading another model might evict it: unload it "
                f"(ollama stop {strangers[0]}), name it in gpu_share_ollama_models too, or set "
                "OLLAMA_MAX_LOADED_MODELS for the tests as it is set for the server"
            )
        free = self._vram.free()
        has_choice = bool(self._there) or self._vram.devices > 1
        needed = free_needed(need, has_choice=has_choice) if need else 0
        if free is not None and free < needed:
            return (
                f"it does not fit wholly on the GPU: it needs {format_gb(needed)} of free "
                f"VRAM, and {format_gb(free)} are free; it was not loaded"
            )
        return ""

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
        try:
            own = load_kept(
                lambda keep_alive: self._ask_to_load(name, keep_alive, of),
                lambda: self._find(name),
                self._vram.pids,
                {},
            )
        except (TimeoutError, UnreachableError, NonsenseError) as error:
            room = _free_text(free) if getattr(error, "status", 500) >= 500 else ""
            return f"{_reason(error)}{room}"
        if own is None:
            return f"it was gone as soon as it was loaded{_free_text(free)}"
        model = own.model
        if model.is_spilled:
            return f"{_does_not_fit(model, free)}; {self._unload(own)}"
        self._ours.append(own)
        self._there[full_name(model.name)] = model
        seconds = time.monotonic() - began
        self._events.append(f"Ollama loaded {described(model)} before the tests ({seconds:.0f} s)")
        return ""

    def _ask_to_load(self, name: str, keep_alive: str | None, of: str) -> None:
        until = time.monotonic() + LOAD_LIMIT
        with hanging_up() as opened:
            call = TimedCall(
                lambda: request(self._server, name, keep_alive, until, opened), "preload"
            )
            while not call.wait(_TICK) and call.seconds <= LOAD_LIMIT:
                self._progress(f"Ollama loads {name} into VRAM, {call.seconds:.0f} s{of}")
            call.result()

    def _find(self, name: str) -> LoadedModel | None:
        return next((m for m in ask(self._server) if full_name(m.name) == full_name(name)), None)

    def _unload(self, own: PreloadedModel) -> str:
        """Unload a model that we loaded; what became of it."""
        name = own.model.name
        if full_name(name) in self._vram.used_by_others():
            return "another session uses it, so it was not unloaded"
        if unload(self._server, own, UNLOAD_LIMIT, lambda: self._find(name) is not None):
            return "it was unloaded again"
        return "it could not be unloaded again"

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
        largest=max((device.total for device in gpus.all_devices), default=None),
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
