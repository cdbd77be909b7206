"""Samples as the timeline draws them: thinned, and written as differences in MiB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gpushare.report.page.holders import Values, figures, holders
from pytest_gpushare.report.page.words import number
from pytest_gpushare.units import MB


def drawn(
    samples: Mapping[str, Any],
    most: int,
    total: float | None,
    workers: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any] | None:
    """Times, what is used, and the parts of it from the ground up; None without a sample.

    *most* bounds the number of samples.
    """
    times = samples.get("at_s") or ()
    used = figures(samples.get("used_bytes"), range(len(times)))
    at = [index for index in thinned(used, most) if number(times[index]) is not None]
    if not at:
        return None
    told = holders(samples, at, total, workers)
    return {
        "at_ms": differences([moment * 1000 for moment in told.times]),
        "used": differences(_mib(told.used)),
        "parts": [
            {"kind": kind, "name": name, "held": differences(_mib(values))}
            for kind, name, values in told.parts
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


def _mib(values: Values) -> list[float | None]:
    return [None if value is None else value / MB for value in values]
