"""What a host answers, as a value and as JSON; what comes from a host is foreign and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.devices import ComputeMode, Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.hosts.checkout import Checkout
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.planning.plan import NeighbourShare
from pytest_gpushare.text import one_line
from pytest_gpushare.units import MOST_VRAM

T = TypeVar("T")

HERE = frozenset({"markers", "vram", "config", "hosts"})
"""Keys of options that only the controller goes by."""

_MOST_DEVICES = 64
_MOST_PROCESSES = 10_000
_MOST_PID = 2**32 - 1
_MOST_TEXTS = 100
_LONGEST = 500
_CAPS = ("PYTORCH_", "XLA_", "CUPY_", "CUDA_", "TF_", "PYTEST_GPUSHARE_")
"""The beginnings of the variables on which a worker's caps depend."""


class HostError(GpuShareError):
    """A host that cannot take part: its text names the host and what to change."""


class Hello(NamedTuple):
    """What a host said before the plugin was imported there."""

    python: str
    executable: str
    directory: str
    path: tuple[str, ...]
    """Its `sys.path`, without the directory."""
    versions: Mapping[str, str | None]


class RemoteFacts(NamedTuple):
    """What was found on a host: the figures of which its plan is made, and what workers need."""

    gpus: GpuFacts
    share: NeighbourShare
    leased: Mapping[str, int]
    """UUID -> bytes that other sessions there have leased and not yet taken."""
    alone: Mapping[str, int]
    """UUID -> the budget that the plan would have without them."""
    asked: Mapping[str, int]
    """UUID -> what this run keeps for Ollama, whatever others keep."""
    ollama: OllamaFacts
    models: tuple[str, ...]
    """The full names of the models that its Ollama has."""
    cpus: int
    ram: int | None
    outer: Mapping[str, str]
    """The variables of its environment on which caps depend."""
    versions: Mapping[str, str]
    mps: bool
    lease: str
    """The record that its workers keep alive; empty where nothing is leased."""
    notes: tuple[str, ...]
    loaded: tuple[str, ...]
    """A sentence on each model that was loaded there for the run."""
    leases: tuple[str, ...]
    checkout: Checkout
    cache: str
    """The directory with the controller's cache of pytest there; empty: it is not needed."""


def encode(facts: RemoteFacts) -> dict[str, Any]:
    """The message with what was found."""
    share, ollama = facts.share, facts.ollama
    return {
        "kind": "facts",
        "devices": [_device(device) for device in facts.gpus.devices],
        "all_devices": [_device(device) for device in facts.gpus.all_devices],
        "absence": facts.gpus.absence,
        "driver": facts.gpus.driver,
        "simulated": facts.gpus.simulated,
        "reservation": dict(share.reservation),
        "resident": dict(share.resident),
        "leased": dict(facts.leased),
        "alone": dict(facts.alone),
        "asked": dict(facts.asked),
        "released": share.is_released,
        "ollama": {
            "address": ollama.address,
            "asked": ollama.asked,
            "answered": ollama.answered,
            "version": ollama.version,
            "problem": ollama.problem,
            "reachable": ollama.reachable,
            "on_this_host": ollama.on_this_host,
            "url": ollama.server.url if ollama.server is not None else None,
            "models": rows_of(ollama.models),
        },
        "models": list(facts.models),
        "cpus": facts.cpus,
        "ram": facts.ram,
        "outer": {n: value for n, value in facts.outer.items() if n.startswith(_CAPS)},
        "versions": dict(facts.versions),
        "mps": facts.mps,
        "lease": facts.lease,
        "notes": list(facts.notes),
        "loaded": list(facts.loaded),
        "leases": list(facts.leases),
        "checkout": checkout_message(facts.checkout),
        "cache": facts.cache,
    }


def checkout_message(checkout: Checkout) -> dict[str, Any]:
    """The message with the state of the checkout alone."""
    return {"kind": "checkout", "commit": checkout.commit, "changes": checkout.changes}


def _device(device: Device) -> dict[str, Any]:
    processes = device.processes
    return {
        "uuid": device.uuid,
        "name": device.name,
        "index": device.index,
        "total": device.total,
        "used": device.used,
        "free": device.free,
        "processes": None if processes is None else [list(process) for process in processes],
        "compute_mode": device.compute_mode.value,
        "capability": list(device.capability),
        "parent": device.parent,
        "variable": device.variable,
        "visible_as": device.visible_as,
        "unified": device.unified,
    }


class Foreign:
    """A JSON object from a host; each value is asked for by its type. Raises `ValueError`."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError("no object")
        self._value: dict[str, Any] = value

    def text(self, name: str, most: int = _LONGEST) -> str:
        """A text of at most so many characters, printable."""
        return as_text(self._value.get(name), most)

    def text_or_none(self, name: str) -> str | None:
        """The same, or null."""
        return None if self._value.get(name) is None else self.text(name)

    def whole(self, name: str, most: int = MOST_VRAM) -> int:
        """A whole number from 0."""
        return as_whole(self._value.get(name), most)

    def whole_or_none(self, name: str, most: int = MOST_VRAM) -> int | None:
        """The same, or null."""
        return None if self._value.get(name) is None else self.whole(name, most)

    def number(self, name: str) -> float:
        """A finite number."""
        return as_number(self._value.get(name))

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._value.get(name)
        if not isinstance(value, bool):
            raise ValueError(name)
        return value

    def list(self, name: str, most: int) -> list[Any]:
        """A list of at most so many entries."""
        return as_list(self._value.get(name), most)

    def texts(self, name: str, most: int = _MOST_TEXTS, longest: int = _LONGEST) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(as_text(entry, longest) for entry in self.list(name, most))

    def items(self, name: str, most: int) -> dict[str, Any]:
        """An object with at most so many names."""
        value = self._value.get(name)
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(name)
        return {as_text(key, _LONGEST): entry for key, entry in value.items()}

    def is_null(self, name: str) -> bool:
        """Whether it is null, or not there."""
        return self._value.get(name) is None

    def has(self, name: str) -> bool:
        """Whether there is such a value."""
        return name in self._value


def as_text(value: object, most: int) -> str:
    """A text, on one line. Raises `ValueError`."""
    if not isinstance(value, str) or len(value) > most:
        raise ValueError("text")
    return one_line(value, most) if not value.isprintable() else value


def as_whole(value: object, most: int) -> int:
    """A whole number from 0 to `most`. Raises `ValueError`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError("number")
    return value


def as_number(value: object) -> float:
    """A finite number. Raises `ValueError`."""
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError("number")
    return float(value)  # type: ignore[arg-type]


def as_list(value: object, most: int) -> list[Any]:
    """A list of at most so many entries. Raises `ValueError`."""
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("list")
    return value


def decode_hello(message: object) -> Hello:
    """The first message of a host. Raises `ValueError`."""
    found = Foreign(message)
    versions = {
        name: None if value is None else as_text(value, 100)
        for name, value in found.items("versions", 20).items()
    }
    return Hello(
        found.text("python"),
        found.text("executable", 4096),
        found.text("directory", 4096),
        found.texts("path", 1000, 4096),
        versions,
    )


def decode(message: object, host: str) -> RemoteFacts:
    """The facts of a host, its devices named by it. Raises `ValueError`."""
    found = Foreign(message)
    ollama = Foreign(found.items("ollama", 20))
    gpus = GpuFacts(
        tuple(_read_device(each, host) for each in found.list("devices", _MOST_DEVICES)),
        tuple(_read_device(each, host) for each in found.list("all_devices", _MOST_DEVICES)),
        found.text("absence"),
        (),
        found.text_or_none("driver"),
        found.flag("simulated"),
    )
    return RemoteFacts(
        gpus,
        NeighbourShare(
            OLLAMA, _sizes(found, "reservation"), _sizes(found, "resident"), found.flag("released")
        ),
        _sizes(found, "leased"),
        _sizes(found, "alone"),
        _sizes(found, "asked"),
        OllamaFacts(
            address=ollama.text("address"),
            asked=ollama.flag("asked"),
            answered=ollama.flag("answered"),
            version=ollama.text_or_none("version"),
            models=models_of(ollama.list("models", 1000)),
            problem=ollama.text("problem"),
            reachable=ollama.flag("reachable"),
            on_this_host=ollama.flag("on_this_host"),
            server=None if ollama.is_null("url") else parse_address(ollama.text("url")),
        ),
        found.texts("models", 1000),
        max(1, found.whole("cpus", 100_000)),
        found.whole_or_none("ram"),
        {name: as_text(value, 10_000) for name, value in found.items("outer", 500).items()},
        {name: as_text(value, 100) for name, value in found.items("versions", 20).items()},
        found.flag("mps"),
        found.text("lease", 4096),
        found.texts("notes"),
        found.texts("loaded"),
        found.texts("leases"),
        decode_checkout(found.items("checkout", 3)),
        found.text("cache", 4096),
    )


def decode_checkout(message: object) -> Checkout:
    """The state of a host's checkout. Raises `ValueError`."""
    found = Foreign(message)
    return Checkout(found.text_or_none("commit"), found.text_or_none("changes"))


def _sizes(found: Foreign, name: str) -> dict[str, int]:
    return {
        uuid: as_whole(size, MOST_VRAM) for uuid, size in found.items(name, _MOST_DEVICES).items()
    }


def _read_device(value: object, host: str) -> Device:
    found = Foreign(value)
    total = found.whole("total")
    used, free = found.whole("used", total), found.whole("free", total)
    major, minor = (as_whole(part, 1000) for part in found.list("capability", 2))
    uuid = found.text("uuid", 100)
    if not uuid or not total:
        raise ValueError("device")
    processes = None
    if not found.is_null("processes"):
        processes = tuple(
            GpuProcess(as_whole(pid, _MOST_PID), _size_or_none(held), as_text(neighbour, 100))
            for pid, held, neighbour in found.list("processes", _MOST_PROCESSES)
        )
    return Device(
        uuid,
        found.text("name"),
        found.text("index", 20),
        total,
        used,
        free,
        processes,
        ComputeMode(found.whole("compute_mode", 10)),
        (major, minor),
        found.text("parent", 100),
        found.text("variable", 100),
        found.text("visible_as", 100),
        found.flag("unified"),
        host,
    )


def _size_or_none(value: object) -> int | None:
    return None if value is None else as_whole(value, MOST_VRAM)


def rows_of(models: Iterable[LoadedModel]) -> list[list[Any]]:
    """Models of Ollama's, as `models_of` reads them."""
    return [[m.name, m.size, m.size_vram, m.digest, m.context] for m in models]


def models_of(rows: Sequence[Any]) -> tuple[LoadedModel, ...]:
    """The models of Ollama's, from a message. Raises `ValueError`."""
    return tuple(
        LoadedModel(
            as_text(name, 256),
            as_whole(size, MOST_VRAM),
            _size_or_none(vram),
            as_text(digest, 100),
            None if context is None else as_whole(context, 2**31),
        )
        for name, size, vram, digest, context in rows
    )


class ProcessRow(NamedTuple):
    """A process in a host's list."""

    process: GpuProcess
    ancestors: tuple[int, ...]
    alive: bool


class Sample(NamedTuple):
    """Readings of a host's devices; times on that host's clock."""

    now: float
    wall: float
    """Seconds since the epoch."""
    memory_at: float | None = None
    memory: Mapping[str, Memory] = {}
    processes_at: float | None = None
    processes: Mapping[str, tuple[ProcessRow, ...] | None] = {}
    is_answering: bool = False


def decode_sample(message: object) -> Sample:
    """The readings in a message. Raises `ValueError`."""
    found = Foreign(message)
    sample = Sample(found.number("now"), found.number("wall"))
    if found.has("memory"):
        memory = {uuid: _memory(row) for uuid, row in found.items("memory", _MOST_DEVICES).items()}
        sample = sample._replace(
            memory_at=found.number("memory_at"),
            memory=memory,
            is_answering=found.flag("answering"),
        )
    if found.has("processes"):
        rows = found.items("processes", _MOST_DEVICES)
        sample = sample._replace(
            processes_at=found.number("processes_at"),
            processes={
                uuid: None
                if row is None
                else tuple(_process(each) for each in as_list(row, _MOST_PROCESSES))
                for uuid, row in rows.items()
            },
        )
    return sample


def _memory(row: object) -> Memory:
    total, used, free = (as_whole(part, MOST_VRAM) for part in as_list(row, 3))
    return Memory(total, used, free)


def _process(row: object) -> ProcessRow:
    pid, used, neighbour, ancestors, alive = as_list(row, 5)
    return ProcessRow(
        GpuProcess(as_whole(pid, _MOST_PID), _size_or_none(used), as_text(neighbour, 100)),
        tuple(as_whole(each, _MOST_PID) for each in as_list(ancestors, 64)),
        bool(alive),
    )
