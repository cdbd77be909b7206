"""A run that has its plan: what is held until its end, and what its workers are told."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from pytest_gpushare.plan.model import Plan
from pytest_gpushare.probe.facts import GpuFacts, OllamaFacts
from pytest_gpushare.probe.visibility import VARIABLE
from pytest_gpushare.run.caps import mps_is_running, without_caps_of_outer_run
from pytest_gpushare.run.frameworks import installed
from pytest_gpushare.run.placement import Surroundings, worker_environment
from pytest_gpushare.run.places import NUMBER, message_to
from pytest_gpushare.settings.values import Settings


class LeftAlone(NamedTuple):
    """A run that asked, but whose workers are the user's own; nothing is probed."""

    why: str

    def close(self) -> None:
        """Nothing is held."""

    def recall(self, _contexts: Mapping[str, int]) -> None:
        """Nothing is capped."""

    def place(self, _specs: Sequence[Any]) -> None:
        """Nothing is placed."""

    def message_to(self, _spec: Any) -> None:
        """Nothing is told."""

    def message_to_itself(self) -> None:
        """Nothing is told."""

    def note_overwritten(self, worker: str, how: str) -> None:
        """Nothing is noted."""

    def has_failed(self) -> bool:
        """Nothing is judged."""
        return False


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
    contexts: Mapping[str, int] = field(default_factory=dict)
    """Device name -> bytes of a CUDA context, as earlier runs measured it."""
    strict: bool = False
    """Whether what is only told otherwise fails the run."""
    overwritten: dict[str, str] = field(default_factory=dict)
    """Worker -> how its placement was changed behind the plan, and by which file."""
    unplaced: str = ""
    """Why a run without workers could not place its process."""

    def message_to_itself(self) -> dict[str, Any] | None:
        """What this process is told where it runs the tests itself."""
        if not self.plan.request.in_process or self.unplaced:
            return None
        return message_to(self.plan, 0, self.around)

    def note_overwritten(self, worker: str, how: str) -> None:
        """Keep what a worker said of its placement; may be called in any thread."""
        self.overwritten[worker] = how

    def has_failed(self) -> bool:
        """Whether the run counts as failed whatever its tests say."""
        return self.strict and bool(self.overwritten)

    def message_to(self, spec: Any) -> dict[str, Any] | None:
        """What the worker of this spec is told of its place; None where it has none from us."""
        number = spec.env.get(NUMBER, "")
        return message_to(self.plan, int(number), self.around) if number.isdigit() else None

    def recall(self, contexts: Mapping[str, int]) -> None:
        """Take what earlier runs measured, once pytest's cache is there to ask."""
        self.contexts = contexts
        self.__dict__.pop("around", None)

    @cached_property
    def around(self) -> Surroundings:
        """What decides on the environments of workers beside the plan."""
        outer = without_caps_of_outer_run(os.environ)
        capped = self.settings.cap_vram and bool(self.plan.slots) and not self.gpus.simulated
        return Surroundings(
            outer=outer,
            versions=installed() if capped else {},
            mps=capped and mps_is_running(os.environ),
            cap_vram=self.settings.cap_vram,
            by_index=self.settings.device_names == "index",
            simulated=self.gpus.simulated,
            contexts=self.contexts,
        )

    def place(self, specs: Sequence[Any]) -> None:
        """Write each worker's place into the environment of its execnet spec.

        Workers of other hosts, and those to which the user gave devices, are left alone. The
        spec lives on when its worker crashes, so a replacement gets the same place.
        """
        number = 0
        for spec in specs:
            if spec.popen and not spec.via and VARIABLE not in spec.env:
                spec.env.update(worker_environment(self.plan, number, self.around))
                spec.env[NUMBER] = str(number)
                number += 1
