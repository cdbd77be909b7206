"""One report made of several: of the shards of a CI run, each on a host or device of its own.

A test keeps its shard, so that one that ran in several shards is there several times. Peaks of a
device that several shards used are the highest of them: what was used at different times is never
added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pytest_gpushare.report.document import SCHEMA, generator
from pytest_gpushare.text import one_line

Document = Mapping[str, Any]
Name = TypeVar("Name", str, tuple[str, str])

MOST_TESTS = 500_000
"""Of all shards together; what is more is counted under problems."""

_LARGEST = (
    "peak_used_bytes",
    "peak_workers_bytes",
    "peak_tests_bytes",
    "peak_unattributed_bytes",
    "used_at_start_bytes",
    "budget_bytes",
    "workers",
)
"""Figures of a device of which the largest of all shards counts."""
_TIMES = ("at_s", "start_s", "end_s", "started_s", "ended_s")
_MOST_NAME = 60
_NO_TESTS = 5


class Shard(NamedTuple):
    """A report and its place among the others."""

    name: str
    """Unique among the shards; printable."""
    document: Document
    offset: float
    """Seconds that it started after the first one."""

    def worker(self, name: object) -> str:
        """A worker's name that no worker of another shard has."""
        return f"{self.name}/{one_line(str(name), 200)}"

    def at(self, seconds: float) -> float:
        """A time of this shard as seconds since the first one started."""
        return round(seconds + self.offset, 3)

    def moved(self, record: Document) -> dict[str, Any]:
        """A record of this shard with its times as `at` gives them."""
        times = {name: record[name] for name in _TIMES if record.get(name) is not None}
        return {**record, **{name: self.at(seconds) for name, seconds in times.items()}}


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each shard: of its file, or of its directory where the files have one name."""
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{path.parent.name}/{path.stem}" for path in paths]
    found: list[str] = []
    for stem in stems:
        name = one_line(stem, _MOST_NAME) or "report"
        number = itertools.count(2)
        unique = name
        while unique in found:
            unique = f"{name}#{next(number)}"
        found.append(unique)
    return found


def merged(documents: Sequence[Document], names: Sequence[str]) -> dict[str, Any]:
    """The documents as one, valid by the schema as each of them is."""
    starts = [_start(document) for document in documents]
    first = min(start for start in starts if start is not None) if any(starts) else None
    shards = [
        Shard(
            name,
            document,
            0.0 if first is None or start is None else (start - first).total_seconds(),
        )
        for name, document, start in zip(names, documents, starts, strict=True)
    ]
    tests = [
        {**shard.moved(test), "worker": shard.worker(test["worker"]), "shard": shard.name}
        for shard in shards
        for test in shard.document["tests"]
    ]
    problems = _texts(shards, "problems")
    if len(tests) > MOST_TESTS:
        problems.append(f"{len(tests) - MOST_TESTS} more tests ran than a report can hold")
    return {
        "schema": SCHEMA,
        "generator": generator(),
        "run": _run(shards, first),
        "plan": _plan(shards),
        "devices": list(_devices(shards)),
        "workers": [
            {**shard.moved(worker), "id": shard.worker(worker["id"]), "shard": shard.name}
            for shard in shards
            for worker in shard.document["workers"]
        ],
        "tests": tests[:MOST_TESTS],
        "ollama": _ollama(shards),
        **_servers(shards),
        "events": _events(shards),
        "samples": {
            "devices": _samples(shards),
            "leases": [
                shard.moved(lease)
                for shard in shards
                for lease in shard.document["samples"]["leases"]
            ],
        },
        "summary": _texts(shards, "summary"),
        "hints": _texts(shards, "hints"),
        "shortages": _texts(shards, "shortages"),
        "leaks": [
            {**leak, "worker": shard.worker(leak["worker"])}
            for shard in shards
            for leak in shard.document["leaks"]
        ],
        "problems": problems,
        "shards": [_shard(shard) for shard in shards],
    }


def _start(document: Document) -> datetime | None:
    try:
        found = datetime.fromisoformat(document["run"]["started"].replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


def exit_status(codes: Iterable[int]) -> int:
    """The exit code of all: that of the first which did not succeed.

    A shard without tests does not fail the others.
    """
    found = list(codes)
    bad = [code for code in found if code not in (0, _NO_TESTS)]
    if bad:
        return bad[0]
    return _NO_TESTS if found and all(code == _NO_TESTS for code in found) else 0


def _run(shards: Sequence[Shard], first: datetime | None) -> dict[str, Any]:
    runs = [shard.document["run"] for shard in shards]
    ends = [shard.offset + shard.document["run"]["duration_s"] for shard in shards]
    one = runs[0]
    started = first.isoformat(timespec="milliseconds") if first is not None else one["started"]
    return {
        "started": started,
        "duration_s": round(max(ends), 3),
        "exit_status": exit_status(run["exit_status"] for run in runs),
        "finished": all(run["finished"] for run in runs),
        **{
            name: _common([run[name] for run in runs])
            for name in ("python", "pytest", "xdist", "platform", "driver")
        },
        "simulated": any(run["simulated"] for run in runs),
    }


def _common(values: Sequence[str | None]) -> str | None:
    """The value of all, or the different ones with commas between them."""
    found = list(dict.fromkeys(value for value in values if value is not None))
    return ", ".join(found) if found else None


def _plan(shards: Sequence[Shard]) -> dict[str, Any]:
    plans = [shard.document["plan"] for shard in shards]
    absences = [f"{s.name}: {p['absence']}" for s, p in zip(shards, plans, strict=True)
                if p["absence"]]  # fmt: skip
    has_gpu = any(plan["gpu_workers"] for plan in plans)
    return {
        "gpu_workers": sum(plan["gpu_workers"] for plan in plans),
        "cpu_workers": sum(plan["cpu_workers"] for plan in plans),
        "in_process": all(plan["in_process"] for plan in plans),
        "limited_by": _union(plan["limited_by"] for plan in plans),
        "limits": {},
        "presets": _union(plan["presets"] for plan in plans),
        "absence": "" if has_gpu else "; ".join(absences),
        "shortage": "" if has_gpu else "; ".join(p["shortage"] for p in plans if p["shortage"]),
        "needed_bytes": max(plan["needed_bytes"] for plan in plans),
        "ollama_needs": None,
        "settings": _settings(plans),
    }


def _settings(plans: Sequence[Document]) -> dict[str, dict[str, str]]:
    keys = _union(plan["settings"] for plan in plans)
    result = {}
    for key in keys:
        found = [plan["settings"][key] for plan in plans if key in plan["settings"]]
        result[key] = {
            part: " | ".join(dict.fromkeys(each[part] for each in found))
            for part in ("value", "origin")
        }
    return result


def _union(lists: Iterable[Iterable[Name]]) -> list[Name]:
    return list(dict.fromkeys(each for found in lists for each in found))


def _devices(shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    found: dict[str, list[Document]] = {}
    for shard in shards:
        for device in shard.document["devices"]:
            found.setdefault(device["uuid"], []).append(device)
    for devices in found.values():
        first = dict(devices[0])
        for name in _LARGEST:
            values = [device[name] for device in devices if device[name] is not None]
            first[name] = max(values, default=None)
        for name in ("peak_used_exact", "peak_tests_exact"):
            exact = [device[name] for device in devices if device[name] is not None]
            first[name] = all(exact) if exact else None
        first["free_at_start_bytes"] = min(device["free_at_start_bytes"] for device in devices)
        yield first


def _events(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    found = [
        {**shard.moved(event), "text": f"{shard.name}: {event['text']}"}
        for shard in shards
        for event in shard.document["events"]
    ]
    return sorted(found, key=lambda event: event["at_s"])


def _texts(shards: Sequence[Shard], name: str) -> list[str]:
    return [f"{shard.name}: {text}" for shard in shards for text in shard.document[name]]


def _ollama(shards: Sequence[Shard]) -> dict[str, Any] | None:
    asked = [(s, s.document["ollama"]) for s in shards if s.document["ollama"] is not None]
    if not asked:
        return None
    servers = [server for _, server in asked]
    return {
        "address": ", ".join(_union([server["address"]] for server in servers)),
        "version": _common([server["version"] for server in servers]),
        "found_by": ", ".join(_union([server["found_by"]] for server in servers)),
        "answered": any(server["answered"] for server in servers),
        "on_this_host": any(server["on_this_host"] for server in servers),
        "problem": "; ".join(f"{s.name}: {server['problem']}" for s, server in asked
                             if server["problem"]),
        "models": [
            {**model, "name": f"{shard.name}: {model['name']}"}
            for shard, server in asked
            for model in server["models"]
        ],
        "verdict": [f"{shard.name}: {text}" for shard, server in asked
                    for text in server["verdict"]],
        "spilled_under_tests": any(server["spilled_under_tests"] for server in servers),
    }  # fmt: skip


def _servers(shards: Sequence[Shard]) -> dict[str, Any]:
    """The other servers, by name and address; nothing where none was asked."""
    found: dict[tuple[str, str], list[tuple[Shard, Document]]] = {}
    for shard in shards:
        for server in shard.document.get("servers", ()):
            key = server["name"], server["address"]
            found.setdefault(key, []).append((shard, server))
    merged_servers = [
        {
            "name": name,
            "address": address,
            "version": _common([server["version"] for _, server in asked]),
            "answered": any(server["answered"] for _, server in asked),
            "on_this_host": any(server["on_this_host"] for _, server in asked),
            "problem": "; ".join(f"{shard.name}: {server['problem']}" for shard, server in asked
                                 if server["problem"]),
            "vram_bytes": max((server["vram_bytes"] for _, server in asked
                               if server["vram_bytes"] is not None), default=None),
        }
        for (name, address), asked in found.items()
    ]  # fmt: skip
    return {"servers": merged_servers} if merged_servers else {}


_SAMPLED = ("used_bytes", "ollama_bytes", "others_bytes")


class Rows(NamedTuple):
    """The samples that one shard has of a device."""

    named: list[tuple[str, str]]
    """Of each further column what it is of: where it stands in the document, and the name."""
    rows: list[tuple[Any, ...]]
    """Time, the figures of the whole device, and these columns."""


def _samples(shards: Sequence[Shard]) -> dict[str, Any]:
    found: dict[str, list[Rows]] = {}
    for shard in shards:
        for uuid, columns in shard.document["samples"]["devices"].items():
            named = {
                **{("workers_bytes", shard.worker(name)): held
                   for name, held in columns["workers_bytes"].items()},
                **{("servers_bytes", name): held
                   for name, held in columns.get("servers_bytes", {}).items()},
            }  # fmt: skip
            times = [shard.at(seconds) for seconds in columns["at_s"]]
            lists = (times, *(columns[name] for name in _SAMPLED), *named.values())
            # As many rows as the shortest list has.
            rows = list(zip(*lists, strict=False))
            found.setdefault(uuid, []).append(Rows(list(named), rows))
    return {uuid: _columns(parts) for uuid, parts in found.items()}


def _columns(parts: Sequence[Rows]) -> dict[str, Any]:
    """The rows of all shards in the order of their times; each fills the columns that it has."""
    first = 1 + len(_SAMPLED)
    every = [
        (row, dict(zip(part.named, row[first:], strict=True)))
        for part in parts
        for row in part.rows
    ]
    every.sort(key=lambda each: each[0][0])
    result: dict[str, Any] = {
        name: [row[at] for row, _ in every] for at, name in enumerate(("at_s", *_SAMPLED))
    }
    result["workers_bytes"] = {}
    for kind, name in _union(part.named for part in parts):
        result.setdefault(kind, {})[name] = [held.get((kind, name)) for _, held in every]
    return result


def _shard(shard: Shard) -> dict[str, Any]:
    run = shard.document["run"]
    return {
        "name": shard.name,
        "started_s": round(shard.offset, 3),
        "duration_s": run["duration_s"],
        "exit_status": run["exit_status"],
        "finished": run["finished"],
        "tests": len(shard.document["tests"]),
    }
