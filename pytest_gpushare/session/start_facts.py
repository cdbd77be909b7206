"""What a run is made of before it starts: what was found and decided, and its hosts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.gpu.host import installed_frameworks, mps_is_running
from pytest_gpushare.neighbours import Answers, answer_of_ollama
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.planning.caps import without_caps_of_outer_run
from pytest_gpushare.planning.placement import PlacementContext
from pytest_gpushare.planning.plan import DeviceShare, Plan

if TYPE_CHECKING:
    from pytest_gpushare.gpu.attribution import Attribution, Statement
    from pytest_gpushare.gpu.readings import Live
    from pytest_gpushare.leases.lessee import Lessee
    from pytest_gpushare.planning.preloading import Loading
    from pytest_gpushare.scheduler.sharing import OwnShare
    from pytest_gpushare.scheduler.types import DeviceReading


Resident = Mapping[str, Mapping[str, int]]
"""Server -> UUID -> bytes that it holds there."""


def nothing() -> None:
    """There is nothing to close."""


class StartFacts(NamedTuple):
    """What was found and decided before the run."""

    settings: Settings
    gpus: GpuFacts
    answers: Answers
    plan: Plan
    replan: Callable[[Settings], Plan] | None = None
    """The plan for the same machine with other settings."""
    live: Live | None = None
    """Readings of NVML during the run; None under a what-if and without devices."""
    release: Callable[[], None] = nothing
    """Releases NVML and the leases; harmless when called twice."""
    loading: Loading | None = None
    """What became of the models that were to be loaded before the run; None: none were."""
    notes: tuple[str, ...] = ()
    """Problems that the user should know of, one sentence each."""
    contexts: Mapping[str, int] = {}
    """Device name -> bytes of a CUDA context, as earlier runs measured it."""
    lessee: Lessee | None = None
    """What this session leases; None where it takes no part in the ledger."""
    shares_models: bool = False
    """Whether tests of other sessions of the host may use the same Ollama server, by agreement."""
    leases: tuple[str, ...] = ()
    """One sentence for each device and session that has leased VRAM there."""
    alone: Mapping[str, int] = {}
    """UUID -> the budget, in bytes, that the plan would have without other sessions."""
    has_needs: bool = False
    """Whether tests may have needs of their own, so that no slot may cap them."""
    is_phased: bool = False
    """Whether VRAM is kept for Ollama only while tests use its models."""
    waits_for: str = ""
    """Who holds the VRAM that a run would wait for, where no test follows; see `Agreed`."""

    def close(self) -> None:
        """Give back the models that were loaded, too; harmless when called twice."""
        if self.loading is not None:
            self.loading.undo()
        self.release()

    @property
    def ollama(self) -> OllamaFacts:
        """What Ollama said."""
        return answer_of_ollama(self.answers)

    @property
    def problems(self) -> tuple[str, ...]:
        """The notes, and why models were not loaded, one sentence each."""
        return (*self.notes, *(self.loading.problems if self.loading is not None else ()))


class RunOptions(NamedTuple):
    """What the command line says of the run's end, and how its process was placed."""

    reports: tuple[Path, ...] = ()
    """The files to write when the run is over."""
    strict: bool = False
    """`--gpu-share-strict`."""
    unplaced: str = ""
    """Why a run without workers could not place its process; empty where it did."""


class CollectionDifferences(Protocol):
    """What GPU workers and CPU workers collect or skip differently."""

    has_cpu_workers: bool
    gpu_tests: int
    tests: int
    uses_models: bool
    by_skip: list[str]
    only_on_gpu: int
    only_on_cpu: int

    def lost(self) -> Sequence[Any]:
        """Tests that were skipped on CPU workers and would run on a GPU."""


class HostOfRun(NamedTuple):
    """A host of a run that has several, for reports."""

    name: str
    """Empty: this host."""
    plan: Plan
    """Its own plan."""
    ollama: OllamaFacts
    python: str = ""
    """The version of Python there."""
    lost: str = ""
    """Why it takes no part any more; empty while it does."""

    @property
    def label(self) -> str:
        """Its name in a line of output."""
        return self.name or "this host"


class LeasesElsewhereProtocol(Protocol):
    """The leases on other hosts, as the dispatch asks for them and respects them."""

    @property
    def is_due(self) -> bool:
        """Whether a host has said something since the last step."""

    @property
    def is_shared(self) -> bool:
        """Whether other sessions may name a device on one of the hosts."""

    def limited(self, readings: Mapping[str, DeviceReading]) -> Mapping[str, DeviceReading]:
        """The readings, with what others claim there."""

    def publish(self, shares: Mapping[str, OwnShare]) -> None:
        """Inform each host of what the run has there and wants."""


class ReadingSource(NamedTuple):
    """The devices of one host, as admission and its sampler read them."""

    live: Live | None
    devices: Sequence[str]
    """UUIDs."""
    resident: Callable[[], Resident]
    """What servers hold there, as far as somebody follows them."""
    attribution: Attribution
    statements: Callable[[], Sequence[Statement]]
    """What servers there say of themselves."""
    shares: Mapping[str, tuple[DeviceShare, ...]] = {}
    """UUID -> what is kept for other servers than Ollama."""


def placement_context(facts: StartFacts, plan: Plan) -> PlacementContext:
    """What beside the plan decides on the environments of workers on this host."""
    settings, simulated = facts.settings, facts.gpus.simulated
    capped = settings.cap_vram and bool(plan.slots) and not simulated
    return PlacementContext(
        outer=without_caps_of_outer_run(os.environ),
        versions=installed_frameworks() if capped else {},
        mps=capped and mps_is_running(os.environ),
        cap_vram=settings.cap_vram,
        by_index=settings.device_names == "index",
        see_all=settings.visible_devices == "all",
        simulated=simulated,
        contexts=facts.contexts,
        budgets={
            d.device.uuid: max(d.budget, facts.alone.get(d.device.uuid, 0)) for d in plan.devices
        }
        if facts.has_needs
        else {},
    )
