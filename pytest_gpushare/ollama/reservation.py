"""Where the reservation is held, and how much of it Ollama holds already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.gpu.devices import Device, GpuFacts
from pytest_gpushare.ollama.models import OllamaFacts

if TYPE_CHECKING:
    from pytest_gpushare.ollama.prediction import Demand, Server


def devices_of_ollama(setting: Sequence[str], gpus: GpuFacts) -> tuple[Device, ...] | None:
    """The devices that Ollama uses; None while that is unknown, () where it uses none.

    Those on which NVML lists one of its processes, and those that the setting names, which is
    where it may load more. Raises `SettingsError` for a name that is no device of this host.
    """
    if tuple(setting) == ("none",):
        return ()
    devices = gpus.all_devices
    named = () if tuple(setting) == ("auto",) else [_named(n, devices) for n in setting if devices]
    found = tuple(d for d in devices if d in named or _lists_ollama(d))
    return found or (devices if len(devices) == 1 else None)


def unexpected(setting: Sequence[str], gpus: GpuFacts) -> tuple[Device, ...]:
    """The devices on which Ollama's processes are, though the setting names others alone."""
    if tuple(setting) in (("auto",), ("none",)):
        return ()
    return tuple(
        d
        for d in gpus.all_devices
        if _lists_ollama(d) and not any(is_named(d, name) for name in setting)
    )


def is_named(device: Device, name: str) -> bool:
    """Whether a name is the index of the device, or the start of its UUID."""
    if name.isdigit():
        return device.index == name
    return device.index == name or device.uuid.lower().startswith(name.lower())


def _lists_ollama(device: Device) -> bool:
    return any(process.is_ollama for process in device.processes or ())


def resident_bytes(
    known: Sequence[Device] | None, gpus: GpuFacts, ollama: OllamaFacts
) -> Mapping[str, int]:
    """UUID -> bytes that Ollama holds there; no byte is counted on two devices.

    NVML's figure for its processes is the best one, as `/api/ps` leaves out contexts and
    pools. Where NVML does not tell, what the server says is laid on the devices that it
    uses, the fullest first (while they are unknown: on all), and never more than is in use.
    Of several on which its processes are listed without their sizes, each gets its part: a
    model may be split over them. A server on another host holds nothing here.
    """
    if ollama.asked and not ollama.on_this_host:
        return {}
    candidates = gpus.all_devices if known is None else known
    told = {d.uuid: min(_by_process(d), d.used) for d in candidates if _by_process(d)}
    left = max(0, ollama.vram - sum(told.values())) if ollama.answered else 0
    result = dict(told)
    split = [d for d in candidates if d.uuid not in told and _lists_ollama(d)]
    used, shared = sum(d.used for d in split) or 1, left
    for device in split if len(split) > 1 else ():
        result[device.uuid] = min(device.used, shared * device.used // used)
        left -= result[device.uuid]
    for device in sorted(candidates, key=lambda d: (-d.used, d.uuid)):
        more = min(left, device.used - result.get(device.uuid, 0))
        result[device.uuid] = result.get(device.uuid, 0) + more
        left -= more
    return result


def _by_process(device: Device) -> int:
    return sum(p.used or 0 for p in device.processes or () if p.is_ollama)


def _named(name: str, devices: Sequence[Device]) -> Device:
    matches = [device for device in devices if is_named(device, name)]
    if len(matches) != 1:
        known = ", ".join(f"{device.index} ({device.uuid})" for device in devices)
        fact = "names several devices" if matches else "names no device of this machine"
        raise SettingsError(
            f"gpu_share_ollama_gpu = {name}: {fact}: allowed is {known}, auto, none"
        )
    return matches[0]


class Reservation(NamedTuple):
    """What is kept for Ollama."""

    per_device: Mapping[str, int]
    """UUID -> bytes, resident ones included; a device without an entry keeps nothing."""
    demand: Demand | None = None
    """What the models need that the user named; None where none is named."""
    is_released: bool = False
    """Whether nothing is kept because no server was reached."""


def reserve(
    settings: Settings,
    gpus: GpuFacts,
    ollama: OllamaFacts,
    known: Sequence[Device] | None,
    resident: Mapping[str, int],
    seen: Mapping[str, int],
) -> Reservation:
    """The reservation on each device that Ollama uses, or may use while that is unknown.

    `known` has the devices that it uses, `resident` the bytes that it holds on each, `seen`
    the sizes of its models in earlier runs.
    """
    demand = None
    if settings.ollama_models:
        # Only here: a run that names no model does not pay for the import.
        from pytest_gpushare.ollama.prediction import demand_of

        demand = demand_of(settings.ollama_models, ollama, server_of(settings, gpus, ollama), seen)
    if is_released(settings, gpus, ollama):
        return Reservation({}, demand, is_released=True)
    may_use = gpus.all_devices if known is None else known
    if settings.ollama_vram_reservation is not None:
        fixed = int(settings.ollama_vram_reservation)
        return Reservation({device.uuid: fixed for device in may_use}, demand)
    more = demand.room(len(may_use)) if demand else 0
    held = resident if ollama.answered else {}
    return Reservation({d.uuid: held.get(d.uuid, 0) + more for d in may_use}, demand)


def server_of(settings: Settings, gpus: GpuFacts, ollama: OllamaFacts) -> Server:
    """How the server is set up, from its answers and the settings.

    Its context goes by the VRAM of all its devices: those that the user named, else every one.
    """
    from pytest_gpushare.ollama.prediction import Server

    named = [d for d in gpus.all_devices if any(is_named(d, n) for n in settings.ollama_gpu)]
    return Server(
        total_vram=sum(device.total for device in named or gpus.all_devices),
        version=ollama.version,
        context=settings.ollama_context,
        parallel=settings.ollama_parallel,
        kv_cache_type=settings.ollama_kv_cache_type,
    )


def is_released(settings: Settings, gpus: GpuFacts, ollama: OllamaFacts) -> bool:
    """Whether nothing is kept, as asked for, since no server was reached.

    A server that answers nonsense is there, and so is one whose processes hold VRAM.
    """
    if settings.ollama_unreachable != "release" or not ollama.asked:
        return False
    holds_vram = any(p.is_ollama for d in gpus.all_devices for p in d.processes or ())
    return not (ollama.answered or ollama.reachable or holds_vram)
