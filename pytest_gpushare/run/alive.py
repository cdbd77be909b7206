"""Whether a process is still the one that it was: numbers of processes are used again."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

_MOST_BYTES = 4096
_MOST_ANCESTORS = 32


def identity(pid: int) -> str | None:
    """What tells a process from every other one that has had or will have its number.

    None where it is dead, or where the system does not tell. On Linux: the boot, the
    namespace of process numbers, and the process's start time.
    """
    if sys.platform == "win32":
        return _windows_identity(pid)
    fields = _stat(pid)
    if fields is None or fields[0] in ("Z", "X") or _here() is None:
        return None
    return f"{_here()}/{fields[19]}"


def is_alive(pid: int, known: str) -> bool | None:
    """Whether the process with this identity lives; None where it cannot be seen from here."""
    now = identity(pid)
    if now == known:
        return True
    here, theirs = _here(), known.rpartition("/")[0]
    # Another container on the same machine: its numbers mean nothing here.
    if here is not None and theirs != here and theirs.split("/")[0] == here.split("/")[0]:
        return None
    return False


def ancestors(pid: int) -> list[int]:
    """The process itself, its parent, and so on, as far as the system tells."""
    found = [pid]
    for _ in range(_MOST_ANCESTORS):
        fields = _stat(found[-1])
        if fields is None or not fields[1].isdigit() or int(fields[1]) <= 1:
            break
        found.append(int(fields[1]))
    return found


def sees_every_process() -> bool:
    """Whether no process of this machine is hidden: not in a container, and not in WSL."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
        kernel = Path("/proc/sys/kernel/osrelease").read_text(encoding="ascii").lower()
    except (OSError, ValueError):
        return False
    # The first namespace has had this number since there are namespaces.
    return space == "pid:[4026531836]" and "microsoft" not in kernel


@cache
def _here() -> str | None:
    """The boot and the namespace of process numbers; None where the system tells neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return None


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may itself hold brackets and spaces."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - Path costs twice as much
            text = file.read(_MOST_BYTES).decode("ascii", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields if len(fields) > 19 else None


def _windows_identity(pid: int) -> str | None:  # pragma: no cover - runs on Windows alone
    import ctypes

    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    kernel = windll.kernel32
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(0x1000, False, pid)
    if not handle:
        return None
    times = [ctypes.c_ulonglong() for _ in range(4)]
    code = ctypes.c_ulong()
    try:
        told = kernel.GetProcessTimes(ctypes.c_void_p(handle), *map(ctypes.byref, times))
        running = kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))
        return f"windows/{times[0].value}" if told and running and code.value == 259 else None
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))
