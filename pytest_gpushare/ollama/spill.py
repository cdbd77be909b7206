"""Why a part of a model went to the CPU, and the setting that would have prevented it.

Ollama asks for free VRAM when it loads a model, and for nothing later. So the question is what
was held at that moment, by which process, and whether the plan had promised it to Ollama.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.config.options import INI_PREFIX
from pytest_gpushare.gpu.attribution import DeviceUsage, combined
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, has_no_layer
from pytest_gpushare.ollama.prediction import MARGIN, OVERHEAD, free_needed
from pytest_gpushare.units import GB, MB, format_gb

_RESERVATION = "ollama_vram_reservation_mb"
_STEP_MB = 500
_HALF_GB = GB // 2


class Promise(NamedTuple):
    """What the plan left to Ollama on the devices that it may use; bytes."""

    start: Mapping[str, DeviceUsage]
    """UUID -> who held what when the plan was made."""
    budgets: Mapping[str, int]
    """UUID -> what the tests may hold."""
    reservation: int
    """What was kept for Ollama on each device."""
    safety_buffer: int
    needed: int
    """The smallest slot."""


class Setting(NamedTuple):
    """A setting with the value that would have prevented a spill."""

    key: str
    value: str
    is_without_workers: bool = False
    """Whether no GPU worker would have fitted any more."""


def larger_slots(largest: int, promise: Promise) -> Setting:
    """Slots as large as the largest worker was, so that fewer of them share the budget."""
    slot = -(-largest // _HALF_GB) * _HALF_GB
    return Setting(
        "min_vram_per_worker_gb",
        f"{slot / GB:g}",
        is_without_workers=slot > max(promise.budgets.values(), default=0),
    )


def larger_reservation(needed: int, promise: Promise) -> Setting | None:
    """The reservation that keeps so much, rounded up; None where no device has it."""
    megabytes = -(-needed // (_STEP_MB * MB)) * _STEP_MB
    kept = megabytes * MB
    rooms = [h.free + h.of(OLLAMA) for h in promise.start.values()]
    if needed > max(rooms, default=0):
        return None
    left = max(
        held.free - max(0, kept - held.of(OLLAMA)) - promise.safety_buffer
        for held in promise.start.values()
    )
    return Setting(_RESERVATION, str(megabytes), left < promise.needed)


_MOST_CONTEXT = 2 * GB


class Cause(str, Enum):
    """Why a part of a model is on the CPU."""

    RESERVATION = "reservation"
    """The tests kept to their budget; what was reserved was too small for the model."""
    TESTS = "tests"
    """The tests held VRAM that was reserved for Ollama."""
    OTHERS = "others"
    """Another process took what was reserved."""
    DOUBT = "tests or others"
    """One of the two; the driver does not show which."""
    SIZE = "size"
    """It would not have fitted without any tests either."""
    OPTIONS = "options"
    """There was VRAM: a request set `num_gpu`, or the server's settings limit it."""
    UNKNOWN = "unknown"
    """What was held is unknown."""


OURS = frozenset({Cause.RESERVATION, Cause.TESTS, Cause.DOUBT})
"""The causes for which the run answers: without its tests the model would have stayed
on the GPU."""


class Spill(NamedTuple):
    """A load that left a part of a model on the CPU; bytes."""

    at: float
    """Seconds since the run started."""
    model: LoadedModel
    cause: Cause
    missing: int
    """What is not on the GPU."""
    tests: int | None
    """The most that the tests held while it was loaded; None where that is unknown."""
    by_worker: Mapping[str, int]
    others: int | None
    free: int | None
    """The least that was free meanwhile."""
    excess: int = 0
    """By how much more than they should was held by those who are the cause."""
    room: int = 0
    """What was there for Ollama and the tests together when the plan was made."""
    required: int = 0
    """What had to be free for the model."""
    setting: Setting | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the run answers for it."""
        return self.cause in OURS

    def with_largest(self, spills: Iterable[Spill]) -> Spill:
        """The same, with the largest reservation that any of these would have needed."""
        if self.setting is None or self.setting.key != _RESERVATION:
            return self
        settings = [self.setting, *(s.setting for s in spills if s.setting is not None)]
        largest = max(
            (setting for setting in settings if setting.key == _RESERVATION),
            key=lambda setting: int(setting.value),
        )
        return self._replace(setting=largest)


def judge(
    at: float,
    model: LoadedModel,
    other_models: Sequence[LoadedModel],
    window: Sequence[Mapping[str, DeviceUsage]],
    promise: Promise,
) -> Spill:
    """Why a part of `model` went to the CPU.

    `other_models` are those that were loaded then, `window` what was held on the devices
    that Ollama may use, from before the load to after it. Between two looks much may happen:
    how much was free when Ollama decided follows from how much it put on the GPU.
    """
    missing = model.size - model.on_gpu
    moments = [combined(held.values()) for held in window if held]
    if not moments:
        return Spill(at, model, Cause.UNKNOWN, missing, None, {}, None, None)
    start, devices = combined(promise.start.values()), len(promise.start)
    context = context_of([model, *other_models], window[-1])
    # Taken by all but Ollama, as it decided; too much by a layer at most.
    taken = sum(h.total for h in promise.start.values())
    taken -= model.on_gpu + devices * (context + MARGIN)
    taken -= sum(other.on_gpu + context for other in other_models)
    slack = model.size // 10 + OVERHEAD
    was_seen = max(moment.net_of_neighbours for moment in moments) >= taken - slack
    # Where so much was never held, what Ollama found free says nothing.
    least = taken - slack if was_seen else 0
    tests, by_worker, others = _holders(moments, least, missing)
    room = sum(h.free + h.of(OLLAMA) for h in promise.start.values())
    required = required_free(model, other_models, context, devices)
    if required > room:
        # Ollama would have unloaded the other models first.
        required = required_free(model, (), context, devices)
    spill = Spill(
        at, model, Cause.UNKNOWN, missing, tests, by_worker, others,
        free=min(moment.free for moment in moments), room=room, required=required,
    )  # fmt: skip
    if not was_seen:
        return spill._replace(cause=Cause.OPTIONS)
    if required > room:
        return spill._replace(cause=Cause.SIZE)
    grown = 0
    if others is not None and start.remainder is not None:
        grown = max(0, others - start.remainder)
    budget = sum(promise.budgets.values())
    held = max(0, taken - start.net_of_neighbours) if tests is None else tests
    if not held and not grown:
        return spill._replace(cause=Cause.OPTIONS)
    if spill.required > promise.reservation + promise.safety_buffer and held:
        return _reservation(spill, spill.required, promise)
    if held > budget + slack // 2:
        if tests is None:
            return _others(spill, held - budget, promise)._replace(cause=Cause.DOUBT)
        return _tests(spill, tests - budget, promise)
    if grown:
        return _others(spill, grown, promise)
    # More was needed than Ollama's rules explain: what it was short of goes on top.
    more = _reservation(spill, promise.reservation + max(0, budget - held) + missing, promise)
    return more if more.setting is not None else spill._replace(cause=Cause.OPTIONS)


def _holders(
    moments: Sequence[DeviceUsage], taken: int, missing: int
) -> tuple[int | None, Mapping[str, int], int | None]:
    """What the tests held in all, by worker, and the others; None where that is unknown."""
    known = [moment for moment in moments if moment.workers is not None]
    if not known:
        return None, {}, None
    fullest = max(known, key=lambda moment: moment.tests or 0)
    others = max(moment.remainder or 0 for moment in known)
    tests = fullest.tests or 0
    if tests >= missing or taken - others <= tests:
        return tests, fullest.workers or {}, others
    # Held for less than the time between two looks: what was taken at least, less the others.
    return taken - others, {}, others


def context_of(loaded: Sequence[LoadedModel], held: Mapping[str, DeviceUsage]) -> int:
    """Bytes that a runner takes beside its model: contexts and pools, which only NVML sees."""
    seen = sum(h.of(OLLAMA) for h in held.values()) - sum(each.on_gpu for each in loaded)
    context = -(-seen // len(loaded))
    # Or it is a runner on its way out, the VRAM of which comes back late.
    return context if 0 < context <= _MOST_CONTEXT else OVERHEAD


def required_free(
    model: LoadedModel, other_models: Sequence[LoadedModel], context: int, devices: int
) -> int:
    """Bytes that the reservation must keep, so that Ollama loads all of a model on one device.

    By its own rules, and with what the other models take.
    """
    least = free_needed(model.size + context, has_choice=bool(other_models) or devices > 1)
    return least + sum(each.on_gpu + context for each in other_models)


def _reservation(spill: Spill, needed: int, promise: Promise) -> Spill:
    setting = larger_reservation(needed, promise)
    if setting is None:
        return spill._replace(cause=Cause.SIZE)
    excess = max(0, needed - promise.reservation)
    return spill._replace(cause=Cause.RESERVATION, excess=excess, setting=setting)


def _others(spill: Spill, taken: int, promise: Promise) -> Spill:
    setting = larger_reservation(spill.required + taken, promise)
    return spill._replace(cause=Cause.OTHERS, excess=taken, setting=setting)


def _tests(spill: Spill, excess: int, promise: Promise) -> Spill:
    setting = larger_slots(max(spill.by_worker.values(), default=0), promise)
    return spill._replace(cause=Cause.TESTS, excess=excess, setting=setting)


def has_room(model: LoadedModel, free: int | None) -> bool:
    """Whether there is VRAM for all of a model of which a part is on the CPU."""
    return free is not None and free > model.size + MARGIN + OVERHEAD


def uses_no_gpu(model: LoadedModel, free: int | None) -> bool:
    """Whether a model is in RAM though there was VRAM for all of it."""
    return has_no_layer(model) and has_room(model, free)


NO_GPU = (
    "the server uses no GPU, or num_gpu or a setting keeps the model off it (its log says which "
    "devices it found; CUDA_VISIBLE_DEVICES may hide them from it)"
)


def why_in_ram(model: LoadedModel) -> str:
    """Why a model is in RAM that was loaded at an unknown time, and what to do; its buffers are
    on the GPU if the server has one."""
    reload = f"reload it (ollama stop {model.name})"
    if model.on_gpu:
        return (
            "it was loaded while VRAM was taken, and a loaded model is never moved: "
            f"{reload}; if it stays in RAM, {NO_GPU}"
        )
    return f"{NO_GPU}; or it was loaded while VRAM was taken: then {reload}"


_MOST_WORKERS = 8


def spilled(spill: Spill) -> str:
    """What a load left on the CPU, and who held what then."""
    model = spill.model
    what = f"{format_gb(spill.missing)} of {model.name} ({format_gb(model.size)})"
    return f"Ollama put {what} on the CPU; {held_by(spill)}"


def held_by(spill: Spill) -> str:
    """`VRAM then: tests 16.0 GB (gw0 8.0 GB, gw1 8.0 GB), others 2.0 GB, 6.0 GB free`."""
    if spill.free is None:
        return "who held VRAM then is unknown"
    free = f"{format_gb(spill.free)} free"
    if spill.tests is None:
        return f"VRAM then: {free}; the driver does not report which processes held the rest"
    others = "" if spill.others is None else f"others {format_gb(spill.others)}, "
    return f"VRAM then: tests {format_gb(spill.tests)}{_workers(spill.by_worker)}, {others}{free}"


def why(spill: Spill, reservation: int, budget: int) -> str:
    """The cause, and the setting that would have prevented it; bytes."""
    needs = f"needs {format_gb(spill.required)}"
    if spill.cause is Cause.RESERVATION:
        return f"the reservation of {format_gb(reservation)} was too small{_would(spill.setting)}"
    if spill.cause is Cause.TESTS:
        return (
            f"the tests held {format_gb(spill.excess)} more than the {format_gb(budget)} of VRAM "
            f"that they had{_would(spill.setting)}"
        )
    if spill.cause is Cause.OTHERS:
        return (
            f"other processes took {format_gb(spill.excess)} of VRAM after the start"
            f"{_would(spill.setting) or ': end them before the tests'}"
        )
    if spill.cause is Cause.DOUBT:
        return (
            f"tests or other processes held {format_gb(spill.excess)} more than the "
            f"{format_gb(budget)} of VRAM that the tests had; the driver does not report which"
            f"{_would(spill.setting)}"
        )
    if spill.cause is Cause.SIZE:
        return (
            f"no setting would have kept it on the GPU: it {needs}, and {format_gb(spill.room)} "
            "of VRAM are there for it and the tests"
        )
    if spill.cause is Cause.OPTIONS:
        return (
            "whenever VRAM was looked at, there was room for all of it on the GPU: a request set "
            "num_gpu, the server's own settings limit it, or another process held VRAM for a moment"
        )
    return "NVML gave no reading at that time, so the cause is unknown"


def _would(setting: Setting | None) -> str:
    if setting is None:
        return ""
    price = ", without any GPU worker next to it" if setting.is_without_workers else ""
    return f": {INI_PREFIX}{setting.key} = {setting.value} would have kept it on the GPU{price}"


def _workers(by_worker: Mapping[str, int]) -> str:
    if len(by_worker) < 2:
        return f" ({next(iter(by_worker))})" if by_worker else ""
    largest = sorted(by_worker, key=lambda worker: (-by_worker[worker], worker))
    shown = [f"{worker} {format_gb(by_worker[worker])}" for worker in largest[:_MOST_WORKERS]]
    more = len(largest) - len(shown)
    return f" ({', '.join(shown)}{f' and {more} more' if more else ''})"
