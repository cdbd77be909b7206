"""The way from settings to a plan at the start of a run, and what is held until its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gpushare.errors import NoRoomError
from pytest_gpushare.plan.model import Plan, Request
from pytest_gpushare.plan.sizing import make_plan
from pytest_gpushare.probe.facts import GpuFacts, HostFacts, OllamaFacts
from pytest_gpushare.probe.host import available_ram
from pytest_gpushare.probe.together import probe
from pytest_gpushare.probe.visibility import VARIABLE
from pytest_gpushare.run.placement import slot_of_outer_run, worker_environment
from pytest_gpushare.settings.values import Settings
from pytest_gpushare.units import format_gb


@dataclass(frozen=True)
class LeftAlone:
    """A run that asked, but whose workers are the user's own; nothing is probed."""

    why: str

    def close(self) -> None:
        """Nothing is held."""

    def place(self, specs: Sequence[Any]) -> None:
        """Nothing is placed."""


@dataclass
class Started:
    """A run for which the plan is made: what was found, what was decided, what is held."""

    settings: Settings
    gpus: GpuFacts
    ollama: OllamaFacts
    plan: Plan
    close: Callable[[], None]
    """Releases NVML; harmless when called twice."""
    notes: list[str] = field(default_factory=list)
    """Problems that the user should know of, one sentence each."""
    placed: bool = True
    """False where the process could not be placed because CUDA was up in it already."""

    def place(self, specs: Sequence[Any]) -> None:
        """Write each worker's place into the environment of its execnet spec.

        Workers of other hosts, and those to which the user gave devices, are left alone. The
        spec lives on when its worker crashes, so a replacement gets the same place.
        """
        number = 0
        for spec in specs:
            if spec.popen and VARIABLE not in spec.env:
                spec.env.update(
                    worker_environment(self.plan, number, simulated=self.gpus.simulated)
                )
                number += 1


def start(settings: Settings, request: Request, simulate: tuple[str, ...], cpus: int) -> Started:
    """Probe and plan. `cpus` is what xdist's `auto` comes to on this host.

    Raises `NoRoomError` where nothing fits and the fall-back is switched off, and
    `SettingsError` for settings that do not fit this host.
    """
    probes = probe(settings, simulate)
    try:
        host = HostFacts(
            cpus,
            available_ram() if settings.ram_per_worker else None,
            slot_of_outer_run(os.environ),
        )
        plan = make_plan(settings, probes.gpus, probes.ollama, host, request)
        if not plan.slots and not settings.fallback_to_cpu_when_constrained:
            raise NoRoomError(_no_room(plan))
    except BaseException:
        probes.close()
        raise
    started = Started(settings, probes.gpus, probes.ollama, plan, probes.close)
    started.notes += probes.gpus.problems
    return started


def _no_room(plan: Plan) -> str:
    off = "gpu_share_fallback_to_cpu_when_constrained is false"
    if plan.absence:
        return (
            f"gpu-share: no GPU for the workers: {plan.absence}; {off}: "
            "set it to true to run the tests on the CPU"
        )
    return (
        f"gpu-share: a GPU worker needs {format_gb(plan.needed)} of VRAM, "
        f"{format_gb(plan.usable)} are left; {off}: lower gpu_share_min_vram_per_worker_gb or "
        "gpu_share_ollama_vram_reservation_mb, free VRAM, or set it to true to run the tests "
        "on the CPU"
    )
