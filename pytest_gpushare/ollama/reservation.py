"""How much VRAM is kept for Ollama, on which devices, and how much it holds there already."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.gpu.devices import Device, GpuFacts
from pytest_gpushare.ollama.architectures import ShapeUnknownError
from pytest_gpushare.ollama.models import (
    OLLAMA,
    LoadedModel,
    ModelFacts,
    OllamaFacts,
    full_name,
)
from pytest_gpushare.ollama.prediction import (
    MARGIN,
    NOTHING_KNOWN,
    OVERHEAD,
    KnownSizes,
    Prediction,
    Server,
    arithmetic,
    by_name,
    context_of,
    free_needed,
    overhead_key,
    predict,
)
from pytest_gpushare.units import MB, format_gb

_SHORT_CONTEXT = 8192
_STEP = 500 * MB
_RECENT = 14
"""Days for which a model that was seen counts as one that is in use."""


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
    return any(process.neighbour == OLLAMA for process in device.processes or ())


def _named(name: str, devices: Sequence[Device]) -> Device:
    matches = [device for device in devices if is_named(device, name)]
    if len(matches) != 1:
        known = ", ".join(f"{device.index} ({device.uuid})" for device in devices)
        fact = "names several devices" if matches else "names no device of this machine"
        raise SettingsError(
            f"gpu_share_ollama_gpu = {name}: {fact}: allowed is {known}, auto, none"
        )
    return matches[0]


class Source(str, Enum):
    """Where a figure comes from, in the words of the output."""

    LOADED = "loaded"
    SEEN = "seen in an earlier run"
    PREDICTED = "predicted"
    NAME = "by the size in its name"
    CLOUD = "runs in the cloud"


class ModelNeed(NamedTuple):
    """What one model needs."""

    name: str
    vram: int
    """Bytes that have to be free, or held by it, so that it is wholly on the GPU."""
    source: Source
    reason: str = ""
    """Why there is nothing better than its name to go by."""
    prediction: Prediction | None = None
    """What was predicted, whether or not something better was found."""
    missing: int = 0
    """Bytes of a loaded model that are not on the GPU."""
    arithmetic: tuple[str, ...] = ()
    """How each part of the prediction was computed, one line each."""
    smaller: tuple[str, ...] = ()
    """Ways to a smaller need where much of it is context, one phrase each."""

    @property
    def difference(self) -> int | None:
        """Bytes by which the model takes more than predicted; None where one is not known."""
        if self.prediction is None or self.source not in (Source.LOADED, Source.SEEN):
            return None
        if self.source is Source.LOADED:
            return self.vram - self.prediction.buffers
        return self.vram - self.prediction.vram


class Demand(NamedTuple):
    """What all the models together need."""

    needs: tuple[ModelNeed, ...] = ()
    asked: bool = True
    """Whether the server could be asked; if not, the figures are whole reservations."""

    @property
    def pending(self) -> int:
        """Bytes that models still have to be given: those not loaded, and what is missing."""
        return sum(
            need.missing if need.source is Source.LOADED else need.vram for need in self.needs
        )

    @property
    def margin(self) -> int:
        """Bytes that have to stay free beside a model when it is loaded."""
        return MARGIN if self.asked else 0

    def free_needed(self, choices: int) -> int:
        """Bytes that must be free on one of so many devices, beside what Ollama holds there."""
        if not self.asked:
            return self.pending
        return free_needed(self.pending, has_choice=choices > 1)

    def document(self) -> list[dict[str, object]]:
        """The needs in builtin types, for reports; sizes in bytes."""
        return [
            {
                "name": need.name,
                "vram_bytes": need.vram,
                "source": need.source.value,
                "predicted_bytes": need.prediction.vram if need.prediction else None,
                "difference_bytes": need.difference,
                "reason": need.reason,
            }
            for need in self.needs
        ]


def demand_of(
    names: Sequence[str], ollama: OllamaFacts, server: Server, sizes: KnownSizes
) -> Demand:
    """What the named models need, and what is loaded beside them."""
    if not ollama.answered:
        return Demand(
            tuple(_by_name(ModelFacts(name), "Ollama cannot be asked") for name in names),
            asked=False,
        )
    facts = {full_name(model.name): model for model in ollama.relied_on}
    loaded = {full_name(model.name): model for model in ollama.models}
    digests = {model.digest: model for model in ollama.relied_on if model.digest}
    needs = [
        _loaded(model, facts.get(name) or digests.get(model.digest), server, sizes)
        for name, model in loaded.items()
    ]
    if not ollama.on_this_host:
        # What is loaded elsewhere is not resident here, so that VRAM for all of it is kept.
        needs = [need._replace(missing=need.vram) for need in needs]
    # Two names of one file share one process, which is listed under the first of them.
    counted = {model.digest for model in ollama.models if model.digest}
    counted |= {f"{facts[name].blob} {facts[name].num_ctx}" for name in loaded if name in facts}
    for name, written in {full_name(written): written for written in names}.items():
        model = facts.get(name, ModelFacts(written, problem="it was not asked for"))
        file = f"{model.blob} {model.num_ctx}" if model.blob else name
        if name not in loaded and not counted & {model.digest, file}:
            counted.add(file)
            needs.append(need_of(model, server, sizes))
    return Demand(tuple(needs))


def _loaded(
    model: LoadedModel, facts: ModelFacts | None, server: Server, sizes: KnownSizes
) -> ModelNeed:
    """What it holds; one that the run relies on wants what it lacks, too, when it is reloaded.

    `size` of a model that is partly on the CPU is not what it needs on the GPU: the token
    embeddings are in it, and other buffers. So that is sizes or predicted.
    """
    if facts is None:
        return ModelNeed(model.name, model.on_gpu, Source.LOADED)
    # Predicted for the context that it has, so that the two figures can be compared.
    as_loaded = server._replace(context=model.context or server.context)
    whole = need_of(facts._replace(num_ctx=None), as_loaded, sizes)
    if not model.is_spilled:
        held = model.size if model.size_vram is None else model.on_gpu
        least = whole.prediction.buffers if whole.prediction and whole.prediction.has_window else 0
        return whole._replace(name=model.name, vram=max(held, least), source=Source.LOADED)
    overhead = OVERHEAD if server.overhead is None else server.overhead
    needed = whole.vram
    if whole.source is Source.NAME:
        needed = model.size + overhead
    held = model.on_gpu + overhead if model.on_gpu else 0
    return whole._replace(
        name=model.name,
        vram=needed - overhead,
        source=Source.LOADED,
        reason="",
        missing=max(0, needed - held),
    )


def need_of(model: ModelFacts, server: Server, sizes: KnownSizes) -> ModelNeed:
    """What a model that is not loaded needs: as it was seen, else predicted, else by its name."""
    if model.is_remote:
        return ModelNeed(model.name, 0, Source.CLOUD)
    reason, prediction, lines = "", None, tuple[str, ...]()
    try:
        prediction = predict(model, server)
        lines = tuple(arithmetic(model, server))
    except ShapeUnknownError as error:
        reason = str(error)
    context = prediction.context if prediction else context_of(model.num_ctx, server)
    seen = sizes.models.get(server.key(model.digest, context)) if model.digest else None
    if seen is None and prediction is None:
        return _by_name(model, reason)
    found = ModelNeed(
        model.name,
        0,
        Source.PREDICTED if seen is None else Source.SEEN,
        prediction=prediction,
        arithmetic=lines,
        smaller=() if prediction is None else _smaller(model, server, prediction),
    )
    if prediction is None:
        return found._replace(vram=seen.vram if seen else 0)
    if seen is None:
        return found._replace(vram=prediction.vram)
    # With a window the server reports too little, and NVML may not have been asked.
    least = prediction.vram if prediction.has_window else 0
    return found._replace(vram=max(seen.vram, least))


def _smaller(model: ModelFacts, server: Server, found: Prediction) -> tuple[str, ...]:
    """What a smaller context or cache would need, where the context costs a good part."""
    if found.context <= _SHORT_CONTEXT or found.kv_cache < found.buffers // 5:
        return ()
    short = predict(model._replace(num_ctx=_SHORT_CONTEXT), server)
    ways = [
        f"{format_gb(short.vram)} at {_SHORT_CONTEXT} tokens (PARAMETER num_ctx in the model, or "
        "OLLAMA_CONTEXT_LENGTH of the server)"
    ]
    if server.kv_cache_type == "f16":
        packed = predict(model, server._replace(kv_cache_type="q8_0"))
        ways.append(f"{format_gb(packed.vram)} with OLLAMA_KV_CACHE_TYPE=q8_0")
    return tuple(ways)


def _by_name(model: ModelFacts, reason: str) -> ModelNeed:
    size = by_name(model.name, model.parameter_size, model.file_bytes)
    return ModelNeed(model.name, size, Source.NAME, reason)


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
    sizes: KnownSizes,
) -> Reservation:
    """The reservation on each device that Ollama uses, or may use while that is unknown.

    `known` has the devices that it uses, `resident` the bytes that it holds on each.
    """
    demand = None
    if settings.ollama_models:
        server = server_of(settings, gpus, ollama, sizes)
        demand = demand_of(settings.ollama_models, ollama, server, sizes)
    if is_released(settings, gpus, ollama):
        return Reservation({}, demand, is_released=True)
    may_use = gpus.all_devices if known is None else known
    if settings.ollama_vram_reservation is not None:
        fixed = int(settings.ollama_vram_reservation)
        return Reservation({device.uuid: fixed for device in may_use}, demand)
    more = demand.free_needed(len(may_use)) if demand else 0
    held = resident if ollama.answered else {}
    return Reservation({d.uuid: held.get(d.uuid, 0) + more for d in may_use}, demand)


def server_of(
    settings: Settings, gpus: GpuFacts, ollama: OllamaFacts, sizes: KnownSizes = NOTHING_KNOWN
) -> Server:
    """How the server is set up, from its answers and the settings.

    Its context goes by the VRAM of all its devices: those that the user named, else every one.
    """
    named = [d for d in gpus.all_devices if any(is_named(d, n) for n in settings.ollama_gpu)]
    devices = named or list(gpus.all_devices)
    keys = {overhead_key(device.name, ollama.version) for device in devices}
    overheads = [sizes.overheads.get(key) for key in keys]
    known = [size for size in overheads if size is not None]
    return Server(
        total_vram=sum(device.total for device in devices),
        version=ollama.version,
        context=settings.ollama_context,
        parallel=settings.ollama_parallel,
        kv_cache_type=settings.ollama_kv_cache_type,
        overhead=max(known) if known and len(known) == len(overheads) else None,
    )


def seen_larger(
    settings: Settings, gpus: GpuFacts, ollama: OllamaFacts, sizes: KnownSizes
) -> tuple[str, ...]:
    """A sentence on the largest model that recent runs saw and the reservation does not hold;
    none where it holds them all, or follows the models that are named."""
    reservation = settings.ollama_vram_reservation
    if not reservation or not ollama.asked or is_released(settings, gpus, ollama):
        return ()
    named = {full_name(name) for name in settings.ollama_models}
    there = {full_name(model.name) for model in ollama.models}
    since = time.strftime("%Y-%m-%d", time.gmtime(time.time() - _RECENT * 86400))
    recent = [
        model
        for model in sizes.models.values()
        if model.date >= since and full_name(model.name) not in named | there
    ]
    largest = max(recent, key=lambda model: model.vram, default=None)
    if largest is None or largest.vram <= reservation:
        return ()
    needed = -(-(largest.vram + MARGIN) // _STEP) * _STEP
    text = (
        f"Ollama's {largest.name} held {format_gb(largest.vram)} of VRAM in an earlier run, at "
        f"{largest.context} tokens, more than the {format_gb(int(reservation))} reserved for it: "
    )
    if needed > max((device.total for device in gpus.all_devices), default=0):
        return (
            f"{text}no device here holds it with 1.0 GB free next to it: use a smaller context "
            "(OLLAMA_CONTEXT_LENGTH)",
        )
    return (f"{text}gpu_share_ollama_vram_reservation_mb = {needed // MB} would hold it",)


def is_released(settings: Settings, gpus: GpuFacts, ollama: OllamaFacts) -> bool:
    """Whether nothing is kept, as asked for, since no server was reached.

    A server that answers nonsense is there, and so is one whose processes hold VRAM.
    """
    if settings.ollama_unreachable != "release" or not ollama.asked:
        return False
    holds_vram = any(p.neighbour == OLLAMA for d in gpus.all_devices for p in d.processes or ())
    return not (ollama.answered or ollama.reachable or holds_vram)
