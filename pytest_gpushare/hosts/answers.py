"""What a host answers, as values and as JSON; what comes from a host is foreign and checked.

Both ends have the same version of the plugin: a message has the values of a type in the order of
its fields, and is read by the types of these fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.hosts.checkout import Checkout
from pytest_gpushare.neighbours import Answers, ServerFacts
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.scheduler.types import Others
from pytest_gpushare.text import one_line
from pytest_gpushare.units import MOST_VRAM

T = TypeVar("T")

_MOST_ENTRIES = 10_000
_LONGEST = 10_000
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


class HostAnswer(NamedTuple):
    """What was found on a host: its plan, and what else its workers and the reports need."""

    gpus: GpuFacts
    plan: Plan
    """As a run on it alone would have it, where CPU workers will do."""
    ollama: OllamaFacts = OllamaFacts()
    models: tuple[str, ...] = ()
    """The full names of the models that its Ollama has."""
    outer: Mapping[str, str] = {}
    """The variables of its environment on which caps depend."""
    versions: Mapping[str, str] = {}
    """The frameworks that are installed there."""
    mps: bool = False
    lease: str = ""
    """The record that its workers keep alive; empty where nothing is leased."""
    notes: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    """A sentence on each model that was loaded there for the run."""
    leases: tuple[str, ...] = ()
    """What other sessions there have leased, one sentence each."""
    checkout: Checkout = Checkout()
    cache: str = ""
    """The directory with the controller's cache of pytest there; empty: it is not needed."""
    servers: Mapping[str, ServerFacts] = {}
    """The answers of other servers there, by name."""

    @property
    def answers(self) -> Answers:
        """The answers of all servers there."""
        return {OLLAMA: self.ollama, **self.servers}


class ProcessRow(NamedTuple):
    """A process in a host's list."""

    process: GpuProcess
    ancestors: tuple[int, ...]
    alive: bool


class MemorySample(NamedTuple):
    """The VRAM of a host's devices, by UUID."""

    at: float
    devices: Mapping[str, Memory]
    is_answering: bool


class ProcessSample(NamedTuple):
    """The processes on a host's devices, by UUID; None where the driver lists none."""

    at: float
    devices: Mapping[str, tuple[ProcessRow, ...] | None]


class Sample(NamedTuple):
    """Readings of a host's devices; times on that host's clock."""

    now: float
    wall: float
    """Seconds since the epoch."""
    memory: MemorySample | None = None
    processes: ProcessSample | None = None


class ModelsAnswer(NamedTuple):
    """What a host's Ollama says that it has loaded."""

    number: int
    """Of the question."""
    models: tuple[LoadedModel, ...] | None
    problem: str
    is_refused: bool


class LeasedDevice(NamedTuple):
    """What the run has leased of a device, in bytes, and what the other sessions there have."""

    lease: int
    others: Others


class Leased(NamedTuple):
    """The answer to a wish for VRAM."""

    number: int
    """Of the wish."""
    is_shared: bool
    problem: str
    devices: Mapping[str, LeasedDevice]


def message(kind: str, value: object) -> dict[str, Any]:
    """The message with a value, of what JSON can carry; `read` makes the value of it again."""
    return {"kind": kind, "value": _plain(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return [_plain(getattr(value, each.name)) for each in fields(value)]
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


def read(kind: type[T], message: Mapping[str, Any]) -> T:
    """The value in a message of a host. Raises `ValueError` where it is not one of this type.

    Whole numbers are from 0 to the largest VRAM, others finite; texts are one line, and neither
    they nor lists are longer than 10,000.
    """
    return cast("T", _read(kind, message.get("value")))


def _read(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (other,) = (each for each in inner if each is not NoneType)
        return None if value is None else _read(other, value)
    if origin is tuple:
        entries = _entries(value)
        kinds = [inner[0]] * len(entries) if inner[-1] is ... else inner
        return tuple(_read(each, entry) for each, entry in zip(kinds, entries, strict=True))
    if origin is not None:
        if not isinstance(value, dict) or len(value) > _MOST_ENTRIES:
            raise ValueError("an object was expected")
        return {_read(str, name): _read(inner[1], entry) for name, entry in value.items()}
    if kind is str:
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise ValueError("a text was expected")
        return value if value.isprintable() else one_line(value, _LONGEST)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("true or false was expected")
        return value
    if kind is int:
        if type(value) is not int or not 0 <= value <= MOST_VRAM:
            raise ValueError("a whole number was expected")
        return value
    if kind is float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError("a number was expected")
        return float(value)
    if issubclass(kind, Enum):
        return kind(value)
    if kind is _NotSent:
        raise ValueError("nothing was expected")
    types = _types_of(kind)
    return kind(*(_read(each, entry) for each, entry in zip(types, _entries(value), strict=True)))


def _entries(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MOST_ENTRIES:
        raise ValueError("a list was expected")
    return value


class _NotSent:
    """What stays on the host: no value is of this type."""


@cache
def _types_of(kind: type) -> tuple[Any, ...]:
    """The types of the fields of a type."""
    here = dict.fromkeys(("Demand", "ModelFacts"), _NotSent)
    return tuple(get_type_hints(kind, localns=here).values())


def answer_message(answer: HostAnswer) -> dict[str, Any]:
    """The message with what was found: no more of it than the controller needs."""
    return message(
        "facts",
        answer._replace(
            gpus=answer.gpus._replace(problems=()),
            plan=replace(answer.plan, demand=None),
            ollama=answer.ollama._replace(found_by="", relied_on=(), odd=()),
            outer={n: value for n, value in answer.outer.items() if n.startswith(_CAPS)},
        ),
    )


def read_answer(message: Mapping[str, Any], host: str) -> HostAnswer:
    """What was found on a host, its devices named by it. Raises `ValueError`."""
    answer = read(HostAnswer, message)
    gpus, plan = answer.gpus, answer.plan
    if not all(d.uuid and d.total and max(d.used, d.free) <= d.total for d in gpus.all_devices):
        raise ValueError("a device makes no sense")
    slots = {each.device.uuid for each in plan.slots}
    planned = {each.device.uuid for each in plan.devices}
    usable = {each.uuid for each in gpus.devices}
    if not slots <= planned <= usable <= {each.uuid for each in gpus.all_devices}:
        raise ValueError("the plan makes no sense")
    if plan.request != Request():
        raise ValueError("the plan is of another run")

    def there(device: Device) -> Device:
        return replace(device, host=host)

    gpus = gpus._replace(
        devices=tuple(map(there, gpus.devices)), all_devices=tuple(map(there, gpus.all_devices))
    )
    return answer._replace(gpus=gpus, plan=with_devices(plan, there))


def with_devices(plan: Plan, change: Callable[[Device], Device]) -> Plan:
    """A plan with its devices changed."""
    return replace(
        plan,
        slots=tuple(replace(each, device=change(each.device)) for each in plan.slots),
        devices=tuple(replace(each, device=change(each.device)) for each in plan.devices),
    )
