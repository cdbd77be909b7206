"""How much of a model is on the GPU, in the words of every line that tells it."""

from __future__ import annotations

from pytest_gpushare.probe.facts import LoadedModel
from pytest_gpushare.units import format_gb


def placed(model: LoadedModel) -> str:
    """`qwen2.5:14b 10.8 GB, 100 % on GPU`."""
    size = format_gb(model.size)
    if model.size_vram > model.size or not model.size:
        return f"{model.name} {size}, {format_gb(model.size_vram)} on GPU"
    if not model.size_vram:
        return f"{model.name} {size}, on the CPU, not on GPU"
    # Rounded down, so that only a model that is wholly there is called 100 %.
    return f"{model.name} {size}, {100 * model.size_vram // model.size} % on GPU"
