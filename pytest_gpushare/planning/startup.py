"""The start of a run: asks the devices and the neighbours at the same time, and plans.

Each question has a time limit; a call that hangs continues in a daemon thread, since neither a
DNS look-up nor a call into a driver that hangs can be cancelled.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.devices import Device, GpuFacts, HostFacts, simulated
from pytest_gpushare.gpu.vendors import Probe
from pytest_gpushare.host_probe import host_probe
from pytest_gpushare.ollama.address import Address, Candidate, candidates
from pytest_gpushare.ollama.models import OLLAMA, ModelFacts, OllamaFacts
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.ollama.reservation import (
    devices_of_ollama,
    reserve,
    resident_bytes,
)
from pytest_gpushare.planning.plan import LeasedByOthers, Limit, NeighbourShare, Plan, Request, Slot
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.timed import TimedCall, call_within
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.ollama.client import Connection


DEVICES_TIMEOUT = 2.5
"""Seconds that the driver may take to open and to list the devices; 1.5 s has been seen."""

_CLOSE_TIMEOUT = 0.5
"""Seconds that it may take to shut down; the end of the process does the same."""

_GRACE = 0.02
"""Seconds for a probe that ran into its own limit to say so."""

T = TypeVar("T")


def _until(end: float, call: TimedCall[T]) -> T | None:
    """The result of a call; None where there is none at `end` (on the monotonic clock)."""
    call.wait_until(end)
    return call.value


class Probes(NamedTuple):
    """What both probes found, and the library that is held open for the rest of the run."""

    gpus: GpuFacts
    ollama: OllamaFacts
    close: Callable[[], None]
    """Releases the probe; harmless when called twice."""
    devices: Probe | None = None
    """The open probe of the devices, for readings during the run; None under a what-if."""


def probe(
    settings: Settings,
    simulate: tuple[str, ...] = (),
    environment: Mapping[str, str] = os.environ,
) -> Probes:
    """Ask the driver (or the what-if) and Ollama at the same time; `environment` is the user's.

    Raises `SettingsError` for a what-if that cannot be understood; nothing else.
    """
    if simulate:
        # What a live server has loaded is on real devices: a what-if counts none of it.
        ollama = ask_ollama(settings, environment)._replace(models=())
        return Probes(simulated(simulate), ollama, _nothing)
    reading = _DevicesAsking(environment)
    ollama = ask_ollama(settings, environment)
    return Probes(reading.finish(), ollama, reading.close, reading.probe)


def plan_run(
    settings: Settings,
    gpus: GpuFacts,
    ollama: OllamaFacts,
    host: HostFacts,
    request: Request,
    sizes: KnownSizes = NOTHING_KNOWN,
    others: LeasedByOthers = LeasedByOthers(),  # noqa: B008 - immutable
) -> Plan:
    """The plan for what was found; `sizes` has what Ollama's models took in earlier runs.

    `others` is what other sessions claim; of all reservations for Ollama the largest counts.

    Raises `SettingsError` where `ollama_gpu` names no device of this host.
    """
    shares = [
        share._replace(reservation=_larger(share.reservation, others.reserved))
        if share.name == OLLAMA
        else share
        for share in neighbours(settings, gpus, ollama, sizes)
    ]
    return make_plan(settings, gpus, shares, host, request, others.leases)


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    return {uuid: max(one.get(uuid, 0), other.get(uuid, 0)) for uuid in {*one, *other}}


def neighbours(
    settings: Settings, gpus: GpuFacts, ollama: OllamaFacts, sizes: KnownSizes = NOTHING_KNOWN
) -> tuple[NeighbourShare, ...]:
    """The programs that share the devices with the tests: one entry for each server."""
    known = devices_of_ollama(settings.ollama_gpu, gpus)
    resident = resident_bytes(known, gpus, ollama)
    kept = reserve(settings, gpus, ollama, known, resident, sizes)
    share = NeighbourShare(OLLAMA, kept.per_device, resident, kept.is_released, kept.demand)
    return (share,)


class _DevicesAsking:
    """The driver being opened and read in the background."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self.probe = host_probe()
        self._end = time.monotonic() + DEVICES_TIMEOUT
        self._call = TimedCall(self._read, "devices")

    def _read(self) -> GpuFacts:
        self.probe.open()
        return self.probe.read(self._environment)

    def finish(self) -> GpuFacts:
        return _until(self._end, self._call) or GpuFacts(
            absence=f"{self.probe.library} did not answer within {DEVICES_TIMEOUT:g} s: "
            f"{self.probe.remedy_when_slow(self._environment)}"
        )

    def close(self) -> None:
        # A driver that hangs is not waited for a second time.
        limit = _CLOSE_TIMEOUT if self._call.is_over else 0.0
        call_within(limit, self.probe.close, "devices-close")


def ask_ollama(settings: Settings, environment: Mapping[str, str]) -> OllamaFacts:
    """Every address that may be Ollama's is asked at once; the best that answers is taken.

    All its questions together have the one time limit.
    """
    if not settings.enable_ollama_detection:
        return OllamaFacts()
    limit = float(settings.ollama_timeout)
    places = candidates(settings.ollama_host, environment)
    # Imported in this thread, so that its cost does not count against Ollama's time limit.
    from pytest_gpushare.ollama.catalog import ask
    from pytest_gpushare.ollama.client import load

    load()
    until = time.monotonic() + limit
    asked = [_OllamaAsking(place, until, partial(ask, place.address, limit)) for place in places]
    facts = []
    for asking in asked:
        facts.append(asking.finish(limit))
        if facts[-1].answered:
            break
    for asking in asked:
        asking.hang_up()
    found = facts[-1] if facts[-1].answered else _no_answer(facts)
    if found.answered and settings.ollama_models:
        place = places[len(facts) - 1]
        return found._replace(relied_on=_ask_models(place.address, settings, until))
    return found


def _no_answer(facts: Sequence[OllamaFacts]) -> OllamaFacts:
    """None of the addresses gave an answer: one report for all."""
    if len(facts) == 1:
        return facts[0]
    reachable = [each for each in facts if each.reachable]
    if reachable:
        return reachable[0]
    return facts[0]._replace(
        address=", ".join(each.address for each in facts),
        problem="; ".join(dict.fromkeys(each.problem for each in facts)),
        found_by="",
    )


class _OllamaAsking:
    """One address being asked in the background."""

    def __init__(self, place: Candidate, end: float, ask: Callable[[Any], OllamaFacts]) -> None:
        self._place, self._end = place, end
        self._connections: list[Connection] = []
        self._call = TimedCall(lambda: ask(self._connections.append), "ollama")

    def finish(self, limit: float) -> OllamaFacts:
        """The answer in time, or a report that there is none."""
        from pytest_gpushare.ollama.catalog import unanswered

        facts = _until(self._end + _GRACE, self._call)
        facts = facts or unanswered(self._place.address, f"no answer within {limit:g} s")
        return facts._replace(found_by=self._place.found_by, server=self._place.address)

    def hang_up(self) -> None:
        """Close connections that are still open, without waiting for answers."""
        _hang_up(self._connections)


def _ask_models(address: Address, settings: Settings, until: float) -> tuple[ModelFacts, ...]:
    from pytest_gpushare.ollama.catalog import ask_models

    names, connections = settings.ollama_models, list[Any]()
    call = TimedCall(lambda: ask_models(address, names, until, connections.append), "ollama")
    models = _until(until + _GRACE, call)
    _hang_up(connections)
    problem = "no answer in time: raise gpu_share_ollama_timeout_s"
    return models or tuple(ModelFacts(name, problem=problem) for name in names)


def _hang_up(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.hang_up()


def _nothing() -> None:
    pass


_DEVICES = "a pytest_gpushare_devices hook"
_PLAN = "a pytest_gpushare_plan hook"
_FIRM = (Limit.NUMBER, Limit.MAXPROCESSES)


class PlanHooks(NamedTuple):
    """The answers of the two hooks."""

    devices: Callable[[], Iterable[Device]] = tuple
    """Devices that no vendor's driver is asked for."""
    revise: Callable[[Plan], Plan | None] = lambda plan: plan
    """Another plan in place of the one that was made; None leaves it."""

    def with_devices(self, gpus: GpuFacts) -> GpuFacts:
        """The drivers' devices and the hook's. Raises `GpuShareError` for what is no device."""
        more = tuple(self.devices())
        names = {device.uuid for device in gpus.all_devices}
        for device in more:
            _check_device(device)
            if device.uuid in names:
                raise GpuShareError(
                    f"{_DEVICES} names {device.uuid} a second time: name each device once"
                )
            names.add(device.uuid)
        if not more or gpus.simulated:
            return gpus
        return gpus._replace(
            devices=(*gpus.devices, *more),
            all_devices=(*gpus.all_devices, *more),
            absence="",
        )

    def revised(self, plan: Plan, cpus: int) -> Plan:
        """The plan as the hook leaves it; without slots its workers are CPU workers.

        Raises `GpuShareError` for a plan that promises what is not there.
        """
        given = self.revise(plan)
        if given is None or given is plan:
            return plan
        if not isinstance(given, Plan):
            raise GpuShareError(f"{_PLAN} gave no plan but {type(given).__name__}")
        _check_slots(given)
        counts = Counter(slot.device.uuid for slot in given.slots)
        in_process = given.request.in_process
        return replace(
            given,
            devices=tuple(replace(d, workers=counts[d.device.uuid]) for d in given.devices),
            limited_by=(Limit.HOOK,),
            cpu_workers=given.cpu_workers
            or (0 if given.slots or in_process else given.request.number or max(1, cpus)),
        )


def _check_device(device: object) -> None:
    if not isinstance(device, Device):
        raise GpuShareError(f"{_DEVICES} gave something else than pytest_gpushare devices")
    sizes = (device.total, device.used, device.free)
    texts = (device.uuid, device.name, device.index, device.variable, device.visible_as)
    if not all(isinstance(text, str) for text in texts) or not device.uuid or not device.variable:
        raise GpuShareError(f"{_DEVICES} gave a device whose uuid, name, index, variable or "
                            "visible_as is no text, or empty")  # fmt: skip
    if not all(type(size) is int and 0 <= size <= device.total for size in sizes):
        raise GpuShareError(
            f"{_DEVICES} gave {device.uuid} with total, used, free = {sizes}: they are whole "
            "numbers of bytes, and used and free are within total"
        )
    if device.processes is not None and not isinstance(device.processes, tuple):
        raise GpuShareError(
            f"{_DEVICES} gave {device.uuid} processes that are neither tuple nor None"
        )


def _check_slots(plan: Plan) -> None:
    most = min((m for name, m in plan.limits if name in _FIRM), default=None)
    if most is not None and len(plan.slots) > most:
        raise GpuShareError(f"{_PLAN} gave {len(plan.slots)} slots: the command line allows {most}")
    if type(plan.cpu_workers) is not int or plan.cpu_workers < 0:
        raise GpuShareError(f"{_PLAN} gave {plan.cpu_workers} CPU workers: give 0 or more")
    known = {planned.device for planned in plan.devices}
    for slot in plan.slots:
        if not isinstance(slot, Slot) or slot.device not in known:
            raise GpuShareError(f"{_PLAN} gave a slot that is on no device of the plan")
        if type(slot.vram) is not int or slot.vram <= 0:
            raise GpuShareError(f"{_PLAN} gave a slot of {slot.vram} bytes: give more than 0")
    for device in {slot.device for slot in plan.slots}:
        promised = sum(slot.vram for slot in plan.slots if slot.device == device)
        if promised > device.free:
            raise GpuShareError(
                f"{_PLAN} promises {format_gb(promised)} on {device.label}, where "
                f"{format_gb(device.free)} are free: make its slots fewer or smaller"
            )
