"""Loading and unloading: which models are in VRAM, and until when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..hardware import OutOfMemoryError
from ..machine import Machine
from ..sizes import to_bytes
from ..visibility import visible_devices
from .durations import moment, seconds
from .models import Model
from .placement import Placement, Room, forced, place_alone, place_beside
from .runner import Processes
from .settings import Settings

NUMBERS = ("num_gpu", "num_batch", "num_thread", "main_gpu", "draft_num_predict")
RELOADING = (*NUMBERS, "use_mmap", "shift")
"""Options beside the context for which a loaded model is loaded anew; without them a model that
was loaded with some is, too, but for `num_gpu`. `shift` is a field of the request, true where
it is not set."""


Key = tuple[int, tuple[tuple[str, Any], ...]]
"""Context in tokens, and other options that count."""


def _serves(loaded: Key, wanted: Key) -> bool:
    """Whether a model that is loaded so can serve a request as it is."""
    have, want = dict(loaded[1]), dict(wanted[1])
    if "num_gpu" not in want:
        have.pop("num_gpu", None)
    return loaded[0] == wanted[0] and have == want


class LoadError(RuntimeError):
    """A model could not be loaded; HTTP status 500."""


class BusyError(RuntimeError):
    """Too many requests wait for a load; HTTP status 503."""


class LoadAbortedError(LoadError):
    """The client went away while its model was being loaded."""


@dataclass
class Loaded:
    """A model that is loaded. `key` is what a request must match to use it as it is."""

    model: Model
    key: Key
    need: int
    placement: Placement
    pid: int
    keep_alive: float
    busy: int = 1
    deadline: float = 0.0  # time.monotonic() when it expires, once idle
    expires_at: str = field(default_factory=lambda: moment(time.time_ns()))
    places: threading.Semaphore = field(default_factory=threading.Semaphore)
    """For prompts that are answered at once; more wait."""

    @property
    def size(self) -> int:
        """Bytes in all, as the server reports them: with the embeddings once a part is on the
        CPU."""
        whole = self.placement.vram >= self.need
        return self.need if whole else self.need + to_bytes(self.model.embeddings)


class Scheduler:
    """Loads models one at a time, as Ollama does, and expires them."""

    def __init__(self, machine: Machine | None, processes: Processes, settings: Settings) -> None:
        self.settings = settings
        self._machine = machine
        self._processes = processes
        self._loading = threading.Lock()
        self._changed = threading.Condition()
        self._loaded: dict[str, Loaded] = {}
        self.loads: list[str] = []
        """Every load so far, by full name."""
        self.spills: list[str] = []
        """Those loads that left a part of the model on the CPU."""
        self.most_at_once: dict[str, int] = {}
        """Full name -> requests that used the model at once, at most."""
        self._pending = 0
        self._port = 40000
        self._closed = False
        self._expirer = threading.Thread(target=self._expire, name="ollama-expire", daemon=True)
        self._expirer.start()

    def loaded(self) -> list[Loaded]:
        """Return the loaded models, the first to expire last, as /api/ps does."""
        with self._changed:
            for entry in list(self._loaded.values()):
                if not self._processes.is_alive(entry.pid):
                    del self._loaded[entry.model.blob]
            return sorted(self._loaded.values(), key=lambda entry: -entry.deadline)

    def acquire(
        self,
        model: Model,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        keep_alive: float | None = None,
        aborted: Callable[[], bool] = lambda: False,
    ) -> Loaded:
        """Return the model, loaded so; it stays until `release`. Others may have to leave."""
        wanted = int(options.get("num_ctx", 0)) or model.num_ctx or self.settings.context_length
        wanted = wanted or self._context_by_vram()
        # What of a request's options makes a loaded model another one, as measured.
        others = {k: options[k] for k in RELOADING if options.get(k) is not None}
        if others.get("num_gpu", -1) == -1:
            others.pop("num_gpu", None)
        if others.get("shift", True):
            others.pop("shift", None)
        key = (min(wanted, model.trained_context), tuple(sorted(others.items())))
        found = self._use(model, key, keep_alive)
        if found is not None:
            return found
        with self._changed:
            if self._pending >= self.settings.max_queue:
                raise BusyError("server busy, please try again.  maximum pending requests exceeded")
            self._pending += 1
        try:
            with self._loading:
                found = self._use(model, key, keep_alive)
                if found is not None:
                    return found
                with self._changed:
                    entry = self._loaded.get(model.blob)
                    while entry is not None and entry.busy:
                        self._changed.wait(1.0)
                if keep_alive is None:
                    keep_alive = seconds(self.settings.keep_alive)
                if entry is None:
                    return self._load(model, key, keep_alive, aborted)
                # A reload that takes no time leaves no moment in which nothing is listed.
                with nullcontext() if self.settings.load_delay else self._changed:
                    self.unload(model)
                    return self._load(model, key, keep_alive, aborted)
        finally:
            with self._changed:
                self._pending -= 1

    def _use(self, model: Model, key: Any, keep_alive: float | None) -> Loaded | None:
        """The model as it is loaded, busy with one more request; None where it is not so."""
        self.loaded()
        with self._changed:
            entry = self._loaded.get(model.blob)
            if entry is None or not _serves(entry.key, key):
                return None
            entry.busy += 1
            self._count(entry)
            entry.keep_alive = entry.keep_alive if keep_alive is None else keep_alive
            return entry

    def release(self, entry: Loaded) -> None:
        """End a request; the keep-alive starts anew."""
        with self._changed:
            entry.busy -= 1
            entry.deadline = time.monotonic() + entry.keep_alive
            entry.expires_at = moment(time.time_ns(), entry.keep_alive)
            self._changed.notify_all()
        if entry.keep_alive == 0 and not entry.busy:
            self.unload(entry.model)

    def unload(self, model: Model) -> None:
        """Drop a model from the list and end its runner."""
        with self._changed:
            entry = self._loaded.pop(model.blob, None)
            self._changed.notify_all()
        if entry is None:
            return
        if self.settings.unload_delay:
            stop = threading.Timer(self.settings.unload_delay, self._processes.stop, [entry.pid])
            stop.daemon = True
            stop.start()
        else:
            self._processes.stop(entry.pid)

    def close(self) -> None:
        """Stop expiring; the runners end with their processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._expirer.join(60)

    # --- inside ---

    def _rooms(self) -> list[Room]:
        if self._machine is None:
            return []
        devices = self._machine.snapshot()
        environ = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        if self.settings.visible is not None:
            environ["CUDA_VISIBLE_DEVICES"] = self.settings.visible
        visible = visible_devices(devices, environ)
        own = to_bytes(self.settings.context)
        by_uuid = {device.uuid: device for device in devices}
        return [Room(uuid, max(0, by_uuid[uuid].free - own)) for uuid in visible]

    def _context_by_vram(self) -> int:
        total = 0
        if self._machine is not None:
            uuids = {room.uuid for room in self._rooms()}
            total = sum(d.total for d in self._machine.snapshot() if d.uuid in uuids)
        return 262144 if total >= 47 << 30 else 32768 if total >= 23 << 30 else 4096

    def _load(
        self, model: Model, key: Any, keep_alive: float, aborted: Callable[[], bool]
    ) -> Loaded:
        need = model.need(key[0], self.settings.parallel)
        placement = self._make_room(model, need, int(dict(key[1]).get("num_gpu", -1)))
        self._port += 1
        pid = self._processes.start(model.blob, self._port)
        try:
            self._fill(pid, placement)
            until = time.monotonic() + self.settings.load_delay
            while (left := until - time.monotonic()) > 0:
                if aborted():
                    raise LoadAbortedError("client closed connection before the model was loaded")
                time.sleep(min(0.01, left))
        except BaseException:
            self._processes.stop(pid)
            raise
        entry = Loaded(model, key, need, placement, pid, keep_alive)
        entry.places = threading.Semaphore(self.settings.parallel)
        with self._changed:
            self._loaded[model.blob] = entry
            self.loads.append(model.full_name)
            if placement.vram < need and self._machine is not None:
                self.spills.append(model.full_name)
            self._count(entry)
        return entry

    def _count(self, entry: Loaded) -> None:
        name = entry.model.full_name
        self.most_at_once[name] = max(self.most_at_once.get(name, 0), entry.busy)

    def _make_room(self, model: Model, need: int, num_gpu: int) -> Placement:
        """Decide where the model goes; evict idle models, the next to expire first."""
        margin = to_bytes(self.settings.margin)
        while True:
            rooms = self._rooms()
            entries = self.loaded()
            layers = model.shape[0]
            if num_gpu == 0 or not rooms:
                return Placement(())
            if num_gpu > 0:
                return forced(need, layers, rooms, num_gpu)
            if not entries:
                return place_alone(need, layers, rooms, margin)
            if len(entries) < self.settings.max_loaded * len(rooms):
                beside = place_beside(need, rooms, margin)
                if beside is not None:
                    return beside
            self._evict_one()

    def _evict_one(self) -> None:
        with self._changed:
            while True:
                idle = [entry for entry in self._loaded.values() if not entry.busy]
                if idle or not self._loaded:
                    break
                self._changed.wait(1.0)
        if not idle:
            return
        leaving = min(idle, key=lambda entry: entry.deadline)
        wanted = sum(room.free for room in self._rooms()) + leaving.placement.vram
        self.unload(leaving.model)
        deadline = time.monotonic() + 5  # Ollama waits as long for the VRAM to come back
        while sum(room.free for room in self._rooms()) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)

    def _fill(self, pid: int, placement: Placement) -> None:
        for uuid, nbytes in placement.shares:
            assert self._machine is not None
            try:
                self._machine.allocate(uuid, nbytes, pid, context=self.settings.context)
            except OutOfMemoryError as error:
                raise LoadError(
                    f"llama runner process has terminated: cudaMalloc failed: {error}"
                ) from error

    def _expire(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                idle = [entry for entry in self._loaded.values() if not entry.busy]
                due = [entry.model for entry in idle if entry.deadline <= now]
                if not due:
                    soonest = min((entry.deadline for entry in idle), default=now + 3600)
                    self._changed.wait(min(soonest - now, 3600))
            for model in due:
                self.unload(model)
