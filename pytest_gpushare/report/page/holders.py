"""Who held the VRAM of a device that was in use, from readings that are further apart."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pytest_gpushare.report.page.words import in_order, number

Values = Sequence[float | None]

# Seconds from one reading of who holds what to the next, at most: one, and some delay.
_BETWEEN_READINGS = 1.5


class Holders(NamedTuple):
    """Columns of samples, all of one length; bytes."""

    times: list[float]
    """Seconds since the run started."""
    used: Values
    parts: list[tuple[str, str, Values]]
    """Kind (`ollama`, `others`, `rest`, `worker`), the worker's name, and what it held."""


def holders(
    samples: Mapping[str, Any],
    at: Sequence[int],
    total: float | None,
    workers: Sequence[Mapping[str, Any]],
) -> Holders:
    """The samples at these indices, of which the times are known, told apart as far as can be.

    What no part accounts for is a part `rest`, unless it stays below a hundredth of *total*:
    figures of one moment are read one after another.
    """
    times = [samples["at_s"][index] for index in at]
    used = figures(samples.get("used_bytes"), at)
    parts = [("ollama", "", samples.get("ollama_bytes"))]
    parts.append(("others", "", samples.get("others_bytes")))
    held_by = in_order(samples.get("workers_bytes"), workers)
    parts += [("worker", worker, held) for worker, held in held_by]
    columns = [figures(held, at) for _, _, held in parts]
    columns = settled(times, used, columns, total)
    columns = without_workers(used, columns, total)
    told: list[tuple[str, str, Values]] = [
        (kind, name, values)
        for (kind, name, _), values in zip(parts, columns, strict=True)
        if any(values)
    ]
    rest = _rest(used, [values for _, _, values in told])
    if max(rest, default=0) > (total or 0) / 100:
        first_worker = sum(kind != "worker" for kind, _, _ in told)
        told.insert(first_worker, ("rest", "", rest))
    return Holders(times, used, told)


def figures(held: object, indices: Sequence[int]) -> list[float | None]:
    """The figures at these indices, whatever the document has there."""
    if not isinstance(held, (list, tuple)):
        return [None] * len(indices)
    return [number(held[index]) if index < len(held) else None for index in indices]


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


def without_workers(
    used: Values, parts: Sequence[Values], total: float | None
) -> list[list[float | None]]:
    """The parts, told also where no reading was made as no worker lived.

    *parts* begins with Ollama, which may be known from its own answers, and others. Where the
    nearest reading, or these two figures of it, account for all that is in use, they hold here too.
    """
    columns = [list(values) for values in parts]
    near = (total or 0) / 200
    others = parts[1]
    told = [row for row, value in enumerate(others) if value is not None]
    for row, held in enumerate(used):
        if not told or held is None or others[row] is not None:
            continue
        reading = told[max(0, bisect_right(told, row) - 1)]
        whole = [column[reading] for column in parts]
        # A worker that says good-bye is no longer asked, and holds its context a little longer.
        for likely in (whole, whole[:2], [parts[0][row], whole[1]]):
            if abs(held - sum(filter(None, likely))) <= near:
                for column, value in zip(columns, likely, strict=False):
                    column[row] = value
                break
    return columns


def _rest(used: Values, parts: Sequence[Values]) -> list[float]:
    return [
        max(0.0, (held or 0) - sum(values[index] or 0 for values in parts))
        for index, held in enumerate(used)
    ]
