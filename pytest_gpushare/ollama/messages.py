"""The sentences on what happened to Ollama's models, one for each change."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_gpushare.config.options import INI_PREFIX
from pytest_gpushare.ollama import history
from pytest_gpushare.ollama.history import Change, differences
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.prediction import MARGIN, OVERHEAD
from pytest_gpushare.ollama.spill import Cause, Setting, Spill
from pytest_gpushare.units import format_gb


def placed(model: LoadedModel) -> str:
    """`qwen2.5:14b 10.8 GB, 100 % on GPU`."""
    size = format_gb(model.size)
    if model.size_vram is None or not model.size:
        return f"{model.name} {size}, how much of it on GPU is unknown"
    if not model.size_vram:
        return f"{model.name} {size}, on the CPU, not on GPU"
    # Rounded down, so that only a model that is wholly there is called 100 %.
    part = f"{100 * model.size_vram // model.size} % on GPU"
    # Buffers are on the GPU also where no layer is.
    return f"{model.name} {size}, {part}{', perhaps no layer' if has_no_layer(model) else ''}"


_BUFFERS = 10
"""Per cent of a model that may be on the GPU though no layer of it is."""


def has_no_layer(model: LoadedModel) -> bool:
    """Whether what is on the GPU is so little that it may be buffers alone."""
    return model.is_spilled and 100 * model.on_gpu < _BUFFERS * model.size


def uses_no_gpu(model: LoadedModel, free: int | None) -> bool:
    """Whether a model is in RAM though there was VRAM for all of it."""
    return has_no_layer(model) and free is not None and free > model.size + MARGIN + OVERHEAD


NO_GPU = (
    "the server uses no GPU, or num_gpu or a setting keeps the model off it (its log says which "
    "devices it found; CUDA_VISIBLE_DEVICES may hide them from it)"
)


_MOST_WORKERS = 8


def sentence(change: Change) -> str:
    """What happened, for the record."""
    if change.kind == history.UNREACHABLE:
        return f"Ollama does not answer any more: {change.problem}"
    if change.kind == history.BACK:
        return "Ollama answers again" if change.since < change.at else "Ollama answers"
    model, before = change.model, change.before
    assert model is not None
    if change.kind == history.UNLOADED:
        return f"Ollama unloaded {model.name} ({format_gb(model.size)})"
    if change.kind == history.RECOVERED:
        return f"Ollama has all of {model.name} on the GPU again ({format_gb(model.size)})"
    if change.kind == history.RELOADED and before is not None:
        return f"Ollama reloaded {placed(model)}{_changed(before, model)}"
    return f"Ollama loaded {placed(model)}"


def spilled(spill: Spill) -> str:
    """What a load left on the CPU, and who held what then."""
    model = spill.model
    what = f"{format_gb(spill.missing)} of {model.name} ({format_gb(model.size)})"
    return f"Ollama put {what} on the CPU; {held(spill)}"


def held(spill: Spill) -> str:
    """`VRAM then: tests 16.0 GB (gw0 8.0 GB, gw1 8.0 GB), others 2.0 GB, 6.0 GB free`."""
    if spill.free is None:
        return "who held VRAM then is unknown"
    free = f"{format_gb(spill.free)} free"
    if spill.tests is None:
        return f"VRAM then: {free}; the driver does not tell who held the rest"
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
            f"{format_gb(budget)} of VRAM that the tests had; the driver does not tell which"
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
            "num_gpu, the server's own settings limit it, or somebody held VRAM for a moment"
        )
    return "NVML told nothing of the GPU then, so the cause is unknown"


def _would(setting: Setting | None) -> str:
    if setting is None:
        return ""
    price = ", without any GPU worker beside it" if setting.is_without_workers else ""
    return f": {INI_PREFIX}{setting.key} = {setting.value} would have kept it on the GPU{price}"


def _workers(by_worker: Mapping[str, int]) -> str:
    if len(by_worker) < 2:
        return f" ({next(iter(by_worker))})" if by_worker else ""
    largest = sorted(by_worker, key=lambda worker: (-by_worker[worker], worker))
    shown = [f"{worker} {format_gb(by_worker[worker])}" for worker in largest[:_MOST_WORKERS]]
    more = len(largest) - len(shown)
    return f" ({', '.join(shown)}{f' and {more} more' if more else ''})"


def _changed(before: LoadedModel, now: LoadedModel) -> str:
    """`; context 4096, now 8192`: what a request asked for that made it reload."""
    changed = differences(before, now)
    parts = []
    if "context" in changed and before.context and now.context:
        parts.append(f"context {before.context}, now {now.context}")
    if "digest" in changed:
        parts.append("another version of the model")
    if "size" in changed:
        parts.append(f"size {format_gb(before.size)}, now {format_gb(now.size)}")
    return f"; {', '.join(parts)}" if parts else ""
