"""What the page's script draws: the document's tests and samples, written in columns.

Samples are in MiB and thinned to what a screen can show; figures of tests stay exact.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from pytest_gpushare.report.html.markup import (
    Record,
    kept_by_server,
    label,
    lasted,
    severity,
    visible,
)
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
    """Kind (`ollama`, `others`, `server`, `rest`, `worker`), the name of the worker or of the other
    server, and what it held."""


def holders(samples: Record, at: Sequence[int], total: int, workers: Sequence[Record]) -> Holders:
    """The samples at these indices, attributed as far as can be.

    What no part accounts for is a part `rest`, unless it stays below a hundredth of *total*:
    figures of one moment are read one after another.
    """
    times, used = ([samples[name][row] for row in at] for name in ("at_s", "used_bytes"))
    parts = [("ollama", "", samples["ollama_bytes"]), ("others", "", samples["others_bytes"])]
    servers = samples.get("servers_bytes", {})
    parts += [("server", visible(name), held) for name, held in servers.items()]
    outside = len(parts)
    order = {worker["id"]: place for place, worker in enumerate(workers)}
    by_worker = samples["workers_bytes"]
    names = sorted(by_worker, key=lambda name: order.get(name, len(order)))
    parts += [("worker", name, by_worker[name]) for name in names]
    read: list[Values] = [[held[row] for row in at] for _, _, held in parts]
    columns = without_workers(used, settled(times, used, read, total), total, outside)
    found: list[tuple[str, str, Values]] = [
        (kind, name, values)
        for (kind, name, _), values in zip(parts, columns, strict=True)
        if any(values)
    ]
    rest = _rest(used, [values for _, _, values in found])
    if max(rest, default=0) > total / 100:
        first_worker = sum(kind != "worker" for kind, _, _ in found)
        found.insert(first_worker, ("rest", "", rest))
    return Holders(times, used, found)


def settled(
    times: Sequence[float], used: Values, parts: Sequence[Values], total: int
) -> list[list[float | None]]:
    """The parts, where the next reading of them fits a sample better than the last one did.

    VRAM in use is read more often than who holds it. What changed in between has happened by
    the next reading: a sample that its sum accounts for belongs to it.
    """
    columns = [list(values) for values in parts]
    near = total / 200
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
    used: Values, parts: Sequence[Values], total: int, outside: int = 2
) -> list[list[float | None]]:
    """The parts, also where no reading was made as no worker lived.

    *parts* begins with those *outside* of the run: Ollama, which may be known from its own answers,
    and others. Where the nearest reading, or these figures of it, account for all that is in use,
    they hold here too.
    """
    columns = [list(values) for values in parts]
    near = total / 200
    others = parts[1]
    known = [row for row, value in enumerate(others) if value is not None]
    for row, held in enumerate(used):
        if not known or held is None or others[row] is not None:
            continue
        reading = known[max(0, bisect_right(known, row) - 1)]
        whole = [column[reading] for column in parts]
        # A worker that says good-bye is no longer asked, and holds its context a little longer.
        for likely in (whole, whole[:outside], [parts[0][row], *whole[1:outside]]):
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
    samples: Record, most: int, total: int, workers: Sequence[Record]
) -> dict[str, Any] | None:
    """Times, what is used, and the parts of it from the ground up; None without a sample.

    *most* bounds the number of samples.
    """
    at = thinned(samples["used_bytes"], most)
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
_COLUMNS = (
    "need_bytes", "peak_bytes", "left_bytes", "waited_s", "attempts", "outcome", "need_source",
    "peak_source",
)  # fmt: skip


def data(report: Record) -> dict[str, Any]:
    """The object that the page's script reads."""
    workers, samples = report["workers"], report["samples"]["devices"]
    columns = sum(3 + len(held["workers_bytes"]) for held in samples.values())
    most = max(500, _MOST_VALUES // max(1, columns))
    of_models = (report["ollama"] or {}).get("tests") or {"phases": []}
    return {
        "duration": _duration(report),
        "simulated": report["run"]["simulated"],
        "devices": [
            {
                **_device(device, samples.get(device["uuid"]), most, workers),
                "leases": _leases(report["samples"]["leases"], device["uuid"]),
            }
            for device in report["devices"]
        ],
        "workers": [
            {"id": worker["id"], "device": worker["device"], "colour": colour}
            for worker, colour in zip(workers, colours(workers), strict=True)
        ],
        "events": [
            {
                "at": event["at_s"],
                "state": severity(event["kind"]),
                "text": visible(event["text"] or event["kind"]),
                "device": event["facts"].get("device"),
            }
            for event in report["events"][:MOST_EVENTS]
        ],
        "phases": [
            {"model": visible(phase["model"]), "start": phase["start_s"], "end": phase["end_s"]}
            for phase in of_models["phases"][:MOST_EVENTS]
        ],
        "tests": _tests(report["tests"], workers),
    }


def colours(workers: Sequence[Record]) -> list[int | None]:
    """The number of each worker's colour; None for CPU workers, which share one."""
    numbers: list[int | None] = []
    for worker in workers:
        known = sum(held is not None for held in numbers)
        numbers.append(known % WORKER_COLOURS if worker["role"] == "gpu" else None)
    return numbers


def _duration(report: Record) -> float:
    """The end of the time axis: clocks of workers may be a little ahead of the run's."""
    moments = [report["run"]["duration_s"]]
    moments += [test["end_s"] or 0.0 for test in report["tests"]]
    moments += [event["at_s"] for event in report["events"][:MOST_EVENTS]]
    moments += [at for held in report["samples"]["devices"].values() for at in held["at_s"][-1:]]
    return float(max(moments))


def _device(
    device: Record, samples: Record | None, most: int, workers: Sequence[Record]
) -> dict[str, Any]:
    return {
        "uuid": device["uuid"],
        "label": label(device),
        "name": visible(device["name"]),
        "total": device["total_bytes"],
        "used_at_start": device["used_at_start_bytes"],
        "reservation": device["reservation_bytes"],
        "resident": device["resident_bytes"],
        "kept": [each._asdict() for each in kept_by_server(device)],
        "safety_buffer": device["safety_buffer_bytes"],
        "budget": device["budget_bytes"],
        "samples": drawn(samples, most, device["total_bytes"], workers) if samples else None,
    }


def _leases(leases: Sequence[Record], uuid: str) -> list[dict[str, Any]]:
    """What other sessions had leased of this device, and when."""
    return [
        {
            "start": lease["start_s"],
            "end": lease["end_s"],
            "bytes": lease["bytes"],
            "session": visible(lease["session"]),
        }
        for lease in leases
        if lease["device"] == uuid
    ][:MOST_EVENTS]


def _tests(tests: Sequence[Record], workers: Sequence[Record]) -> dict[str, Any]:
    numbers = {worker["id"]: at for at, worker in enumerate(workers)}
    files: dict[str, int] = {}
    file_of, names = [], []
    for test in tests:
        file, separator, name = visible(test["nodeid"]).partition("::")
        file_of.append(files.setdefault(file, len(files)))
        names.append(separator + name)
    times = [lasted(test["start_s"], test["end_s"]) for test in tests]
    columns: dict[str, list[Any]] = {
        "file": file_of,
        "name": names,
        "worker": [numbers.get(test["worker"]) for test in tests],
        "start": [test["start_s"] for test in tests],
        "took": [None if took is None else round(took, 3) for took in times],
        "notes": [visible("\n".join(test["notes"])) for test in tests],
        **{name: [test[name] for test in tests] for name in _COLUMNS},
        "least": [test["peak_exact"] is False for test in tests],
    }
    return {
        "count": len(tests),
        "files": list(files),
        **{name: _column(values) for name, values in columns.items()},
    }


def _column(values: list[Any]) -> Any:
    """The values; `{"all": value}` where they are one, an index where words repeat."""
    different = set(values)
    if len(different) == 1:
        return {"all": values[0]}
    if len(values) > 100 and len(different) < 20 and any(isinstance(v, str) for v in different):
        words = list(dict.fromkeys(values))
        return {"words": words, "of": [words.index(value) for value in values]}
    return values
