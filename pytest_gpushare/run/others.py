"""What other plugins and conftests have to say, checked before it is believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.plan.model import Limit, Plan, Slot
from pytest_gpushare.probe.facts import Device, GpuFacts
from pytest_gpushare.units import format_gb

_DEVICES = "a pytest_gpushare_devices hook"
_PLAN = "a pytest_gpushare_plan hook"
_FIRM = (Limit.NUMBER, Limit.MAXPROCESSES)


class Others(NamedTuple):
    """The answers of the two hooks."""

    devices: Callable[[], Iterable[Device]] = tuple
    """Devices that NVML does not know."""
    last_word: Callable[[Plan], Plan | None] = lambda plan: plan
    """Another plan in place of the one that was made; None leaves it."""

    def joined(self, gpus: GpuFacts) -> GpuFacts:
        """The devices of NVML and of the hook. Raises `GpuShareError` for what is no device."""
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
        """The plan after the hook's last word; without slots its workers are CPU workers.

        Raises `GpuShareError` for a plan that promises what is not there.
        """
        given = self.last_word(plan)
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
