"""What the page's script draws: the document's tests and samples, written in columns.

Samples are in MiB and thinned to what a screen can show; figures of tests stay exact.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pytest_gpushare.report.html.markup import each, in_order, label, number, severity, visible
from pytest_gpushare.units import MB

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
    """The samples at these indices, of which the times are known, attributed as far as can be.

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
    found: list[tuple[str, str, Values]] = [
        (kind, name, values)
        for (kind, name, _), values in zip(parts, columns, strict=True)
        if any(values)
    ]
    rest = _rest(used, [values for _, _, values in found])
    if max(rest, default=0) > (total or 0) / 100:
        first_worker = sum(kind != "worker" for kind, _, _ in found)
        found.insert(first_worker, ("rest", "", rest))
    return Holders(times, used, found)


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
    """The parts, also where no reading was made as no worker lived.

    *parts* begins with Ollama, which may be known from its own answers, and others. Where the
    nearest reading, or these two figures of it, account for all that is in use, they hold here too.
    """
    columns = [list(values) for values in parts]
    near = (total or 0) / 200
    others = parts[1]
    known = [row for row, value in enumerate(others) if value is not None]
    for row, held in enumerate(used):
        if not known or held is None or others[row] is not None:
            continue
        reading = known[max(0, bisect_right(known, row) - 1)]
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
    shown = holders(samples, at, total, workers)
    return {
        "at_ms": differences([moment * 1000 for moment in shown.times]),
        "used": differences(_mib(shown.used)),
        "parts": [
            {"kind": kind, "name": name, "held": differences(_mib(values))}
            for kind, name, values in shown.parts
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


# More marks than a timeline can show; the JSON document has them all.
MOST_EVENTS = 500
# Of all samples of a page: so a long run on many devices stays a page of a few MB.
_MOST_VALUES = 200_000

WORKER_COLOURS = 8
_FIGURES = ("need_bytes", "peak_bytes", "left_bytes", "waited_s", "attempts")
_WORDS = ("outcome", "need_source", "peak_source")


def data(document: Mapping[str, Any]) -> dict[str, Any]:
    """The object that the page's script reads."""
    run = document.get("run") or {}
    workers = each(document, "workers")
    tests = each(document, "tests")
    devices = each(document, "devices")
    samples = ((document.get("samples") or {}).get("devices")) or {}
    columns = sum(3 + len((held or {}).get("workers_bytes") or ()) for held in samples.values())
    most = max(500, _MOST_VALUES // max(1, columns))
    events = each(document, "events")[:MOST_EVENTS]
    return {
        "duration": _duration(run, tests, events, samples),
        "simulated": bool(run.get("simulated")),
        "devices": [
            _device(device, samples.get(device.get("uuid")), most, workers) for device in devices
        ],
        "workers": [
            {"id": str(worker.get("id")), "device": worker.get("device"), "colour": colour}
            for worker, colour in zip(workers, colours(workers), strict=True)
        ],
        "events": [
            {
                "at": number(event.get("at_s")),
                "state": severity(event.get("kind")),
                "text": visible(str(event.get("text") or event.get("kind"))),
                "device": (event.get("facts") or {}).get("device"),
            }
            for event in events
        ],
        "tests": _tests(tests, workers),
    }


def colours(workers: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """The number of each worker's colour; None for CPU workers, which share one."""
    numbers: list[int | None] = []
    for worker in workers:
        known = sum(held is not None for held in numbers)
        numbers.append(known % WORKER_COLOURS if worker.get("role") == "gpu" else None)
    return numbers


def _duration(
    run: Mapping[str, Any],
    tests: Iterable[Mapping[str, Any]],
    events: Iterable[Mapping[str, Any]],
    samples: Mapping[str, Any],
) -> float:
    """The end of the time axis; a run that was cut off knows no duration of its own."""
    moments = [number(run.get("duration_s"))]
    moments += [number(test.get("end_s")) for test in tests]
    moments += [number(event.get("at_s")) for event in events]
    moments += [number(at) for held in samples.values() for at in (held.get("at_s") or ())[-1:]]
    return max((moment for moment in moments if moment is not None), default=0.0)


def _device(
    device: Mapping[str, Any],
    samples: Mapping[str, Any] | None,
    most: int,
    workers: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    figures = {
        name: number(device.get(f"{name}_bytes"))
        for name in (
            "total",
            "used_at_start",
            "reservation",
            "resident",
            "safety_buffer",
            "budget",
        )
    }
    total = figures["total"]
    return {
        "uuid": device.get("uuid"),
        "label": label(device),
        "name": visible(str(device.get("name") or "")),
        **figures,
        "samples": drawn(samples, most, total, workers) if samples else None,
    }


def _tests(
    tests: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    numbers = {str(worker.get("id")): at for at, worker in enumerate(workers)}
    files: dict[str, int] = {}
    file_of, names = [], []
    for test in tests:
        file, separator, name = visible(str(test.get("nodeid"))).partition("::")
        file_of.append(files.setdefault(file, len(files)))
        names.append(separator + name)
    starts = [number(test.get("start_s")) for test in tests]
    ends = [number(test.get("end_s")) for test in tests]
    columns: dict[str, Any] = {
        "file": file_of,
        "name": names,
        "worker": [numbers.get(str(test.get("worker"))) for test in tests],
        "start": starts,
        "took": [
            None if start is None or end is None else round(end - start, 3)
            for start, end in zip(starts, ends, strict=True)
        ],
        "notes": [visible("\n".join(map(str, test.get("notes") or ()))) for test in tests],
        **{name: [number(test.get(name)) for test in tests] for name in _FIGURES},
        **{name: [_word(test.get(name)) for test in tests] for name in _WORDS},
        "least": [test.get("peak_exact") is False for test in tests],
    }
    return {
        "count": len(tests),
        "files": list(files),
        **{name: _column(values) for name, values in columns.items()},
    }


def _word(value: object) -> str | None:
    return None if value is None else str(value)


def _column(values: list[Any]) -> Any:
    """The values; `{"all": value}` where they are one, an index where words repeat."""
    different = set(values)
    if len(different) == 1:
        return {"all": values[0]}
    if len(values) > 100 and len(different) < 20 and any(isinstance(v, str) for v in different):
        words = list(dict.fromkeys(values))
        return {"words": words, "of": [words.index(value) for value in values]}
    return values
