"""A run that has its plan: what is held until its end, and what its workers are told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.events import Record
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.gpu.visibility import VARIABLE
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.planning.caps import (
    CONTEXT_ALLOWANCE,
    installed,
    mps_is_running,
    without_caps_of_outer_run,
)
from pytest_gpushare.planning.placement import (
    NUMBER,
    Surroundings,
    message_of_tests,
    message_to,
    seen,
    worker_environment,
)
from pytest_gpushare.planning.plan import Plan, Slot
from pytest_gpushare.wire import Links

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.dispatch.suite import Parity
    from pytest_gpushare.gpu.sampler import LiveVram
    from pytest_gpushare.ollama.monitor import Guard
    from pytest_gpushare.session.exclusive import Alone
    from pytest_gpushare.session.sampling import Watch
    from pytest_gpushare.session.tests import Journal
    from pytest_gpushare.session.workers import Crew


class LeftAlone(NamedTuple):
    """A run that asked, but whose workers are the user's own; nothing is probed."""

    why: str
    links: Links = Links()
    """Never opened."""

    def close(self) -> None:
        """Nothing is held."""

    def recall(self, _contexts: Mapping[str, int]) -> None:
        """Nothing is capped."""

    def keep_what_it_saw(self, _config: pytest.Config) -> None:
        """Nothing was looked at."""

    def place(self, _specs: Sequence[Any]) -> None:
        """Nothing is placed."""

    def message_to(self, _spec: Any) -> None:
        """Nothing is told."""

    def message_to_itself(self) -> None:
        """Nothing is told."""

    def joined(self, worker: str, message: Mapping[str, Any]) -> None:
        """Nobody shares anything."""

    def gone(self, worker: str) -> None:
        """Nobody shares anything."""

    def begin(self) -> None:
        """Nothing runs beside the tests."""

    def look_again(self) -> None:
        """Nothing was looked at."""

    def end(self) -> None:
        """Nothing ran beside the tests."""

    def has_failed(self) -> bool:
        """Nothing is judged."""
        return False


class Service(Protocol):
    """Something that runs beside the tests, from before the first to after the last."""

    def start(self) -> None:
        """Begin; threads are daemons."""

    def stop(self) -> None:
        """End within a second or so, and leave nothing behind."""


class Started:
    """A run for which the plan is made: what was found, what was decided, what is held."""

    def __init__(
        self,
        settings: Settings,
        gpus: GpuFacts,
        ollama: OllamaFacts,
        plan: Plan,
        close: Callable[[], None],
        *,
        live: LiveVram | None = None,
    ) -> None:
        """`close` releases NVML, harmless when called twice; `live` is None under a what-if."""
        self.settings, self.gpus, self.ollama, self.plan = settings, gpus, ollama, plan
        self.close, self.live = close, live
        self.notes: list[str] = []
        """Problems that the user should know of, one sentence each."""
        self.contexts: Mapping[str, int] = {}
        """Device name -> bytes of a CUDA context, as earlier runs measured it."""
        self.strict = False
        """Whether what is only told otherwise fails the run."""
        self.overwritten: dict[str, str] = {}
        """Worker -> how its placement was changed behind the plan, and by which file."""
        self.unplaced = ""
        """Why a run without workers could not place its process."""
        self.links = Links()
        """The private channels to the workers."""
        self.record = Record()
        """What happens beside the tests."""
        self.services: list[Service] = []
        """What runs beside the tests."""
        self.sightings: dict[tuple[str, int | None], tuple[LoadedModel, int | None]] = {}
        """(digest, context) -> a model of Ollama's that was loaded, the bytes of its process."""
        self.alone: Alone | None = None
        """Who has a device alone; None before the session starts."""
        self.has_needs = False
        """Whether tests may have needs of their own, so that no slot may cap them."""
        self.replan: Callable[[Settings], Plan] | None = None
        """What the plan would have been with other settings."""
        self.reports: tuple[Path, ...] = ()
        """The files that are written when the run is over."""
        self.unwritten: list[str] = []
        """Why a report could not be written, one sentence each."""
        self.watch: Watch | None = None
        """The samples; None before the run began, and under a what-if."""
        self.has_placed_all = False
        """Whether every worker has its place from the plan."""
        self.parity: Parity | None = None
        """What the kinds of worker skip or miss, where the plugin itself dispatches."""
        self.guard: Guard | None = None
        """What watches over Ollama; None where there is nothing to guard."""
        self._devices: dict[str, str | None] = {}
        self.links.on("overwritten", self._note_overwritten)
        self.links.on("here", lambda worker, pid: self.crew.came_up(worker, pid))
        self.links.on("test", self._note_test)

    @cached_property
    def crew(self) -> Crew:
        """The processes that run the tests."""
        from pytest_gpushare.session.workers import Crew

        return Crew(self.plan, self.context_on)

    @cached_property
    def journal(self) -> Journal:
        """The tests, as they are reported."""
        from pytest_gpushare.session.tests import Journal

        return Journal(self.crew)

    def look_again(self) -> None:
        """The tests are done and their processes still there: a last look at what they hold."""
        if self.watch is not None and self.watch in self.services:
            # Whatever NVML does now, the run has its result.
            with contextlib.suppress(Exception):
                self.watch.last_look()

    def end(self) -> None:
        """Stop it, the last first; harmless when called twice."""
        while self.services:
            service = self.services.pop()
            try:
                service.stop()
            except Exception as error:
                self.notes.append(f"{name_of(service)} could not stop: {error}")

    def saw(self, model: LoadedModel, used: int | None = None) -> None:
        """Keep for later runs what a loaded model takes; may be called in any thread.

        `used` are the bytes of its process where NVML tells them; the largest counts.
        """
        _, before = self.sightings.get((model.digest, model.context), (model, None))
        most = max(before or 0, used or 0) or None
        self.sightings[model.digest, model.context] = model, most

    def keep_what_it_saw(self, config: pytest.Config) -> None:
        """Write the sizes of loaded models into pytest's cache, for later runs."""
        if self.sightings:
            from pytest_gpushare.session.needs_store import keep_ollama_sizes

            keep_ollama_sizes(config, self)

    def message_to_itself(self) -> dict[str, Any] | None:
        """What this process is told where it runs the tests itself."""
        if not self.plan.request.in_process or self.unplaced:
            return None
        return self._message(0)

    def device_of(self, worker: str) -> str | None:
        """The UUID of the device that a worker was given; None: none, or no such worker."""
        return self._devices.get(worker)

    def joined(self, worker: str, message: Mapping[str, Any]) -> None:
        """A worker that was told this is on its way; its device is known from now on."""
        device = self._devices[worker] = message["place"]["device"]
        slot = next((slot for slot in self.plan.slots if slot.device.uuid == device), None)
        if self.alone is not None and slot is not None:
            # Who sees several devices may use them all: to be alone is to have them all.
            self.alone.joined(worker, self.seen_by(slot))

    def gone(self, worker: str) -> None:
        """A worker has ended or died."""
        if self.alone is not None:
            self.alone.gone(worker)

    def context_of(self, device: str | None) -> int:
        """Bytes of a CUDA context on devices of that name: measured, or assumed."""
        return self.contexts.get(device or "", CONTEXT_ALLOWANCE)

    def _message(self, number: int) -> dict[str, Any]:
        message = message_to(self.plan, number, self.around)
        memory = {
            "context": self.context_of(message["place"]["name"]),
            "empty_caches": self.settings.empty_caches,
            "needs": self.has_needs,
        }
        tests = message_of_tests(self.settings, self.plan, self.around)
        return {**message, "memory": memory, "tests": tests}

    def _note_test(self, worker: str, told: Any) -> None:
        member = self.crew.get(worker)
        self.journal.measured(worker, told, self.context_on(member.device if member else None))

    def context_on(self, uuid: str | None) -> int:
        """Bytes of a CUDA context on a device: as earlier runs measured it, or assumed."""
        names = [d.device.name for d in self.plan.devices if d.device.uuid == uuid]
        return self.context_of(names[0] if names else None)

    def _note_overwritten(self, worker: str, how: str) -> None:
        self.overwritten[worker] = how
        self.record.note("placement-overwritten", f"{worker}: {how}", worker=worker)

    def resident(self) -> Mapping[str, int]:
        """UUID -> bytes that Ollama holds now; empty where nobody guards it."""
        return self.guard.resident() if self.guard is not None else {}

    def has_failed(self) -> bool:
        """Whether the run counts as failed whatever its tests say."""
        lost = self.parity is not None and bool(self.parity.lost)
        spilled = self.guard is not None and self.guard.has_failed()
        return self.strict and (bool(self.overwritten) or lost or spilled)

    def message_to(self, spec: Any) -> dict[str, Any] | None:
        """What the worker of this spec is told of its place; None where it has none from us."""
        number = spec.env.get(NUMBER, "")
        return self._message(int(number)) if number.isdigit() else None

    def seen_by(self, slot: Slot) -> tuple[str, ...]:
        """UUIDs of the devices that the worker in this slot sees, its own first."""
        return tuple(device.uuid for device in seen(self.plan, slot.device, self.around))

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
            see_all=self.settings.visible_devices == "all",
            simulated=self.gpus.simulated,
            contexts=self.contexts,
            rooms={d.device.uuid: d.budget for d in self.plan.devices} if self.has_needs else {},
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
        self.has_placed_all = number == len(specs)


def name_of(service: Service) -> str:
    """What messages call it."""
    return type(service).__name__.lower()
