"""Samples as the timeline draws them: thinned, told apart, written as differences in MiB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gpushare.report.page.words import in_order, number
from pytest_gpushare.units import MB

Values = Sequence[float | None]

# Seconds from one reading of who holds what to the next, at most: one, and some delay.
_BETWEEN_READINGS = 1.5


def drawn(
    samples: Mapping[str, Any],
    most: int,
    total: float | None,
    workers: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any] | None:
    """Times, what is used, and the parts of it from the ground up; None without a sample.

    *most* bounds the number of samples. What no part accounts for is a part `rest`, unless it
    stays below a hundredth of *total*: figures of one moment are read one after another.
    """
    times = samples.get("at_s") or ()
    used = _values(samples.get("used_bytes"), range(len(times)))
    at = [index for index in thinned(used, most) if number(times[index]) is not None]
    if not at:
        return None
    parts = [("ollama", "", samples.get("ollama_bytes"))]
    parts.append(("others", "", samples.get("others_bytes")))
    held_by = in_order(samples.get("workers_bytes"), workers)
    parts += [("worker", worker, held) for worker, held in held_by]
    kept = [used[index] for index in at]
    columns = settled(
        [times[index] for index in at], kept, [_values(held, at) for _, _, held in parts], total
    )
    told: list[tuple[str, str, Values]] = [
        (kind, name, values)
        for (kind, name, _), values in zip(parts, columns, strict=True)
        if any(values)
    ]
    rest = _rest(kept, [values for _, _, values in told])
    if max(rest, default=0) > (total or 0) / 100:
        first_worker = sum(kind != "worker" for kind, _, _ in told)
        told.insert(first_worker, ("rest", "", rest))
    return {
        "at_ms": differences([times[index] * 1000 for index in at]),
        "used": differences(_mib(kept)),
        "parts": [
            {"kind": kind, "name": name, "held": differences(_mib(values))}
            for kind, name, values in told
        ],
    }


def thinned(values: Values, most: int) -> list[int]:
    """Indices of about *most* values: of each stretch the least and the largest, and the ends."""
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = max(1, most // 2 - 1)
    kept = {0, count - 1}
    for stretch in range(stretches):
        first, last = count * stretch // stretches, count * (stretch + 1) // stretches
        known = [(value, at) for at, value in enumerate(values[first:last]) if value is not None]
        # A gap stays a gap.
        kept |= {first + min(known)[1], first + max(known)[1]} if known else {first}
    return sorted(kept)


def settled(
    times: Sequence[float], used: Values, parts: Sequence[Values], total: float | None
) -> list[list[float | None]]:
    """The parts, where the next reading of them fits a sample better than the last one did.

    VRAM in use is read more often than who holds it. What changed in between has happened by
    the next reading: a sample that its sum accounts for belongs to it.
    """
    columns = [list(values) for values in parts]
    near = (total or 0) / 200
    rows = [tuple(column[row] for column in columns) for row in range(len(times))]
    following: tuple[float | None, ...] | None = None
    read_at = 0.0
    for row in range(len(rows) - 2, -1, -1):
        if rows[row] != rows[row + 1]:
            following, read_at = rows[row + 1], times[row + 1]
        held = used[row]
        if following is None or held is None or read_at - times[row] > _BETWEEN_READINGS:
            continue
        before, after = (held - sum(filter(None, part)) for part in (rows[row], following))
        if abs(after) < abs(before) - near and after > -near:
            for column, value in zip(columns, following, strict=True):
                column[row] = value
    return columns


def differences(values: Sequence[float | None]) -> list[int | None]:
    """Each value, rounded, less the known one before it: few digits where little changes."""
    written: list[int | None] = []
    before = 0
    for value in values:
        if value is None:
            written.append(None)
        else:
            written.append(round(value) - before)
            before = round(value)
    return written


def _rest(used: Values, parts: Sequence[Values]) -> list[float]:
    return [
        max(0.0, (held or 0) - sum(values[index] or 0 for values in parts))
        for index, held in enumerate(used)
    ]


def _mib(values: Values) -> list[float | None]:
    return [None if value is None else value / MB for value in values]


def _values(held: object, indices: Sequence[int]) -> list[float | None]:
    """The figures at these indices, whatever the document has there."""
    if not isinstance(held, (list, tuple)):
        return [None] * len(indices)
    return [number(held[index]) if index < len(held) else None for index in indices]
