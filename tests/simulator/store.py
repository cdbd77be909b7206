"""The state file in Python: mapped, locked, and rid of what dead processes held."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import sizeof
from pathlib import Path

from . import layout


def start_time(pid: int) -> int | None:
    """Return when process *pid* started, in clock ticks since boot; None if it is dead.

    A zombie counts as dead: it has closed its files, the GPU's among them.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stream:
            text = stream.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command in parentheses may itself hold spaces and parentheses.
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def log_of(path: Path) -> Path:
    """The file to which every change is written, where there is one when a process begins."""
    return path.with_name(f"{path.name}-log")


_here = threading.local()
"""What this thread is doing: `locked` in a locked section, `running` in _run_postponed."""

_postponed: deque[tuple[Store, Callable[[], object]]] = deque()


def _run_postponed() -> None:
    if getattr(_here, "locked", False) or getattr(_here, "running", False):
        return
    _here.running = True
    try:
        while _postponed:
            store, action = _postponed.popleft()
            try:
                with store.locked():
                    action()
            except FileNotFoundError:
                pass  # the machine went first, and all its VRAM with it
    finally:
        _here.running = False


class Store:
    """The mapped state file. All methods but `locked` and `later` need the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0)
        if len(self._map) != sizeof(layout.State):
            raise ValueError(f"{path} is no simulator state, or of another version")
        self.state = layout.State.from_buffer(self._map)
        if (self.state.magic, self.state.version) != (layout.MAGIC, layout.VERSION):
            raise ValueError(f"{path} is no simulator state, or of another version")
        # What the last survey found; valid while the lock is held.
        self._held = [0] * layout.DEVICE_LIMIT
        self._processes: dict[tuple[int, int], int] = {}
        self._contexts: set[tuple[int, int]] = set()
        self._first_free = 0
        self._log: int | None = None
        with suppress(FileNotFoundError):
            self._log = os.open(log_of(path), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._is_changed = False

    @contextmanager
    def locked(self) -> Iterator[layout.State]:
        """Hold the lock, with the state brought up to date; not reentrant.

        The descriptor is opened for this one time, so that the lock excludes threads as
        well as processes and the operating system releases it when its holder dies.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        _here.locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._survey()
            yield self.state
            self._note_peaks()
            if self._log is not None and self._is_changed:
                self._write_log(self._log)
        finally:
            # Not by close alone: a child forked meanwhile has a copy that keeps the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
            _here.locked = False
        _run_postponed()

    def later(self, action: Callable[[], object]) -> None:
        """Run *action* under the lock: now, or as soon as this thread holds no lock.

        For finalizers, which garbage collection may run in the middle of `locked`, of this
        store or of another one on the same file: taking the lock there would wait for ever.
        """
        _postponed.append((self, action))
        _run_postponed()

    def _survey(self) -> None:
        """Take from the dead what they held, and sum up what the others hold."""
        state = self.state
        now = time.monotonic_ns()
        started: dict[int, int | None] = {}
        self._held = [0] * layout.DEVICE_LIMIT
        self._processes, self._contexts = {}, set()
        self._first_free, end = state.slot_count, 0
        # Decoded in bulk: field by field, thousands of slots would take milliseconds.
        slots = struct.iter_unpack(layout.SLOT_FORMAT, self._slot_bytes(state.slot_count))
        for index, (kind, device, pid, _, birth, size, _, dead_at) in enumerate(slots):
            if kind == layout.SLOT_FREE:
                self._first_free = min(self._first_free, index)
                continue
            if pid not in started:
                started[pid] = start_time(pid)
            if started[pid] != birth:
                if not dead_at:
                    state.slots[index].dead_at = dead_at = now
                if now - dead_at >= state.late_free:
                    state.slots[index].state = layout.SLOT_FREE
                    self._first_free = min(self._first_free, index)
                    self._is_changed = True
                    continue
            else:
                self._processes[device, pid] = self._processes.get((device, pid), 0) + size
                if kind == layout.SLOT_CONTEXT:
                    self._contexts.add((device, pid))
            self._held[device] += size
            end = index + 1
        state.slot_count = end
        self._note_peaks()

    def _write_log(self, log: int) -> None:
        """Append who holds what now, as one line of JSON; with the lock held."""
        self._is_changed = False
        self._survey()
        line = {
            "at": time.time(),
            "pid": os.getpid(),
            "worker": os.environ.get("PYTEST_XDIST_WORKER", ""),
            "used": [self.used(record) for record in range(self.state.device_count)],
            "held": [[device, pid, size] for (device, pid), size in self._processes.items()],
        }
        os.write(log, (json.dumps(line, separators=(",", ":")) + "\n").encode())

    def _slot_bytes(self, count: int) -> bytes:
        begin = layout.State.slots.offset
        return self._map[begin : begin + count * sizeof(layout.SlotRecord)]

    def _note_peaks(self) -> None:
        for record in range(self.state.device_count):
            device, used = self.state.devices[record], self.used(record)
            if used > device.peak_used:
                device.peak_used = used

    def note_change(self) -> None:
        """What is held has changed by other means than `take` and `give`."""
        self._is_changed = True

    def used(self, record: int) -> int:
        """Return the bytes used on a device, without the driver's own; of a GPU in MIG mode,
        the sum over its instances."""
        state = self.state
        if not state.devices[record].mig_enabled:
            return int(state.devices[record].foreign) + self._held[record]
        return sum(self.used(child) for child in self.children(record))

    def children(self, record: int) -> list[int]:
        """Return the MIG instances of a GPU, as record numbers."""
        state = self.state
        instances = range(state.gpu_count, state.device_count)
        return [child for child in instances if state.devices[child].parent == record]

    def free(self, record: int) -> int:
        """Return the bytes that can still be allocated on a device."""
        device = self.state.devices[record]
        return int(device.total) - int(device.reserved) - self.used(record)

    def has_context(self, record: int, pid: int) -> bool:
        """Tell whether the process, which is alive, has a context on the device."""
        return (record, pid) in self._contexts

    def processes(self, record: int) -> dict[int, int]:
        """Return the bytes that each living process held on a device, and on its instances,
        when the lock was taken."""
        held: dict[int, int] = {}
        for (device, pid), size in self._processes.items():
            if device == record or self.state.devices[device].parent == record:
                held[pid] = held.get(pid, 0) + size
        return held

    def take(self, kind: int, record: int, pid: int, started: int, size: int) -> int:
        """Fill in a free slot; return its handle. The caller has checked that it fits."""
        state, index = self.state, self._first_free
        while index < layout.SLOT_LIMIT and state.slots[index].state != layout.SLOT_FREE:
            index += 1
        if index >= layout.SLOT_LIMIT:
            raise RuntimeError(f"the simulator holds at most {layout.SLOT_LIMIT} allocations")
        slot = state.slots[index]
        self._first_free = index + 1
        state.serial += 1
        slot.device, slot.pid, slot.started, slot.size = record, pid, started, size
        slot.serial, slot.dead_at = state.serial, 0
        state.slot_count = max(state.slot_count, index + 1)
        slot.state = kind
        self._held[record] += size
        self._is_changed = True
        return int(slot.serial) * layout.SLOT_LIMIT + index

    def give(self, handle: int) -> bool:
        """Free the slot of *handle*; False if it is not in use any more."""
        serial, index = divmod(handle, layout.SLOT_LIMIT)
        slot = self.state.slots[index]
        if slot.state == layout.SLOT_FREE or slot.serial != serial:
            return False
        slot.state = layout.SLOT_FREE
        self._held[slot.device] -= slot.size
        self._is_changed = True
        return True
