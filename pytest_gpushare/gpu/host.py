"""The host: RAM, installed frameworks, processes, file systems, and its own addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pytest_gpushare.units import MOST_VRAM

_NAMES_OF_THIS_HOST = (
    "localhost",
    "host.docker.internal",
    "gateway.docker.internal",
    "host.containers.internal",
)
_MOST_BYTES = 64 * 1024
_MOST_GENERATIONS = 64


def available_ram() -> int | None:
    """Bytes of RAM that new processes can take without swapping; None where unknown."""
    if sys.platform == "win32":
        return _windows_ram()
    free = _meminfo("MemAvailable")
    limit = _cgroup_available()
    if free is None or limit is None:
        return free if limit is None else limit
    return min(free, limit)


def unified_memory() -> tuple[int, int] | None:
    """(total, free) in bytes of memory that CPU and GPU share; None where unknown.

    For devices such as Jetson and DGX Spark, where NVML reports no memory of the device.
    """
    total, free = _meminfo("MemTotal"), _meminfo("MemAvailable")
    if total is None or free is None:
        return None
    return total, min(total, free + (_meminfo("SwapFree") or 0))


_DISTRIBUTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("torch", ("torch",)),
    "JAX": ("jax", ("jax",)),
    "CuPy": ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")),
    "TensorFlow": ("tensorflow", ("tensorflow", "tensorflow-cpu", "tf-nightly")),
}


def installed_frameworks() -> dict[str, str]:
    """Framework -> version, of those that this Python can import."""
    return {
        name: version
        for name, (module, distributions) in _DISTRIBUTIONS.items()
        if _is_there(module) and (version := _first(distributions)) is not None
    }


def _is_there(module: str) -> bool:
    # Looking for a module that is not there is far cheaper than looking for its metadata.
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _first(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except Exception:
            # Not installed, or its metadata is broken: either way nothing is known of it.
            continue
    return None


def mps_is_running(outer: Mapping[str, str]) -> bool:
    """Whether the control daemon of CUDA MPS has its pipe where clients look for it."""
    return Path(outer.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def command_line(pid: int) -> tuple[str, ...] | None:
    """The arguments of a process; None where they are unknown."""
    raw = _read(Path(f"/proc/{pid}/cmdline"))
    return tuple(raw.rstrip("\0").split("\0")) if raw else None


def is_alive(pid: int) -> bool:
    """Whether there is such a process on this host; True where that is unknown."""
    return not Path("/proc/self").exists() or Path(f"/proc/{pid}").exists()


def is_own_address(host: str) -> bool:
    """Whether a server at `host` can hold VRAM of this machine.

    True for loopback, for an address of this machine, and for the names and gateways by
    which containers and WSL reach the machine that they run on.
    """
    name = host.strip("[]").rstrip(".").lower()
    if name in _NAMES_OF_THIS_HOST or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name.split(".")[0] == socket.gethostname().split(".")[0].lower()
    if address.is_loopback or address.is_unspecified:
        return True
    return str(address) == _gateway_of_host() or _can_bind(address)


def _can_bind(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        # A system binds only to addresses of its own; port 0 is any free one.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _gateway_of_host() -> str | None:
    """The default gateway where it is the machine that we run on: under WSL 2 or in a container."""
    if not _is_wsl() and not Path("/.dockerenv").exists():
        return None
    return _default_gateway()


def wsl_gateway() -> str | None:
    """The address of Windows as WSL sees it through NAT; None elsewhere."""
    return _default_gateway() if _is_wsl() else None


def _is_wsl() -> bool:
    return "microsoft" in _read(Path("/proc/sys/kernel/osrelease")).lower()


def _default_gateway() -> str | None:
    for line in _read(Path("/proc/net/route")).splitlines()[1:]:
        fields = line.split()
        if len(fields) > 2 and fields[1] == "00000000":
            with contextlib.suppress(ValueError):
                return str(ipaddress.IPv4Address(int(fields[2], 16).to_bytes(4, "little")))
    return None


def file_system(device: int) -> str:
    """The kind of the file system with this device number; empty where that is unknown."""
    try:
        number = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123 - Path costs twice as much
            lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
    except (OSError, AttributeError):
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if fields.split()[2:3] == [number]:
            return rest.split(" ", 1)[0]
    return ""


def parent_of(pid: int) -> int | None:
    """The PID of a process's parent; None where it is unknown."""
    fields = _stat(pid)
    return int(fields[1]) if fields is not None and fields[1].isdigit() else None


def generations(pid: int, parent: Callable[[int], int | None] = parent_of) -> Iterator[int]:
    """A process, its parent, and so on; without the first process of all."""
    at: int | None = pid
    for _ in range(_MOST_GENERATIONS):
        if at is None or at <= 1:
            return
        yield at
        at = parent(at)


def line_of(pid: int) -> Sequence[int]:
    """A process and those that started it; empty for one that is not found here."""
    return [] if parent_of(pid) is None else list(generations(pid))


def _meminfo(key: str) -> int | None:
    match = re.search(rf"^{key}:\s+([0-9]{{1,18}}) kB", _read(Path("/proc/meminfo")), re.M)
    return int(match.group(1)) * 1024 if match else None


_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_V2 = ("", "memory.max", "memory.current", "inactive_file")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroup_available() -> int | None:
    """Bytes that the control groups of this process let it take; None where none has a limit.

    The least over its group and those above it, for version 2 and version 1.
    """
    found = [
        available for line in _read(_OWN_GROUPS).splitlines() for available in _available_in(line)
    ]
    return min(found, default=None)


def _available_in(line: str) -> Iterator[int]:
    """`0::/user.slice` is a group of version 2, `4:memory:/docker/1` one of version 1."""
    _, _, rest = line.partition(":")
    controllers, _, group = rest.partition(":")
    if controllers and "memory" not in controllers.split(","):
        return
    mount, limit_file, usage_file, cache_key = _V1 if controllers else _V2
    # In a container the mount point is the container's own group, whatever its path here.
    parts = [part for part in group.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        folder = _CGROUPS / mount / "/".join(parts[:depth])
        limit, usage = (_read(folder / name).strip() for name in (limit_file, usage_file))
        if not (limit.isdigit() and usage.isdigit()) or int(limit) >= MOST_VRAM:
            continue
        cache = re.search(rf"^{cache_key} ([0-9]{{1,18}})$", _read(folder / "memory.stat"), re.M)
        # The kernel gives the page cache back before it runs out of memory.
        used = max(0, int(usage) - (int(cache.group(1)) if cache else 0))
        yield max(0, int(limit) - used)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return os.fsdecode(file.read(_MOST_BYTES))
    except OSError:
        return ""


def _windows_ram() -> int | None:  # pragma: no cover - runs on Windows alone
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            ("rest", ctypes.c_ulonglong * 5),
        )

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    windll = getattr(ctypes, "windll", None)
    if windll is None or not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.available)


_MOST_STAT_BYTES = 4096


def sees_every_process() -> bool:
    """Whether no process of this machine is hidden: not in a container, and not in WSL."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return False
    # The first namespace has had this number since there are namespaces.
    return space == "pid:[4026531836]" and not _is_wsl()


@cache
def pid_space() -> str | None:
    """The boot and the namespace of process numbers; None where either is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return None


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may itself hold brackets and spaces."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - Path costs twice as much
            text = file.read(_MOST_STAT_BYTES).decode("ascii", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields if len(fields) > 19 else None
