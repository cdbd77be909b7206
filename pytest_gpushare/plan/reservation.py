"""How much VRAM is kept for Ollama on each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.plan.ollama_share import is_named
from pytest_gpushare.probe.facts import Device, GpuFacts, OllamaFacts
from pytest_gpushare.settings.values import Settings

if TYPE_CHECKING:
    from pytest_gpushare.plan.demand import Server
    from pytest_gpushare.plan.model_needs import Demand


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
        from pytest_gpushare.plan.model_needs import demand_of

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
    from pytest_gpushare.plan.demand import Server

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
