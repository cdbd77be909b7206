"""How figures are written on the page; the script's `words` say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gpushare.units import GB, MB, format_gb

UNKNOWN = "unknown"

_BAD = frozenset(
    {"ollama-spilled", "ollama-unreachable", "worker-crashed", "placement-overwritten", "oom"}
)
_WARNING = frozenset({"ollama-unloaded", "ollama-reloaded", "pressure", "leak"})


def number(value: object) -> float | None:
    """The value, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def size(value: object) -> str:
    """`4.5 GB`, `600 MB` below a tenth of a GB, or `unknown`; bytes."""
    held = number(value)
    if held is None:
        return UNKNOWN
    if 0 < abs(held) < GB / 10:
        return f"{held / MB:.0f} MB"
    return format_gb(round(held))


def span(value: object) -> str:
    """`4 ms`, `0.25 s`, `12.3 s`, `3 min 20 s`, `2 h 05 min`, or `unknown`; seconds."""
    seconds = number(value)
    if seconds is None:
        return UNKNOWN
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def clock(value: object) -> str:
    """A moment of the run: `0:03.2`, `12:05.0` or `3:20:05`; seconds since its start."""
    seconds = number(value)
    if seconds is None:
        return UNKNOWN
    if seconds < 3600:
        tenths = int(seconds * 10)
        return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def percent(part: float, whole: float) -> str:
    """`89 %`, rounded down, so that only the whole is called 100 %."""
    return f"{int(100 * part // whole)} %"


def listed(names: list[str], most: int = 6) -> str:
    """`a`, `a and b`, `a, b and c`, or `a, b, c and 9 more`."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def label(device: Mapping[str, Any]) -> str:
    """`GPU 0`, as the terminal has it, or the start of the UUID where no index is known."""
    index = device.get("index")
    return f"GPU {index}" if index not in (None, "") else str(device.get("uuid"))[:12]


def each(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects that a list of the document holds; none where it is missing."""
    return [item for item in document.get(key) or () if isinstance(item, Mapping)]


def in_order(held: object, workers: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """What samples hold by worker, in the order of the document's workers."""
    if not isinstance(held, Mapping):
        return []
    order = {str(worker.get("id")): at for at, worker in enumerate(workers)}
    pairs = [(str(worker), values) for worker, values in held.items()]
    return sorted(pairs, key=lambda pair: order.get(pair[0], len(order)))


def texts(document: Mapping[str, Any], key: str) -> list[str]:
    """The texts that a list of the document holds."""
    return [str(item) for item in document.get(key) or ()]


def severity(kind: object) -> str:
    """`bad`, `warning` or `neutral`; kinds that a later version adds are neutral."""
    return "bad" if kind in _BAD else "warning" if kind in _WARNING else "neutral"
