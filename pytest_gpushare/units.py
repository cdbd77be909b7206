"""Bytes inside, MB and GB at the edges.

As in nvidia-smi, MB means MiB and GB means GiB.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

MB = 1024**2
GB = 1024**3

MOST_VRAM = 2**50
"""The largest size in bytes that is believed of a device, a model or a test (1 PiB)."""

_IN_MB = Fraction(GB, 10)
"""Bytes below which a size is shown in MB."""

_FACTORS = {"B": 1, "K": 1024, "M": MB, "G": GB, "T": 1024**4}
# ASCII alone: without regard to case, K is also the sign of Kelvin, which is no unit of ours.
_SIZE = re.compile(
    r"([0-9]{1,24}(?:\.[0-9]{0,24})?|\.[0-9]{1,24})\s*(B|[KMGT](?:i?B)?)?",
    re.IGNORECASE | re.ASCII,
)


def parse_size(text: str, unit: str) -> Fraction:
    """Bytes meant by a text such as `12288`, `12GB`, `4.5 GiB` or `512MB`.

    `unit` ("MB" or "GB") holds where the text names none. The result is exact,
    so it may be a fraction of a byte: 0.1 GB is not a whole number of bytes.
    Raises `ValueError` where the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, named = match.groups()
    return Fraction(Decimal(number)) * _FACTORS[(named or unit)[0].upper()]


def format_gb(size: int | Fraction) -> str:
    """`4.5 GB`, `3.33 GB`, `12.0 GB`: one decimal where that is exact, else two; `51 MB` below
    0.1 GB."""
    if 0 < size < _IN_MB:
        return f"{max(1, round(Fraction(size) / MB))} MB"
    text = f"{float(Fraction(size) / GB):.2f}"
    return f"{text[:-1] if text.endswith('0') else text} GB"


def at_least(exact: bool | None) -> str:
    """What stands before a size that is a lower bound; None: no size is known."""
    return "at least " if exact is False else ""


def format_number(value: Fraction) -> str:
    """A number as a user would write it: `0.25`, `2`, `1048576`."""
    return str(value) if value.denominator == 1 else f"{float(value):.6g}"


def plural(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
