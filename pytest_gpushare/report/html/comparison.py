"""What differs between the reports of two runs: peaks, durations, outcomes, Ollama, settings.

Works on report documents as `read_report` returns them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pytest_gpushare.report.html.markup import (
    UNKNOWN,
    Markup,
    Record,
    breakable,
    generator,
    kept_by_server,
    label,
    lasted,
    peak_text,
    size,
    span,
    table,
    tag,
    whole,
)
from pytest_gpushare.text import one_line
from pytest_gpushare.units import GB, MB, plural

MOST_TESTS = 10
"""Tests that are listed, of each kind of difference."""
_LONGEST = 200

# Below these nothing has changed: clocks and allocators differ from run to run.
_LEAST_SECONDS, _LEAST_BYTES, _LEAST_PART = 0.5, 64 * MB, 0.1


class Difference(NamedTuple):
    """One figure or fact of both runs."""

    name: str
    before: str
    after: str
    change: str = ""
    """`+1.2 GB`, `-35 %`; empty where there is no measure."""
    state: str = ""
    """`good` or `bad` where that can be said, else empty."""


class ComparedSubject(NamedTuple):
    """The differences of one subject."""

    title: str
    rows: tuple[Difference, ...]
    note: str = ""
    """How many more there are, or what cannot be compared."""


def compare(old: Record, new: Record) -> list[ComparedSubject]:
    """The sections, without those in which nothing differs; `Run` is always there."""
    sections = [
        ComparedSubject("Run", tuple(_run(old, new))),
        _devices(old, new),
        *_tests(old, new),
        ComparedSubject("Ollama", tuple(_ollama(old, new))),
        ComparedSubject("Settings", tuple(_settings(old, new))),
    ]
    return [section for section in sections if section.rows or section.note]


def _run(old: Record, new: Record) -> Iterator[Difference]:
    runs = old["run"], new["run"]
    yield Difference("started", *(run["started"][:19].replace("T", " ") for run in runs))
    yield _duration("duration", *(run["duration_s"] for run in runs))
    counts = [Counter(test["outcome"] for test in report["tests"]) for report in (old, new)]
    for outcome in sorted(counts[0] | counts[1]):
        before, more = counts[0][outcome], counts[1][outcome] - counts[0][outcome]
        better = _BETTER.get(outcome)
        state = "" if better is None or not more else "good" if (more > 0) == better else "bad"
        change = f"{more:+d}" if more else ""
        yield Difference(outcome, str(before), str(before + more), change, state)
    plans = old["plan"], new["plan"]
    for name, key in (("GPU workers", "gpu_workers"), ("CPU workers", "cpu_workers")):
        yield Difference(name, *(str(plan[key]) for plan in plans))
    yield from _changed("limited by", *(", ".join(plan["limited_by"]) for plan in plans))
    for name in ("driver", "pytest", "xdist", "python", "platform", "simulated"):
        yield from _changed(name, *(run[name] for run in runs))
    yield from _changed("written by", generator(old), generator(new))


_BETTER = {"passed": True, "failed": False, "error": False, "crashed": False}
"""Outcome -> whether more of it is better."""


def _devices(old: Record, new: Record) -> ComparedSubject:
    before, after = old["devices"], {device["uuid"]: device for device in new["devices"]}
    pairs = [(one, after[one["uuid"]]) for one in before if one["uuid"] in after]
    note = ""
    if not pairs and before and after:
        # Two machines: device by device, as they are numbered.
        pairs = list(zip(before, new["devices"], strict=False))
        note = "the devices are not the same: they are compared by their order"
    rows: list[Difference] = []
    for one, other in pairs:
        name = one_line(label(other), _LONGEST)
        rows += _changed(f"{name} name", one["name"], other["name"])
        rows += _peaks(f"{name} peak in use", one, other, "peak_used", always=True)
        rows += _peaks(f"{name} peak of tests", one, other, "peak_tests", always=True)
        rows += _bytes(f"{name} usable for tests", one["budget_bytes"], other["budget_bytes"])
        was, now = (
            {kept.name: kept.reservation for kept in kept_by_server(device)}
            for device in (one, other)
        )
        for server in {**was, **now}:
            rows += _bytes(f"{name} kept for {server}", was.get(server, 0), now.get(server, 0))
        rows += _bytes(f"{name} total", one["total_bytes"], other["total_bytes"])
    return ComparedSubject("VRAM", tuple(rows), note)


def _tests(old: Record, new: Record) -> Iterator[ComparedSubject]:
    before, after = ({test["nodeid"]: test for test in report["tests"]} for report in (old, new))
    both = [(one, after[nodeid]) for nodeid, one in before.items() if nodeid in after]
    outcomes = [_outcome(*pair) for pair in both if pair[0]["outcome"] != pair[1]["outcome"]]
    yield _listed("Outcomes", outcomes)
    yield _listed("Peaks of tests", _largest(both, lambda test: test["peak_bytes"], _peaks))
    yield _listed("Durations of tests", _largest(both, _took, _durations))
    rows = [Difference(_name(t), "ran", "did not run") for n, t in before.items() if n not in after]
    rows += [
        Difference(_name(t), "did not run", "ran") for n, t in after.items() if n not in before
    ]
    yield _listed("Tests of one run only", rows)


def _outcome(one: Record, other: Record) -> Difference:
    now = other["outcome"]
    better = _BETTER.get(now)
    state = "" if better is None else "good" if better else "bad"
    return Difference(_name(one), one["outcome"], now, "", state)


def _largest(
    both: Sequence[tuple[Record, Record]],
    figure: Callable[[Record], float | None],
    rows: Callable[[str, Record, Record], Iterator[Difference]],
) -> list[Difference]:
    """The rows of tests whose figure changed, the largest change first."""
    found: list[tuple[float, Difference]] = []
    for one, other in both:
        before, after = figure(one), figure(other)
        if before is not None and after is not None:
            found += [(abs(after - before), row) for row in rows(_name(one), one, other)]
    return [row for _, row in sorted(found, key=lambda pair: (-pair[0], pair[1].name))]


def _peaks(
    name: str, one: Record, other: Record, key: str = "peak", *, always: bool = False
) -> Iterator[Difference]:
    """As `_bytes`, of figures that may be lower bounds."""
    held = [record[f"{key}_bytes"] for record in (one, other)]
    exact = [record[f"{key}_exact"] for record in (one, other)]
    for row in _bytes(name, *held, always=always):
        # A lower bound that is read by chance, as a test's is, is no measure of what has changed.
        change = row.change if always or False not in exact else ""
        before, after = map(peak_text, held, exact)
        yield row._replace(before=before, after=after, change=change)


def _took(test: Record) -> float | None:
    return lasted(test["start_s"], test["end_s"])


def _durations(name: str, one: Record, other: Record) -> Iterator[Difference]:
    row = _duration(name, _took(one), _took(other))
    if row.state:
        yield row


def _listed(title: str, rows: Sequence[Difference]) -> ComparedSubject:
    more = len(rows) - MOST_TESTS
    note = f"and {plural(more, 'more test')}" if more > 0 else ""
    return ComparedSubject(title, tuple(rows[:MOST_TESTS]), note)


def _ollama(old: Record, new: Record) -> Iterator[Difference]:
    servers = [report["ollama"] or {} for report in (old, new)]
    for key in ("version", "answered"):
        yield from _changed(key, *(server.get(key) for server in servers))
    models = [{each["name"]: each for each in server.get("models", ())} for server in servers]
    for name in dict.fromkeys([*models[0], *models[1]]):
        placed = (_placed(held.get(name)) for held in models)
        yield from _changed(one_line(name, _LONGEST), *placed)
    verdicts = ["; ".join(server.get("verdict", ())) for server in servers]
    spilled = [server.get("spilled_under_tests", False) for server in servers]
    state = "" if spilled[0] == spilled[1] else "bad" if spilled[1] else "good"
    for row in _changed("verdict", *verdicts):
        yield row._replace(state=state)


def _placed(model: Record | None) -> str:
    if model is None:
        return "not loaded"
    return f"{size(model['size_vram_bytes'])} of {size(model['size_bytes'])} on the GPU"


def _settings(old: Record, new: Record) -> Iterator[Difference]:
    settings = [report["plan"]["settings"] for report in (old, new)]
    for key in dict.fromkeys([*settings[0], *settings[1]]):
        values = (held[key]["value"] if key in held else None for held in settings)
        yield from _changed(f"gpu_share_{one_line(key, 80)}", *values)


def _changed(name: str, before: object, after: object) -> Iterator[Difference]:
    if before != after:
        yield Difference(name, _text(before), _text(after))


def _duration(name: str, before: float | None, after: float | None) -> Difference:
    """A row of durations; without a state where it hardly changed."""
    if before is None or after is None:
        return Difference(name, span(before), span(after))
    part = round(100 * (after - before) / before) if before > 0 else 0
    change = f"{part:+d} %" if part else ""
    state = ""
    if abs(after - before) >= max(_LEAST_SECONDS, _LEAST_PART * before):
        state = "bad" if after > before else "good"
    return Difference(name, span(before), span(after), change, state)


def _bytes(
    name: str, before: float | None, after: float | None, *, always: bool = False
) -> Iterator[Difference]:
    """A row of sizes; none where they hardly changed, unless `always`."""
    change = ""
    if before is not None and after is not None:
        more = after - before
        always = always or abs(more) >= max(_LEAST_BYTES, _LEAST_PART * before)
        if abs(more) >= GB / 100:
            change = f"{'+' if more > 0 else '-'}{size(abs(more))}"
    if always or (before is None) != (after is None):
        yield Difference(name, size(before), size(after), change)


def _text(value: object) -> str:
    """A text or a boolean of a document."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return one_line(str(value), 4 * _LONGEST)


def _name(test: Record) -> str:
    return one_line(test["nodeid"], 4 * _LONGEST)


def document(sections: Sequence[ComparedSubject]) -> dict[str, Any]:
    """The comparison as a JSON document, its figures as they are shown."""
    return {
        "schema": 1,
        "sections": [
            {
                "title": section.title,
                "note": section.note or None,
                "rows": [row._asdict() for row in section.rows],
            }
            for section in sections
        ],
    }


def page(names: Sequence[str], sections: Sequence[ComparedSubject]) -> str:
    """The HTML; `names` are those of the two files, the earlier run first."""
    before, after = names
    body = Markup("\n").join(
        [
            tag(
                "header",
                tag("p", "GPU share report", cls="eyebrow"),
                tag("h1", "Two runs compared"),
                tag("p", tag("bdi", before), " → ", tag("bdi", after), cls="subtitle"),
            ),
            tag("main", *(_section(section) for section in sections)),
            tag("footer", "This page is one file and asks no network."),
        ]
    )
    return whole("Two runs compared", ("page.css", "media.css"), [body])


def _section(section: ComparedSubject) -> Markup:
    heads = ["", "before", "after", "change"]
    return tag(
        "section",
        tag("h2", section.title),
        table(section.title, heads, map(_row, section.rows)),
        tag("p", section.note) if section.note else Markup(""),
    )


def _row(row: Difference) -> list[str]:
    values = [Markup("").join(breakable(text)) for text in (row.before, row.after)]
    return [
        tag("code", *breakable(row.name)),
        *values,
        tag("span", row.change, cls=row.state or None),
    ]
