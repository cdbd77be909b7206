"""The probe of NVIDIA devices: NVML through pynvml, opened once and held.

An error of one device leaves out that device, with a problem; an error of the library is
an absence with its reason. pynvml is imported here alone, and only when a probe runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pytest_gpushare.gpu.devices import ComputeMode, Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.gpu.host import unified_memory
from pytest_gpushare.gpu.visibility import visible
from pytest_gpushare.text import printable
from pytest_gpushare.timed import call_within
from pytest_gpushare.units import MOST_VRAM

_NOT_SUPPORTED = 3
_NO_INSTANCE = (2, 6)
"""What NVML answers to an index at which there is no MIG instance."""
_MOST_DEVICES = 256
_MOST_MIG = 16

_REMEDIES = {
    4: "no permission: check the access rights of /dev/nvidia*, or the container's devices",
    9: "the NVIDIA driver is not loaded: load it, or check nvidia-smi",
    12: "NVML library not found: is the NVIDIA driver installed?",
    15: "the GPU is lost: reset it or reboot",
    18: "driver and library versions differ: reboot, or reload the driver",
    999: "unknown error: check nvidia-smi; in a container, restart it",
}


class Nvml:
    """An open NVML library; `close` it once at the end. Errors at opening are in `absence`."""

    def __init__(self, neighbour_of: Callable[[int], str] = lambda _pid: "") -> None:
        """`neighbour_of` names the neighbour whose process a PID is; empty for any other."""
        self.absence = ""
        self._neighbour_of = neighbour_of
        self._library: Any = None
        self._handles: dict[str, Any] = {}
        self._totals: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def open(self) -> None:
        """Load and initialise the library; may take 1.5 s where persistence mode is off."""
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:
            self.absence = reason(error)
            return
        with self._lock:
            if not self._closed:
                self._library = pynvml
                return
        # Closed while a slow driver was still opening: shut down here.
        self._shut_down(pynvml)

    def close(self) -> None:
        """Shut the library down; harmless when it never opened."""
        with self._lock:
            library, self._library, self._closed = self._library, None, True
        if library is not None:
            self._shut_down(library)

    def versions(self) -> tuple[str | None, str | None]:
        """Versions of the library and of the CUDA that its driver supports; None: unknown."""
        if self._library is None:
            return None, None
        nvml = self._or_none(self._library.nvmlSystemGetNVMLVersion)
        cuda = self._or_none(self._library.nvmlSystemGetCudaDriverVersion)
        is_known = isinstance(cuda, int) and cuda > 0
        version = f"{cuda // 1000}.{cuda % 1000 // 10}" if is_known else None
        return _text(nvml) or None, version

    def read(self, outer: str | None, order: str | None) -> GpuFacts:
        """The devices now; `outer` is CUDA_VISIBLE_DEVICES and `order` CUDA_DEVICE_ORDER."""
        if self._library is None:
            return GpuFacts(absence=self.absence or "NVML is not open")
        problems: list[str] = []
        try:
            count = min(int(self._library.nvmlDeviceGetCount()), _MOST_DEVICES)
        except Exception as error:
            return GpuFacts(absence=reason(error))
        self._handles, self._totals = {}, {}
        devices = [device for index in range(count) for device in self._devices_at(index, problems)]
        seen = visible(devices, outer, order)
        absence = seen.absence
        if not devices:
            absence = "NVML finds no device" if not problems else "no device can be used"
        own = os.getpid()
        return GpuFacts(
            devices=seen.devices,
            all_devices=tuple(devices),
            absence="" if seen.devices else absence,
            problems=(*problems, *([seen.problem] if seen.problem else [])),
            driver=self._or_none(self._library.nvmlSystemGetDriverVersion),
            own_process_has_context=any(
                process.pid == own for device in devices for process in device.processes or ()
            ),
        )

    def memory(self) -> dict[str, Memory]:
        """UUID -> VRAM now, of the devices that were read; one that fails is left out."""
        found = {}
        for uuid, handle in self._handles.items():
            # A device may be lost in the middle of a run, or its figures make no sense: it is
            # left out of this reading, and the others go on.
            with contextlib.suppress(Exception):
                found[uuid] = _checked(self._memory(handle) or _unified(), self._totals[uuid])
        return found

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        """UUID -> processes that hold VRAM there; takes milliseconds under a lock of the driver."""
        return {uuid: self._processes(handle) for uuid, handle in self._handles.items()}

    def processes_on(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        """Processes that hold VRAM on one device; None where the driver lists none."""
        handle = self._handles.get(uuid)
        return None if handle is None else self._processes(handle)

    def _devices_at(self, index: int, problems: list[str]) -> Iterator[Device]:
        label = f"GPU {index}"
        try:
            handle = self._library.nvmlDeviceGetHandleByIndex(index)
            if not self._has_mig(handle):
                yield self._device(handle, str(index))
                return
            most = min(int(self._library.nvmlDeviceGetMaxMigDeviceCount(handle)), _MOST_MIG)
        except Exception as error:
            problems.append(f"{label} was left out: {reason(error)}")
            return
        yield from self._instances(handle, index, most, problems)

    def _instances(
        self, handle: Any, index: int, most: int, problems: list[str]
    ) -> Iterator[Device]:
        """The MIG instances of a GPU; indices may have gaps: go on past an error."""
        found, left_out = 0, []
        for part in range(most):
            try:
                instance = self._library.nvmlDeviceGetMigDeviceHandleByIndex(handle, part)
            except Exception as error:
                if getattr(error, "value", None) not in _NO_INSTANCE:
                    left_out.append(f"GPU {index}: MIG instances were left out: {reason(error)}")
                continue
            try:
                device = self._device(instance, f"{index}.{part}", handle)
            except Exception as error:
                left_out.append(f"GPU {index}.{part} was left out: {reason(error)}")
                continue
            found += 1
            yield device
        if not found and not left_out:
            left_out.append(
                f"GPU {index} was left out: it is in MIG mode and has no instance: create one, "
                "or switch MIG off"
            )
        problems += dict.fromkeys(left_out)

    def _has_mig(self, handle: Any) -> bool:
        mode = self._or_none(lambda: self._library.nvmlDeviceGetMigMode(handle))
        return mode is not None and mode[0] == 1

    def _device(self, handle: Any, index: str, parent: Any = None) -> Device:
        whole = handle if parent is None else parent
        uuid = str(self._library.nvmlDeviceGetUUID(handle))
        name = self._or_none(lambda: self._library.nvmlDeviceGetName(handle))
        memory = self._memory(handle)
        unified = memory is None
        processes = self._processes(handle)
        later = self._memory(handle) if memory is not None else None
        if memory is not None and later is not None and later.used > memory.used:
            # Somebody allocated meanwhile, and may be in the list already.
            memory = later
        total, used, free = _checked(memory or _unified())
        if not uuid.isprintable() or not 0 < len(uuid) < 97 or "," in uuid:
            raise ValueError("NVML gives no UUID by which CUDA can select it")
        if uuid in self._handles:
            raise ValueError("NVML lists another device under the same UUID before it")
        self._handles[uuid], self._totals[uuid] = handle, total
        return Device(
            uuid=uuid,
            name=_text(name) or "unnamed GPU",
            index=index,
            total=total,
            used=used,
            free=free,
            processes=processes,
            compute_mode=_compute_mode(
                self._or_none(lambda: self._library.nvmlDeviceGetComputeMode(whole))
            ),
            capability=_capability(
                self._or_none(lambda: self._library.nvmlDeviceGetCudaComputeCapability(whole))
            ),
            parent=""
            if parent is None
            else self._or_none(lambda: str(self._library.nvmlDeviceGetUUID(parent))) or "",
            unified=unified,
        )

    def _memory(self, handle: Any) -> Memory | None:
        """(total, used, free) in bytes; None where the device has no memory of its own."""
        read = self._library.nvmlDeviceGetMemoryInfo
        try:
            memory = read(handle, version=self._library.nvmlMemory_v2)
        except Exception:
            # Version 2 is missing from old drivers, and fails on some under WSL 2.
            try:
                memory = read(handle)
            except Exception as error:
                if getattr(error, "value", None) == _NOT_SUPPORTED:
                    return None
                raise
        if not memory.total:
            return None
        return Memory(int(memory.total), int(memory.used), int(memory.free))

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...] | None:
        found = self._or_none(lambda: self._library.nvmlDeviceGetComputeRunningProcesses_v3(handle))
        if found is None:
            return None
        return tuple(
            GpuProcess(
                pid=int(process.pid),
                used=_process_bytes(process.usedGpuMemory),
                neighbour=self._neighbour_of(int(process.pid)),
            )
            for process in found
        )

    def reason(self, error: Exception) -> str:
        """Why NVML gave no answer, with what to do about it."""
        return reason(error)

    def _shut_down(self, library: Any) -> None:
        with contextlib.suppress(Exception):
            library.nvmlShutdown()

    def _or_none(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception:
            return None


class OneDevice:
    """The process list of one device, for a worker that reads its own; opened by the first
    reading and never closed: the end of the process does that."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._nvml: Nvml | None = None

    def memory(self) -> dict[str, Memory]:
        """Nothing: memory says nothing of this process."""
        return {}

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        """The processes on the device; None without the driver."""
        if self._nvml is None:
            self._nvml = Nvml()
            self._nvml.open()
            self._nvml.read(None, None)
        return {self._uuid: self._nvml.processes_on(self._uuid)}


_OWN_TIMEOUT = 1.0
"""Seconds for which a worker waits for the driver at its end."""


def own_vram(uuid: str) -> int | None:
    """Bytes of this process on the device of that UUID; None where the driver gives none in
    time. The library is opened for a moment only."""
    return call_within(_OWN_TIMEOUT, lambda: _own_vram(uuid), "nvml")


def _own_vram(uuid: str) -> int | None:
    nvml = Nvml()
    nvml.open()
    try:
        nvml.read(None, None)
        found = nvml.processes_on(uuid) or ()
    finally:
        nvml.close()
    sizes = [each.used for each in found if each.pid == os.getpid() and each.used is not None]
    return sum(sizes) if sizes else None


def reason(error: Exception) -> str:
    """Why NVML gave no answer, with what to do about it."""
    code = getattr(error, "value", None)
    if isinstance(error, ImportError):
        return f"pynvml cannot be imported ({error}): install nvidia-ml-py"
    if isinstance(error, FutureWarning):
        return (
            "pynvml cannot be imported under -W error: the deprecated distribution pynvml is "
            "installed: uninstall it and reinstall nvidia-ml-py"
        )
    if not isinstance(code, int):
        return _text(error, 200) or type(error).__name__
    return f"{_REMEDIES.get(code, str(error).strip())} (NVML error {code})"


def _checked(memory: Memory, known_total: int | None = None) -> Memory:
    """The figures of a device. Raises `ValueError` for those that cannot be true, such as more
    in use than the device has; `known_total`: its size when the run started."""
    total, used, free = memory
    most = total if known_total is None else min(total, known_total)
    if not 0 <= free <= most or not 0 <= used <= most or total >= MOST_VRAM:
        raise ValueError(f"NVML reports impossible figures: {free} of {total} bytes free, "
                         f"{used} used")  # fmt: skip
    return memory


def _process_bytes(size: object) -> int | None:
    """Bytes of a process; None where the driver gives no figure: in containers it gives 0."""
    return size if isinstance(size, int) and 0 < size < MOST_VRAM else None


def _unified() -> Memory:
    memory = unified_memory()
    if memory is None:
        raise ValueError("NVML knows no memory of the device, and the host's cannot be read")
    total, free = memory
    return Memory(total, total - free, free)


def _compute_mode(mode: object) -> ComputeMode:
    # 1 is EXCLUSIVE_THREAD, which drivers have treated as EXCLUSIVE_PROCESS since CUDA 8.
    return {2: ComputeMode.PROHIBITED, 1: ComputeMode.EXCLUSIVE, 3: ComputeMode.EXCLUSIVE}.get(
        mode if isinstance(mode, int) else 0, ComputeMode.DEFAULT
    )


def _capability(found: object) -> tuple[int, int]:
    if isinstance(found, (list, tuple)) and len(found) == 2:
        return int(found[0]), int(found[1])
    return 0, 0


def _text(found: object, most: int = 80) -> str:
    return printable(str(found or ""), most)
