"""What the page's script draws: the document's tests and samples, written in columns.

Samples are in MiB and thinned to what a screen can show; figures of tests stay exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_gpushare.report.page.markup import visible
from pytest_gpushare.report.page.samples import drawn
from pytest_gpushare.report.page.words import each, label, number, severity

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
