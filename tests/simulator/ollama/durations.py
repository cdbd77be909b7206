"""Durations and moments as Go writes them."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta, timezone
from typing import Any

FOREVER = math.inf

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_LONGEST = timedelta(days=292 * 365)


def seconds(keep_alive: Any) -> float:
    """Return a `keep_alive` in seconds: a number, or text such as "5m" or "1h30m".

    Negative means for ever. Raises ValueError for what Ollama refuses.
    """
    if isinstance(keep_alive, bool) or not isinstance(keep_alive, (int, float, str)):
        raise ValueError(f"invalid keep_alive {keep_alive!r}")
    value = keep_alive if isinstance(keep_alive, (int, float)) else _parse(keep_alive)
    return FOREVER if value < 0 else float(value)


def _parse(text: str) -> float:
    body = text.lstrip("+-")
    if body == "0":
        return 0.0
    parts = _PART.findall(body)
    if not parts or "".join(number + unit for number, unit in parts) != body:
        raise ValueError(f'time: invalid duration "{text}"')
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return -total if text.startswith("-") else total


def moment(unix_ns: int, after: float = 0.0) -> str:
    """Return a moment, *after* seconds later, as RFC 3339 with nanoseconds.

    Go drops trailing zeros, and so do we; for ever is about 292 years.
    """
    if after == FOREVER:
        whole, nanoseconds = divmod(unix_ns, 10**9)
        time = datetime.fromtimestamp(whole, timezone.utc) + _LONGEST
    else:
        whole, nanoseconds = divmod(unix_ns + int(after * 1e9), 10**9)
        time = datetime.fromtimestamp(whole, timezone.utc)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S") + fraction + "Z"
