"""What xdist was told: how many workers, and whether there are workers at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpushare.plan.model import Request
from pytest_gpushare.settings.gpu_auto import GPU_AUTO, is_in_process

if TYPE_CHECKING:
    import pytest


def keeps_own_workers(options: Any) -> bool:
    """Whether `--tx` alone names the workers; with a number xdist overwrites it."""
    return bool(getattr(options, "tx", None)) and options.numprocesses is None


def local_workers(tx: list[str]) -> int:
    """How many workers on this host the specs of `--tx` list, such as `3*popen`.

    Those to which the user gave devices are not counted: they take no slot.
    """
    count = 0
    for text in tx:
        times, star, spec = text.partition("*")
        if not (star and times.isdigit()):
            times, spec = "1", text
        parts = spec.split("//")
        kept = parts[0] == "popen" and not any(
            part.startswith(("via=", "env:CUDA_VISIBLE_DEVICES=")) for part in parts
        )
        count += int(times) if kept else 0
    return count


def request_for(config: pytest.Config) -> tuple[Request, int]:
    """What the user asked of xdist, and how many workers its `auto` would start."""
    options = config.option
    if is_in_process(options):
        return Request(in_process=True), 1
    if keeps_own_workers(options):
        return Request(local_workers(options.tx), fixed=True), 1
    given = options.numprocesses
    cpus = _xdist_auto(config, "logical" if given == "logical" else "auto")
    number = {"auto": cpus, "logical": cpus, GPU_AUTO: None}.get(given, given)
    return Request(number, options.maxprocesses or None), cpus


def _xdist_auto(config: pytest.Config, word: str) -> int:
    """xdist's count, by its own hook, which reads the word from the option."""
    given = config.option.numprocesses
    config.option.numprocesses = word
    try:
        count = config.hook.pytest_xdist_auto_num_workers(config=config)
    finally:
        config.option.numprocesses = given
    return max(1, count) if isinstance(count, int) else 1
