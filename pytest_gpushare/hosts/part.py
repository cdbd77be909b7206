"""One host of a run on several, and the plan of them all."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.attribution import Attribution, Statement
from pytest_gpushare.gpu.devices import Device, GpuFacts
from pytest_gpushare.gpu.readings import Live
from pytest_gpushare.hosts.agent import answer_of
from pytest_gpushare.hosts.answers import Hello, HostAnswer, with_devices
from pytest_gpushare.hosts.asking import AskedHost
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.hosts.live import HostLive, global_pid
from pytest_gpushare.hosts.specs import HostSpec
from pytest_gpushare.neighbours import devices_of_servers, statements_of
from pytest_gpushare.ollama.models import full_name
from pytest_gpushare.ollama.monitor import Monitor
from pytest_gpushare.planning.leasing import shares_of_other_servers
from pytest_gpushare.planning.placement import PlacementContext
from pytest_gpushare.planning.plan import DeviceShare, Plan, Request
from pytest_gpushare.session.sampler import ServersOnHost
from pytest_gpushare.session.start_facts import Resident, StartFacts, placement_context

if TYPE_CHECKING:
    from pytest_gpushare.hosts.host_lease import HostLease


@dataclass(eq=False)
class HostPart:
    """One host of the run; this host is number 0, also where it has no workers."""

    number: int
    spec: HostSpec
    answer: HostAnswer
    """What was found there; its devices have the UUIDs that they have there."""
    keys: Mapping[str, str]
    """UUID there -> the device's name in this run, which no device of another host has."""
    placement: PlacementContext
    live: Live | None
    attribution: Attribution
    lost: str = field(default="", init=False)
    """Why it takes no part any more; empty while it does."""
    first_slot: int = field(default=0, init=False)
    """The number of its first GPU worker in the plan of the run."""
    first_cpu: int = field(default=0, init=False)
    """The number of its first CPU worker, less those of its GPU workers."""

    @property
    def name(self) -> str:
        """As reports name it."""
        return self.spec.name

    @property
    def plan(self) -> Plan:
        """Its own plan."""
        return self.answer.plan

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of its devices in this run."""
        return tuple(self.keys[planned.device.uuid] for planned in self.plan.devices)

    def shares(self) -> Mapping[str, tuple[DeviceShare, ...]]:
        """Name of a device -> what is kept for other servers than Ollama there."""
        return {self.keys[d.device.uuid]: shares_of_other_servers(d) for d in self.plan.devices}

    def has_model(self, name: str) -> bool:
        """Whether its Ollama has this model; of no name: whether there is one."""
        answer = self.answer
        return full_name(name) in answer.models if name else answer.ollama.answered

    def numbers(self) -> Iterator[int]:
        """The numbers of its workers in the plan of the run."""
        slots = len(self.plan.slots)
        for own in range(slots + self.plan.cpu_workers):
            yield (self.first_slot if own < slots else self.first_cpu) + own

    def own_number(self, number: int, slots: int) -> int:
        """A worker's number in its own plan, from its number in that of the run."""
        return number - (self.first_slot if number < slots else self.first_cpu)

    def named(self, device: Device) -> Device:
        """A device of its own as the run knows it."""
        return _named(device, self.keys, self.name)


@dataclass(eq=False)
class OtherHost(HostPart):
    """Another host than this one."""

    connection: HostConnection
    hello: Hello
    ollama_there: ServersOnHost | None = field(default=None, init=False)
    """Its Ollama; None where it has no GPU worker, and before the run is there."""
    shared: HostLease | None = field(default=None, init=False)
    """What the run leases there while its tests are dispatched."""
    not_kept: list[str] = field(default_factory=list, init=False)
    """A sentence on each loaded model that was not kept loaded until the end."""
    shift: float = field(default=inf, init=False)
    """Seconds to add to times by its clock; the least that was seen is best, infinity: none was."""

    @property
    def root(self) -> str:
        """The project's root directory there."""
        directory, below = self.spec.chdir, self.spec.subdirectory
        return directory.removesuffix(f"/{below}") if below else directory

    @property
    def monitor(self) -> Monitor | None:
        """Follows its Ollama; None where none does."""
        return None if self.ollama_there is None else self.ollama_there.monitor

    def resident(self) -> Resident:
        """What its servers hold, by the names of its devices."""
        return {} if self.ollama_there is None else self.ollama_there.resident()

    def statements(self) -> Sequence[Statement]:
        """What its servers say that they hold."""
        return () if self.ollama_there is None else self.ollama_there.statements()

    def on_this_clock(self) -> float:
        """Seconds to add to a time that was taken there."""
        return self.shift if isfinite(self.shift) else 0.0


def _named(device: Device, keys: Mapping[str, str], host: str) -> Device:
    key = keys[device.uuid]
    own = device.visible_as or (device.uuid if key != device.uuid else "")
    return replace(device, uuid=key, visible_as=own, host=host)


def merged(parts: Sequence[HostPart]) -> Plan:
    """The plan of the run: the slots of all hosts, then their CPU workers."""
    plans = [with_devices(part.plan, part.named) for part in parts]
    slots = [slot for plan in plans for slot in plan.slots]
    devices = [device for plan in plans for device in plan.devices]
    first, cpus = 0, len(slots)
    for part, plan in zip(parts, plans, strict=True):
        part.first_slot, part.first_cpu = first, cpus - len(plan.slots)
        first += len(plan.slots)
        cpus += plan.cpu_workers
    absences = [f"{part.name or 'this host'}: {part.plan.absence}" for part in parts
                if part.plan.absence]  # fmt: skip
    return replace(
        plans[0],
        slots=tuple(slots),
        cpu_workers=sum(plan.cpu_workers for plan in plans),
        limited_by=tuple(dict.fromkeys(limit for plan in plans for limit in plan.limited_by)),
        devices=tuple(devices),
        limits=(),
        absence="" if devices else "; ".join(absences),
        needed=max(plan.needed for plan in plans),
        demand=None,
        is_released=all(plan.is_released for plan in plans),
    )


def in_company(settings: Settings, answer: HostAnswer) -> HostAnswer:
    """The answer of one host of several: without room, CPU workers only where they are allowed."""
    if answer.plan.slots or settings.fallback_to_cpu_when_constrained:
        return answer
    return answer._replace(plan=replace(answer.plan, cpu_workers=0))


def part_here(settings: Settings, local: StartFacts | None) -> HostPart:
    """This host; without workers where nothing was started here."""
    spec = HostSpec("")
    if local is None:
        plan = Plan((), 0, (), (), (), Request(), "no worker runs there")
        answer = HostAnswer(GpuFacts(), plan)
        return HostPart(
            0, spec, answer, {}, PlacementContext(dict(os.environ)), None, Attribution()
        )
    stated = statements_of(local.answers, devices_of_servers(settings, local.gpus))
    attribution = Attribution(local.gpus.all_devices, stated)
    answer = in_company(settings, answer_of(local))
    keys = {device.uuid: device.uuid for device in local.gpus.all_devices}
    placement = placement_context(local, answer.plan)
    return HostPart(0, spec, answer, keys, placement, local.live, attribution)


class Earlier(NamedTuple):
    """What is known of the tests before they are collected, for the placement of workers."""

    contexts: Mapping[str, int]
    """Device name -> bytes of a CUDA context."""
    has_needs: bool


def part_there(
    settings: Settings, number: int, host: AskedHost, taken: Collection[str], earlier: Earlier
) -> OtherHost:
    """Another host, which has answered. `taken`: the names that devices of the run have."""
    connection, hello, name = host.connection, host.hello, host.name
    assert host.answer is not None
    answer = in_company(settings, host.answer)
    devices = answer.gpus.all_devices
    keys = {d.uuid: f"{name}:{d.uuid}" if d.uuid in taken else d.uuid for d in devices}
    live = HostLive(number, connection.say, keys) if answer.plan.slots else None
    attribution = Attribution(
        [_with_global_pids(_named(device, keys, name), number) for device in devices],
        parent=live.parent if live is not None else _unknown,
        alive=live.alive if live is not None else bool,
    )
    directory = hello.directory.rstrip("/") or "/"
    return OtherHost(
        number,
        connection.spec._replace(chdir=directory, python=hello.executable),
        answer,
        keys,
        _placement_there(settings, answer, earlier),
        live,
        attribution,
        connection,
        hello,
    )


def _unknown(_pid: int) -> int | None:
    return None


def _with_global_pids(device: Device, number: int) -> Device:
    if device.processes is None:
        return device
    processes = (p._replace(pid=global_pid(number, p.pid)) for p in device.processes)
    return replace(device, processes=tuple(processes))


def _placement_there(settings: Settings, answer: HostAnswer, earlier: Earlier) -> PlacementContext:
    plan, simulated = answer.plan, answer.gpus.simulated
    capped = settings.cap_vram and bool(plan.slots) and not simulated
    return PlacementContext(
        outer=answer.outer,
        versions=answer.versions if capped else {},
        mps=answer.mps and capped,
        cap_vram=settings.cap_vram,
        by_index=settings.device_names == "index",
        see_all=settings.visible_devices == "all",
        simulated=simulated,
        contexts=earlier.contexts,
        budgets={d.device.uuid: d.reach for d in plan.devices} if earlier.has_needs else {},
    )
