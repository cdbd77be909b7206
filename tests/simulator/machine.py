"""A simulated machine: devices whose VRAM processes take and give back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import layout
from .build import exported_functions
from .hardware import Device, DeviceState, OutOfMemoryError
from .records import fill_state
from .sizes import Size, to_bytes, to_text
from .store import Store, log_of, start_time

STATE_VARIABLE = "GPUSHARE_SIM_STATE"
"""The environment variable that names the state file, for Python and the C library."""


class Machine:
    """A view of the state file; any number of processes may have one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = Store(path)

    @classmethod
    def create(
        cls,
        path: Path,
        devices: Sequence[Device],
        *,
        context: Size = "600MB",
        late_free: float = 0.0,
        log: bool = False,
        driver: str = "580.95.05",
        cuda_version: int = 13000,
    ) -> Machine:
        """Write a new state file to *path* and open it.

        context: what the first allocation of a process on a device takes on top.
        late_free: seconds that VRAM outlives its process, counted from the first access
            to the state that finds the process dead.
        log: write every change of what is held to `store.log_of(path)`.
        """
        state = layout.State()
        fill_state(state, devices)
        state.context = to_bytes(context)
        state.late_free = round(late_free * 1e9)
        state.driver = driver.encode()
        state.cuda_version = cuda_version
        path = Path(path).absolute()
        # Renamed into place: nobody ever maps half a state.
        descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with open(descriptor, "wb") as stream:
            stream.write(bytes(state))
        os.replace(scratch, path)
        if log:
            log_of(path).touch()
        return cls(path)

    @classmethod
    def open(cls, path: Path | None = None) -> Machine:
        """Open the state file at *path*, by default the one that the environment names."""
        if path is None:
            if not os.environ.get(STATE_VARIABLE):
                raise RuntimeError(f"no simulated machine: {STATE_VARIABLE} is not set")
            path = Path(os.environ[STATE_VARIABLE])
        return cls(Path(path).absolute())

    def env(self, library_dir: Path) -> dict[str, str]:
        """Return the variables with which a subprocess sees this machine.

        To be laid over os.environ: the search paths keep what is in them now.
        """
        here = Path(__file__).resolve().parent
        # gpusim has a folder of its own, so that no other module of the simulator hides a
        # module of the same name in the user's code.
        python_path = [str(here.parent), str(here / "path"), os.environ.get("PYTHONPATH", "")]
        library_path = [str(Path(library_dir).absolute()), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            STATE_VARIABLE: str(self.path),
            # Sessions on this machine see each other's leases, and nobody else's.
            "PYTEST_GPUSHARE_LEASES": f"{self.path}-leases",
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, library_path)),
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        }

    # --- faults ---

    def inject(
        self,
        function: str,
        *,
        code: int = 0,
        delay: float = 0.0,
        device: int | str | None = None,
        first: int = 0,
        count: int = 0,
    ) -> None:
        """Let calls of an NVML function fail, or answer late.

        function: the C symbol, for example ``nvmlDeviceGetMemoryInfo_v2``, or the beginning
            of several with a ``*``. pynvml asks for a process list twice: two calls.
        code: the return code; 0 for a plain answer.
        delay: seconds to sleep before answering.
        device: only calls about this GPU (index or UUID) or MIG instance (UUID).
        first, count: leave the first calls alone, then hit so many; 0 hits all that follow.
            Calls are counted over all processes.
        """
        matches = [f for f in exported_functions() if f == function]
        if function.endswith("*"):
            matches = [f for f in exported_functions() if f.startswith(function[:-1])]
        if not matches:
            raise ValueError(f"the simulated NVML has no function {function!r}")
        with self._store.locked() as state:
            if state.injection_count == layout.INJECTION_LIMIT:
                raise RuntimeError(f"at most {layout.INJECTION_LIMIT} injections")
            at = layout.ANY_DEVICE if device is None else self._record(device)
            record = state.injections[state.injection_count]
            record.function, record.device = function.encode(), at
            record.code, record.delay = code, delay
            record.first, record.count, record.calls = first, count, 0
            state.injection_count += 1

    def clear_injections(self) -> None:
        """Let every function answer as usual again."""
        with self._store.locked() as state:
            state.injection_count = 0

    # --- memory ---

    def snapshot(self) -> list[DeviceState]:
        """Return every device as it is now: the GPUs in NVML's order, then MIG instances."""
        with self._store.locked() as state:
            return [self._device_state(record) for record in range(state.device_count)]

    def set_used(self, device: int | str, size: Size) -> None:
        """Set what somebody in no process list holds on a device."""
        wanted = to_bytes(size)
        with self._store.locked() as state:
            at = self._allocatable(device)
            self._refuse_beyond_free(at, wanted - int(state.devices[at].foreign))
            state.devices[at].foreign = wanted
            self._store.note_change()

    def allocate(
        self,
        device: int | str,
        nbytes: Size,
        pid: int | None = None,
        *,
        context: Size | None = None,
    ) -> int:
        """Take VRAM for a process, by default this one; return a handle for `release`.

        The first allocation of a process on a device takes its context too, which stays
        until the process dies: *context* bytes, by default the machine's. Raises
        OutOfMemoryError, and changes nothing, if that is more than is free.
        """
        size = to_bytes(nbytes)
        pid = os.getpid() if pid is None else pid
        with self._store.locked() as state:
            started = start_time(pid)
            if started is None:
                raise ProcessLookupError(f"no process {pid} to allocate for")
            at = self._allocatable(device)
            fresh = not self._store.has_context(at, pid)
            extra = int(state.context) if context is None else to_bytes(context)
            extra = extra if fresh else 0
            self._refuse_beyond_free(at, size, extra)
            if extra:
                self._store.take(layout.SLOT_CONTEXT, at, pid, started, extra)
            return self._store.take(layout.SLOT_DATA, at, pid, started, size)

    def release(self, handle: int) -> None:
        """Give an allocation back. Nothing happens if it is gone, as after a reap.

        Safe in a finalizer, even one that runs in the middle of another method.
        """
        self._store.later(lambda: self._store.give(handle))

    # --- inside; with the lock held ---

    def _record(self, device: int | str) -> int:
        state = self._store.state
        if isinstance(device, int):
            if 0 <= device < state.gpu_count:
                return device
            raise ValueError(f"no device {device}; the machine has {state.gpu_count}")
        for record in range(state.device_count):
            if state.devices[record].uuid == device.encode():
                return record
        raise ValueError(f"no device {device!r}")

    def _allocatable(self, device: int | str) -> int:
        at = self._record(device)
        if self._store.state.devices[at].mig_enabled:
            raise ValueError(f"device {device!r} is in MIG mode; name one of its instances")
        return at

    def _refuse_beyond_free(self, at: int, size: int, context: int = 0) -> None:
        free = self._store.free(at)
        if size + context <= free:
            return
        device = self._store.state.devices[at]
        device.oom_count += 1
        raise OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {to_text(size)}."
            f" GPU {device.number} has a total capacity of {to_text(int(device.total))}"
            f" of which {to_text(free)} is free."
        )

    def _device_state(self, record: int) -> DeviceState:
        device = self._store.state.devices[record]
        is_instance = device.parent != layout.NO_PARENT
        return DeviceState(
            record=record,
            uuid=device.uuid.decode(),
            name=device.name.decode(),
            total=int(device.total),
            reserved=int(device.reserved),
            used=self._store.used(record),
            free=self._store.free(record),
            peak_used=int(device.peak_used),
            oom_count=int(device.oom_count),
            processes=tuple(sorted(self._store.processes(record).items())),
            parent=int(device.parent) if is_instance else None,
            mig_index=int(device.number) if is_instance else None,
            capability=(int(device.capability_major), int(device.capability_minor)),
            mig_enabled=bool(device.mig_enabled),
        )
