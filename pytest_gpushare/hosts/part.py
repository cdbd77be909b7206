"""One host of a run on several, and the plan of them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import TYPE_CHECKING

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.attribution import Attribution
from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.gpu.devices import HostFacts as Figures
from pytest_gpushare.gpu.readings import Live
from pytest_gpushare.hosts.answers import RemoteFacts
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.hosts.live import HostOllama
from pytest_gpushare.hosts.specs import HostSpec
from pytest_gpushare.ollama.models import OllamaFacts, full_name
from pytest_gpushare.planning.placement import (
    PlacementContext,
)
from pytest_gpushare.planning.plan import DevicePlan, Plan, Request, Slot
from pytest_gpushare.planning.sizing import make_plan

if TYPE_CHECKING:
    from pytest_gpushare.hosts.host_lease import HostLease


@dataclass(eq=False)
class HostPart:
    """One host of the run; this host is number 0, also where it has no workers."""

    number: int
    spec: HostSpec
    plan: Plan
    """Its own plan, with the UUIDs that its devices have there."""
    keys: Mapping[str, str]
    """UUID there -> the device's name in this run, which no device of another host has."""
    placement: PlacementContext
    live: Live | None
    attribution: Attribution
    ollama: OllamaFacts
    models: tuple[str, ...] = ()
    """The full names of the models that its Ollama has."""
    lease: str = ""
    """The record that its workers keep alive."""
    root: str = ""
    """The project's root directory there; empty: here."""
    path: tuple[str, ...] = ()
    """Its `sys.path`."""
    connection: HostConnection | None = None
    python: str = ""
    """The version of Python there."""
    ollama_there: HostOllama | None = None
    """Its Ollama, for the monitor; None where it has no GPU worker."""
    shared: HostLease | None = None
    """What the run leases there while its tests are dispatched."""
    cache: str = ""
    """The directory of pytest's cache for its workers; empty: the usual one."""
    notes: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    """A sentence on each model that was loaded there for the run."""
    not_kept: list[str] = field(default_factory=list)
    """A sentence on each of them that was not kept loaded until the end."""
    leases: tuple[str, ...] = ()
    """What other sessions there have leased, one sentence each."""
    shift: float = inf
    """Seconds to add to times by its clock; the least that was seen is best, infinity: none was."""
    lost: str = ""
    """Why it takes no part any more; empty while it does."""
    first_slot: int = 0
    """The number of its first GPU worker in the plan of the run."""
    first_cpu: int = 0
    """The number of its first CPU worker, less those of its GPU workers."""

    @property
    def name(self) -> str:
        """As reports name it."""
        return self.spec.name

    @property
    def devices(self) -> frozenset[str]:
        """The names of its devices in this run."""
        return frozenset(self.keys.values())

    def has_model(self, name: str) -> bool:
        """Whether its Ollama has this model; of no name: whether there is one."""
        return full_name(name) in self.models if name else self.ollama.answered

    def on_this_clock(self) -> float:
        """Seconds to add to a time that was taken there."""
        return self.shift if self.number and isfinite(self.shift) else 0.0

    def numbers(self) -> Iterator[int]:
        """The numbers of its workers in the plan of the run."""
        slots = len(self.plan.slots)
        for own in range(slots + self.plan.cpu_workers):
            yield (self.first_slot if own < slots else self.first_cpu) + own

    def own_number(self, number: int, slots: int) -> int:
        """A worker's number in its own plan, from its number in that of the run."""
        return number - (self.first_slot if number < slots else self.first_cpu)

    def renamed(self, device: Device) -> Device:
        """A device of its own as the run knows it."""
        return named(device, self.keys.get(device.uuid, device.uuid), self.name)


def named(device: Device, key: str, host: str) -> Device:
    """A device under its name in the run."""
    own = device.visible_as or (device.uuid if key != device.uuid else "")
    return replace(device, uuid=key, visible_as=own, host=host)


def merged(parts: Sequence[HostPart]) -> Plan:
    """The plan of the run: the slots of all hosts, then their CPU workers."""
    plans = [(part, part.plan) for part in parts]
    slots: list[Slot] = []
    devices: list[DevicePlan] = []
    for part, plan in plans:
        part.first_slot = len(slots)
        slots += [replace(slot, device=part.renamed(slot.device)) for slot in plan.slots]
        devices += [replace(each, device=part.renamed(each.device)) for each in plan.devices]
    cpus = len(slots)
    for part, plan in plans:
        part.first_cpu = cpus - len(plan.slots)
        cpus += plan.cpu_workers
    first = plans[0][1]
    absences = [f"{part.name or 'this host'}: {plan.absence}" for part, plan in plans
                if plan.absence]  # fmt: skip
    return replace(
        first,
        slots=tuple(slots),
        cpu_workers=sum(plan.cpu_workers for _, plan in plans),
        limited_by=tuple(dict.fromkeys(limit for _, plan in plans for limit in plan.limited_by)),
        devices=tuple(devices),
        limits=(),
        absence="" if devices else "; ".join(absences),
        needed=max(plan.needed for _, plan in plans),
        demand=None,
        is_released=all(plan.is_released for _, plan in plans),
    )


def merged_devices(plan: Plan, keys: Mapping[str, str], host: str) -> Plan:
    """A host's own plan, its devices under their names in the run."""
    return replace(
        plan,
        slots=tuple(
            replace(slot, device=named(slot.device, keys[slot.device.uuid], host))
            for slot in plan.slots
        ),
        devices=tuple(
            replace(each, device=named(each.device, keys[each.device.uuid], host))
            for each in plan.devices
        ),
    )


def plan_there(settings: Settings, facts: RemoteFacts) -> Plan:
    """The plan of one host, by the same rule as on this one."""
    ram = facts.ram if settings.ram_per_worker else None
    plan = make_plan(
        settings, facts.gpus, [facts.share], Figures(facts.cpus, ram), Request(), facts.leased
    )
    devices = (
        replace(
            planned,
            alone=facts.alone.get(planned.device.uuid, 0),
            asked=facts.asked.get(planned.device.uuid),
        )
        for planned in plan.devices
    )
    return in_company(settings, replace(plan, devices=tuple(devices)))


def in_company(settings: Settings, plan: Plan) -> Plan:
    """The plan of one host of several: without room, CPU workers only where they are allowed."""
    if plan.slots or settings.fallback_to_cpu_when_constrained:
        return plan
    return replace(plan, cpu_workers=0)
