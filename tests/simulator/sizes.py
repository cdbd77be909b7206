"""Sizes as people write them: ``"24GB"``, ``"600 MB"``, or plain bytes.

GB means GiB and MB means MiB, as everywhere in this project.
"""

from __future__ import annotations

import re
from fractions import Fraction

Size = int | str
"""A number of bytes, or text such as ``"11.2GB"``."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1 << 40}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def to_bytes(size: Size) -> int:
    """Return *size* in bytes; fractions of a byte are dropped."""
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = _TEXT.fullmatch(size)
    if match is None:
        raise ValueError(f"not a size: {size!r}; write bytes, or for example '24GB' or '600MB'")
    # Fraction, because 11.2 * 2**30 in floating point is not what Python's int() of it says.
    return int(Fraction(match[1]) * _UNITS[match[2].upper()])


def to_text(nbytes: int) -> str:
    """Return *nbytes* the way torch writes sizes in its messages: ``"4.00 GiB"``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} bytes"
