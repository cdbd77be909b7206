"""Which device each worker sees, as environment variables."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping

from pytest_gpushare.plan.model import Plan
from pytest_gpushare.probe.visibility import VARIABLE

ROLE = "PYTEST_GPUSHARE_ROLE"
"""`gpu` or `cpu`: what a worker is; set in its environment before its first import."""

SLOT = "PYTEST_GPUSHARE_SLOT"
"""Bytes of VRAM of a GPU worker's slot, for runs that its tests start."""


def worker_environment(plan: Plan, number: int, *, simulated: bool) -> dict[str, str]:
    """The variables for the worker of this number, from 0: GPU workers first, then CPU workers.

    A GPU worker sees its device alone, named by its full UUID; a CPU worker sees none.
    A what-if names devices that do not exist, so there the visibility is left as it is.
    """
    slot = plan.slots[number] if number < len(plan.slots) else None
    environment = {ROLE: "gpu", SLOT: str(slot.vram)} if slot else {ROLE: "cpu", SLOT: "0"}
    if not simulated:
        environment[VARIABLE] = slot.device.uuid if slot else ""
    return environment


def slot_of_outer_run(environment: Mapping[str, str]) -> int | None:
    """Bytes that a run inside a GPU worker may share out: its slot; None outside of one."""
    text = environment.get(SLOT, "")
    if environment.get(ROLE) != "gpu" or not re.fullmatch("[0-9]{1,18}", text):
        return None
    return int(text)


def place_this_process(plan: Plan, *, simulated: bool) -> Callable[[], None]:
    """Let this process see the device of its slot; the result undoes that."""
    wanted = worker_environment(plan, 0, simulated=simulated)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    return lambda: _restore(before)


def cuda_is_up(own_process_has_context: bool) -> bool:
    """Whether CUDA was initialised in this process, so that its visibility is settled.

    Asks no framework to load: what is not imported has not initialised anything.
    """
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    return own_process_has_context or bool(is_initialized and is_initialized())


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
