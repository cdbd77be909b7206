"""NVIDIA: devices read by NVML through pynvml, and CUDA's rules on which of them a process sees.

An error of one device leaves out that device, with a problem; an error of the library is
an absence with its reason. pynvml is imported here alone, and only when a probe runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pytest_gpushare.gpu.devices import ComputeMode, Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.gpu.host import unified_memory
from pytest_gpushare.gpu.vendors import NeighbourOf, Vendor
from pytest_gpushare.text import printable, shown_text
from pytest_gpushare.units import MOST_VRAM

VARIABLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_OF_CONTAINER = "NVIDIA_VISIBLE_DEVICES"
"""By which a container is given devices."""

_ORDINAL = r"([+-]?)([0-9]+)"
"""The start of an entry that CUDA reads as an integer, as C's `strtoul` does."""

_NOT_SUPPORTED = 3
_NO_INSTANCE = (2, 6)
"""What NVML answers to an index at which there is no MIG instance."""
_COMPUTE_MODES = {2: ComputeMode.PROHIBITED, 1: ComputeMode.EXCLUSIVE, 3: ComputeMode.EXCLUSIVE}
"""1 is EXCLUSIVE_THREAD, which drivers have treated as EXCLUSIVE_PROCESS since CUDA 8."""
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

    library = "NVML"

    def __init__(self, neighbour_of: NeighbourOf = lambda _pid: "") -> None:
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
        _or_none(pynvml.nvmlShutdown)

    def close(self) -> None:
        """Shut the library down; harmless when it never opened."""
        with self._lock:
            library, self._library, self._closed = self._library, None, True
        if library is not None:
            _or_none(library.nvmlShutdown)

    def versions(self) -> Mapping[str, str]:
        """Those of the library and of the CUDA that its driver supports, where it says so."""
        if self._library is None:
            return {}
        nvml = _text(_or_none(self._library.nvmlSystemGetNVMLVersion))
        cuda = _or_none(self._library.nvmlSystemGetCudaDriverVersion)
        found = {"NVML": nvml} if nvml else {}
        if cuda:
            found["CUDA up to"] = f"{cuda // 1000}.{cuda % 1000 // 10}"
        return found

    def read(self, environment: Mapping[str, str]) -> GpuFacts:
        """The devices now, or why there are none."""
        try:
            facts = self._read(environment.get(VARIABLE), environment.get(ORDER))
        except Exception as error:
            facts = GpuFacts(absence=reason(error))
        if facts.all_devices:
            return facts
        return facts._replace(absence=facts.absence + _hidden(environment))

    def remedy_when_slow(self, environment: Mapping[str, str]) -> str:
        """What to do about a driver that hangs, or starts slowly."""
        return f"check nvidia-smi; persistence mode makes it start faster{_hidden(environment)}"

    def _read(self, outer: str | None, order: str | None) -> GpuFacts:
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
            driver=_or_none(self._library.nvmlSystemGetDriverVersion),
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
        mode = _or_none(lambda: self._library.nvmlDeviceGetMigMode(handle))
        return mode is not None and mode[0] == 1

    def _device(self, handle: Any, index: str, parent: Any = None) -> Device:
        whole = handle if parent is None else parent
        uuid = str(self._library.nvmlDeviceGetUUID(handle))
        name = _or_none(lambda: self._library.nvmlDeviceGetName(handle))
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
            compute_mode=_COMPUTE_MODES.get(
                _or_none(lambda: self._library.nvmlDeviceGetComputeMode(whole)), ComputeMode.DEFAULT
            ),
            capability=tuple(
                _or_none(lambda: self._library.nvmlDeviceGetCudaComputeCapability(whole)) or (0, 0)
            ),
            parent=""
            if parent is None
            else _or_none(lambda: str(self._library.nvmlDeviceGetUUID(parent))) or "",
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
        found = _or_none(lambda: self._library.nvmlDeviceGetComputeRunningProcesses_v3(handle))
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


def _or_none(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:
        return None


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


def _text(found: object, most: int = 80) -> str:
    return printable(str(found or ""), most)


def _hidden(environment: Mapping[str, str]) -> str:
    """What is added to the absence in a container that was given no device."""
    given = environment.get(_OF_CONTAINER)
    if given not in ("void", "none"):
        return ""
    return f"; {_OF_CONTAINER}={given} gives this container none: start it with --gpus"


class Visible(NamedTuple):
    """The devices that are left, in the order that CUDA gives them, and what is wrong."""

    devices: tuple[Device, ...]
    problem: str = ""
    """What is wrong with the variable's value; CUDA does not report it."""
    absence: str = ""
    """Why no device is left, where none is."""


def visible(devices: Sequence[Device], value: str | None, order: str | None = None) -> Visible:
    """The devices that a process with this CUDA_VISIBLE_DEVICES sees.

    `value` None is an unset variable: all devices. `order` is CUDA_DEVICE_ORDER.
    An entry that names no device hides itself and all that follow, and a device that
    is named twice leaves none at all (CUDA Programming Guide, environment variables).
    """
    if value is None:
        return Visible(tuple(devices))
    if not value.strip():
        return Visible((), absence=f"{VARIABLE} is empty; unset it or name a device")
    found: list[Device] = []
    problem, written = "", f"{VARIABLE}={shown_text(value, 100)}"
    gpus = _as_cuda_counts(devices, order)
    for entry in value.split(","):
        device = _named(gpus, entry.strip())
        if device is None:
            text = shown_text(entry.strip(), 100)
            problem = f'{written}: "{text}" names no device: it and what follows are ignored'
            break
        if device in found:
            twice = f"{written}: names {device.label} twice: CUDA then sees no device"
            return Visible((), twice, twice)
        found.append(device)
    if not found:
        return Visible((), "", problem)
    if not problem and _order_matters(devices, value, order):
        problem = (
            f"{written}: counts in CUDA's own order of devices, which NVML does not know: taken "
            "as the fastest first; set CUDA_DEVICE_ORDER=PCI_BUS_ID or name UUIDs"
        )
    return Visible(tuple(found), problem)


def _named(gpus: Mapping[str, Sequence[Device]], entry: str) -> Device | None:
    """The device that an entry means; of a GPU that is cut into MIG instances, its first one."""
    ordinal = re.match(_ORDINAL, entry)
    if ordinal is not None:
        # What follows the digits is ignored: "1gpu2" is 1. Compared as text, since
        # Python converts no integer of more than 4300 digits.
        sign, digits = ordinal.group(1), ordinal.group(2).lstrip("0") or "0"
        number = digits if digits == "0" else sign.replace("+", "") + digits
        return next(iter(gpus.get(number, ())), None)
    if not entry.upper().startswith(("GPU-", "MIG-")) or len(entry) < 5:
        return None
    start = entry.lower()
    matches = [parts[0] for parts in gpus.values() if parts[0].parent.lower().startswith(start)]
    matches += [d for parts in gpus.values() for d in parts if d.uuid.lower().startswith(start)]
    return matches[0] if len(matches) == 1 else None


def _as_cuda_counts(devices: Sequence[Device], order: str | None) -> dict[str, list[Device]]:
    """Number in CUDA -> the GPU's MIG instances, or the GPU itself.

    Under CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA counts as NVML does. By default it puts the fastest
    first, by a rule of its own that capability and size come near; equal ones stay in order.
    """
    gpus: dict[str, list[Device]] = {}
    for device in devices:
        gpus.setdefault(device.index.partition(".")[0], []).append(device)
    if order == "PCI_BUS_ID" or not _are_mixed(devices):
        return gpus
    fastest = sorted(
        gpus.values(), key=lambda gpu: (gpu[0].capability, sum(d.total for d in gpu)), reverse=True
    )
    return {str(number): gpu for number, gpu in enumerate(fastest)}


def _are_mixed(devices: Sequence[Device]) -> bool:
    return len({device.name for device in devices}) > 1


def _order_matters(devices: Sequence[Device], value: str, order: str | None) -> bool:
    """Whether integers may mean other devices to CUDA (fastest first) than to NVML."""
    integers = any(re.match(_ORDINAL, entry.strip()) for entry in value.split(","))
    return integers and order != "PCI_BUS_ID" and _are_mixed(devices)


NVIDIA = Vendor(
    Nvml, VARIABLE, (ORDER, "PCI_BUS_ID"), ("torch", "JAX", "CuPy", "TensorFlow", "CUDA MPS")
)
