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
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.devices import Device, GpuFacts, HostFacts, simulated
from pytest_gpushare.gpu.vendors import Probe
from pytest_gpushare.host_probe import host_probe
from pytest_gpushare.neighbours import (
    Answers,
    NeighbourShare,
    answer_of_ollama,
    ask_all,
    servers,
    shares_of,
)
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.planning.plan import LeasedByOthers, Limit, Plan, Request, Slot
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.timed import TimedCall, call_within
from pytest_gpushare.units import format_gb

DEVICES_TIMEOUT = 2.5
"""Seconds that the driver may take to open and to list the devices; 1.5 s has been seen."""

_CLOSE_TIMEOUT = 0.5
"""Seconds that it may take to shut down; the end of the process does the same."""


class Probes(NamedTuple):
    """What the devices and the servers said, and the library that is held open for the run."""

    gpus: GpuFacts
    answers: Answers
    close: Callable[[], None]
    """Releases the probe; harmless when called twice."""
    devices: Probe | None = None
    """The open probe of the devices, for readings during the run; None under a what-if."""

    @property
    def ollama(self) -> OllamaFacts:
        """What Ollama said."""
        return answer_of_ollama(self.answers)


def probe(
    settings: Settings,
    simulate: tuple[str, ...] = (),
    environment: Mapping[str, str] = os.environ,
) -> Probes:
    """Ask the driver (or the what-if) and all servers at the same time; `environment` is the
    user's.

    Raises `SettingsError` for a what-if that cannot be understood; nothing else.
    """
    if simulate:
        answers = ask_all(settings, environment)
        # What a live server has loaded is on real devices: a what-if counts none of it.
        answers = {each.name: each.with_nothing_held(answers[each.name]) for each in servers()}
        return Probes(simulated(simulate), answers, _nothing)
    reading = _DevicesAsking(environment)
    answers = ask_all(settings, environment)
    return Probes(reading.finish(), answers, reading.close, reading.probe)


def plan_run(
    settings: Settings,
    gpus: GpuFacts,
    answers: Answers,
    host: HostFacts,
    request: Request,
    sizes: KnownSizes = NOTHING_KNOWN,
    others: LeasedByOthers = LeasedByOthers(),  # noqa: B008 - immutable
) -> Plan:
    """The plan for what was found; `sizes` has what Ollama's models took in earlier runs.

    `others` is what other sessions claim; of what all sessions keep for servers the largest counts.

    Raises `SettingsError` where `ollama_gpu` names no device of this host.
    """
    shares = shares_of(settings, gpus, answers, sizes)
    return make_plan(
        settings, gpus, _as_others_keep(shares, others.reserved), host, request, others.leases
    )


def _as_others_keep(
    shares: Sequence[NeighbourShare], reserved: Mapping[str, int]
) -> Sequence[NeighbourShare]:
    """The shares, with what other sessions keep beyond them.

    A session publishes the sum, since all of a host find the same servers. What makes the sums
    differ is the reservation that settings name: Ollama's, which is the first.
    """
    kept = Counter[str]()
    for share in shares:
        kept.update(share.reservation)
    first, *rest = shares
    own = Counter(first.reservation)
    own.update({u: max(0, size - kept[u]) for u, size in reserved.items()})
    return first._replace(reservation=own), *rest


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
        self._call.wait_until(self._end)
        return self._call.value or GpuFacts(
            absence=f"{self.probe.library} did not answer within {DEVICES_TIMEOUT:g} s: "
            f"{self.probe.remedy_when_slow(self._environment)}"
        )

    def close(self) -> None:
        # A driver that hangs is not waited for a second time.
        limit = _CLOSE_TIMEOUT if self._call.is_over else 0.0
        call_within(limit, self.probe.close, "devices-close")


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
