"""The document as the page shows it: typed, and with every field.

This is the one place that looks at what a document has. One of another version, or of a run that
was cut off, lacks fields: a figure that is missing or none is None, a text empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class ShownRun:
    """The run as a whole."""

    started: str
    duration_s: float | None
    exit_status: float | None
    finished: bool | None
    simulated: bool | None
    python: str
    pytest: str
    xdist: str
    platform: str
    driver: str


@dataclass(frozen=True)
class ShownPlan:
    """The plan, and the settings in force."""

    gpu_workers: float | None
    cpu_workers: float | None
    limited_by: list[str]
    presets: list[str]
    needed_bytes: float | None
    absence: str
    settings: dict[str, Mapping[str, Any]]
    """Key -> `value` and `origin`."""


@dataclass(frozen=True)
class ShownDevice:
    """A device, its plan and its peaks."""

    uuid: str
    index: str
    name: str
    total_bytes: float | None
    used_at_start_bytes: float | None
    free_at_start_bytes: float | None
    reservation_bytes: float | None
    resident_bytes: float | None
    safety_buffer_bytes: float | None
    budget_bytes: float | None
    peak_used_bytes: float | None
    peak_used_exact: bool | None
    peak_tests_bytes: float | None
    peak_tests_exact: bool | None
    peak_unattributed_bytes: float | None
    host: str

    @property
    def label(self) -> str:
        """`GPU 0` or `box GPU 0`, as the terminal has it; without an index the UUID's start."""
        name = f"GPU {self.index}" if self.index else self.uuid[:12]
        return f"{self.host} {name}" if self.host else name


@dataclass(frozen=True)
class ShownWorker:
    """A worker."""

    id: str
    role: str
    device: str | None
    slot_bytes: float | None
    need_bytes: float | None
    peak_bytes: float | None
    peak_exact: bool | None
    peak_source: str
    crashed: bool | None
    started_s: float | None
    ended_s: float | None
    host: str

    @property
    def lived(self) -> float | None:
        """Seconds for which it lived."""
        return _between(self.started_s, self.ended_s)


@dataclass(frozen=True)
class ShownHost:
    """A host of a run on several."""

    name: str
    python: str
    gpu_workers: float | None
    cpu_workers: float | None
    shortage: str
    lost: str


@dataclass(frozen=True)
class ShownTest:
    """A test."""

    nodeid: str
    worker: str
    start_s: float | None
    end_s: float | None
    outcome: str | None
    need_bytes: float | None
    need_source: str | None
    peak_bytes: float | None
    peak_source: str | None
    peak_exact: bool | None
    left_bytes: float | None
    waited_s: float | None
    attempts: float | None
    notes: list[str]

    @property
    def took(self) -> float | None:
        """Seconds from its start to its end."""
        return _between(self.start_s, self.end_s)


@dataclass(frozen=True)
class ShownEvent:
    """Something that happened."""

    at_s: float | None
    kind: str
    text: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class ShownLeak:
    """VRAM that a test left behind; without a node id it was one of the suspects."""

    nodeid: str
    suspects: list[str]
    suspects_count: float | None
    bytes: float | None
    worker: str
    source: str


@dataclass(frozen=True)
class ShownModel:
    """A model of Ollama's."""

    name: str
    size_bytes: float | None
    size_vram_bytes: float | None
    spilled: bool | None


@dataclass(frozen=True)
class ShownOllama:
    """What Ollama said; its models are read by `Shown.models`."""

    address: str
    version: str
    found_by: str
    problem: str
    answered: bool | None
    spilled_under_tests: bool | None
    verdict: list[str]


@dataclass(frozen=True)
class ShownSamples:
    """The columns of one device as the document has them: `figures` reads them."""

    at_s: list[Any]
    used_bytes: list[Any]
    ollama_bytes: list[Any]
    others_bytes: list[Any]
    workers_bytes: Mapping[str, Any]


@dataclass(frozen=True)
class ShownLease:
    """What another session had leased of a device."""

    device: str
    session: str
    start_s: float | None
    end_s: float | None
    bytes: float | None


@dataclass(frozen=True)
class ShownPhase:
    """The time in which a model of Ollama's was loaded for tests."""

    model: str
    start_s: float | None
    end_s: float | None


@dataclass(frozen=True)
class Shown:
    """All that the page shows."""

    generator: str
    run: ShownRun
    plan: ShownPlan
    devices: list[ShownDevice]
    hosts: list[ShownHost]
    """None where the run had one alone."""
    workers: list[ShownWorker]
    tests: list[ShownTest]
    events: list[ShownEvent]
    leaks: list[ShownLeak]
    ollama: ShownOllama | None
    """None where no server was asked."""
    models: list[ShownModel]
    samples: Mapping[str, ShownSamples]
    """UUID -> the samples of the device."""
    leases: list[ShownLease]
    phases: list[ShownPhase]
    summary: list[str]
    hints: list[str]
    shortages: list[str]
    problems: list[str]


def shown(document: Mapping[str, Any]) -> Shown:
    """What the page shows of a document; nothing is required of it."""
    generator, ollama = _object(document.get("generator")), _object(document.get("ollama"))
    sampled = _object(document.get("samples"))
    samples = _object(sampled.get("devices"))
    return Shown(
        f"{generator.get('name', 'pytest-gpushare')} {generator.get('version', '')}".strip(),
        _read(ShownRun, document.get("run")),
        _read(ShownPlan, document.get("plan")),
        _each(ShownDevice, document.get("devices")),
        _each(ShownHost, document.get("hosts")),
        _each(ShownWorker, document.get("workers")),
        _each(ShownTest, document.get("tests")),
        _each(ShownEvent, document.get("events")),
        _each(ShownLeak, document.get("leaks")),
        _read(ShownOllama, ollama) if ollama else None,
        _each(ShownModel, ollama.get("models")),
        {str(uuid): _read(ShownSamples, held) for uuid, held in samples.items()},
        _each(ShownLease, sampled.get("leases")),
        _each(ShownPhase, _object(ollama.get("tests")).get("phases")),
        _texts(document.get("summary")),
        _texts(document.get("hints")),
        _texts(document.get("shortages")),
        _texts(document.get("problems")),
    )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def number(value: object) -> float | None:
    """The value, or None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def figures(column: object, indices: Iterable[int]) -> list[float | None]:
    """The figures of a column of samples at these indices; None where it has none."""
    held = _list(column)
    return [number(held[index]) if index < len(held) else None for index in indices]


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else list(value) if isinstance(value, tuple) else []


def _texts(value: object) -> list[str]:
    return [str(item) for item in _list(value)]


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "str": lambda value: "" if value is None else str(value),
    "str | None": lambda value: None if value is None else str(value),
    "float | None": number,
    "bool | None": lambda value: value if isinstance(value, bool) else None,
    "list[str]": _texts,
    "list[Any]": _list,
    "Mapping[str, Any]": _object,
    "dict[str, Mapping[str, Any]]": lambda value: {
        str(key): _object(held) for key, held in _object(value).items()
    },
}
"""The type of a field -> how it is read."""


def _read(kind: type[_T], value: object) -> _T:
    """The object of this type, each field as its type says."""
    found = _object(value)
    fields: Mapping[str, Any] = kind.__annotations__
    return kind(*(_READERS[of](found.get(name)) for name, of in fields.items()))


def _each(kind: type[_T], values: object) -> list[_T]:
    return [_read(kind, value) for value in _list(values) if isinstance(value, Mapping)]
