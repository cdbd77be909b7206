"""Tests that use models of Ollama's: their groups, and the models loaded for them in time.

Imported only where a test says that it uses a model. What is asked of the server, and the loads,
happen in a thread of their own; what came of them reaches the dispatcher in xdist's thread.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from pytest_gpushare.ollama.catalog import ask as ask_server
from pytest_gpushare.ollama.catalog import ask_models
from pytest_gpushare.ollama.models import ModelFacts, RunModel, full_name, grouped, in_order
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN
from pytest_gpushare.ollama.reservation import Demand, devices_of_ollama, need_of, server_of
from pytest_gpushare.scheduler.model_dispatch import ModelDispatch
from pytest_gpushare.scheduler.model_room import Estimate, ModelLoad, choose
from pytest_gpushare.scheduler.needs import ModelUse
from pytest_gpushare.scheduler.types import BESIDE, CloseModel, ModelGroup, OpenModel
from pytest_gpushare.session.llm_loads import Load, ModelLoads, Phase, RunParts
from pytest_gpushare.text import printable
from pytest_gpushare.timed import TimedCall

if TYPE_CHECKING:
    from pytest_gpushare.gpu.devices import Device
    from pytest_gpushare.ollama.address import Address
    from pytest_gpushare.ollama.models import LoadedModel
    from pytest_gpushare.planning.plan import Plan

ASK_LIMIT = 5.0
"""Seconds for all questions about the models when the tests are collected."""

LOADED_PER_SECOND = 1.25e9
"""Bytes of a model that a server loads in a second, for estimates."""

_IDLE = 3600.0
"""Seconds between two looks of a thread to which nobody says anything."""

_STOP = 5.0
"""Seconds that the end of the run waits for a load to be given up."""


Outcome: TypeAlias = Callable[[ModelDispatch], object]
"""Informs the dispatcher, in xdist's thread, of what came of a command."""


class LlmTests:
    """The tests of one run that use models."""

    def __init__(
        self,
        run: RunParts,
        uses: Mapping[int, ModelUse],
        work: Mapping[int, float],
        nodeids: Sequence[str],
        *,
        holds_vram: bool = False,
        has_server: bool = True,
    ) -> None:
        """`uses`: test -> the model that it uses; `work`: test -> seconds, where known.

        `holds_vram`: the plan keeps no VRAM for the models; it is kept while tests use them.
        `has_server`: one server has the models of all tests; False: each host has its own, which
        loads them as it is asked, and the tests are grouped by model alone.
        """
        self.holds_vram = holds_vram
        self.estimate: Estimate | None = None
        """How long the run should take each way; None where nothing was to be chosen."""
        self._work = work
        self._run = run
        self.tests = len(uses)
        self.refused: Counter[str] = Counter()
        """Why tests were not run -> how many."""
        self._commands: queue.SimpleQueue[OpenModel | CloseModel | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.on_outcome: Callable[[], object] = lambda: None
        """Called, from another thread, when there is something for `deliver`."""
        self._lock = threading.Lock()
        self._answers: dict[str, tuple[int, float]] = {}
        self._problem = ""
        self._loaded: Sequence[LoadedModel] = ()
        asks = has_server and run.ollama.asked
        self.server: Address | None = run.ollama.server if asks else None
        # What is loaded takes real VRAM, of which the plan on simulated devices knows nothing.
        self._may_load = asks and not run.gpus.simulated
        self.models: list[RunModel] = []
        facts = self._ask({use.model for use in uses.values() if use.model})
        found, numbers = grouped(((use.model, use.context) for use in uses.values()), facts)
        tests = Counter(numbers[use.model, use.context] for use in uses.values())
        seconds = [0.0] * len(found)
        for test, use in uses.items():
            seconds[numbers[use.model, use.context]] += work.get(test, 1.0)
        order = in_order(found, self._loaded, seconds)
        place = {number: at for at, number in enumerate(order)}
        self.models = [found[number] for number in order]
        self.groups = [self._group(at, tests[number]) for at, number in enumerate(order)]
        self.of = {test: place[numbers[use.model, use.context]] for test, use in uses.items()}
        """Test -> the number of its group."""
        self._model_of = {nodeids[test]: self.models[at].shown for test, at in self.of.items()}
        run.links.on("ollama-answer", self._received)
        self.loader: ModelLoads | None = None
        """None where nothing is loaded."""
        if self.server is not None and self._may_load:
            models, groups = self.models, self.groups
            self.loader = ModelLoads(run, self.server, models, groups, lambda: self.on_outcome())
        for text in {
            f"@pytest.mark.ollama: {use.odd}: means nothing to this plugin, which knows "
            "model=... and context=..."
            for use in uses.values()
            if use.odd
        }:
            run.record.note("ollama-marker", text)

    # --- what the server says ---

    def _ask(self, names: set[str]) -> Mapping[str, ModelFacts]:
        """What the server says of the models; it is asked only where the settings allow it."""
        server = self.server
        if server is None:
            return {}
        limit = max(ASK_LIMIT, float(self._run.settings.ollama_timeout))
        until = time.monotonic() + limit
        answer = TimedCall(lambda: ask_server(server, limit), "ollama")
        models = TimedCall(
            lambda: ask_models(server, sorted(names), until, lambda _: None), "ollama-models"
        )
        answer.wait(limit)
        found = answer.value
        if found is None or not found.answered:
            self._problem = found.problem if found is not None else f"no answer within {limit:g} s"
            return {}
        self._loaded = found.models
        models.wait(until - time.monotonic() + 0.1)
        return {full_name(facts.name): facts for facts in models.value or ()}

    def _group(self, number: int, tests: int) -> ModelGroup:
        """A group as the dispatcher knows it."""
        settings, model = self._run.settings, self.models[number]
        parallel = settings.ollama_parallel
        group = ModelGroup(model.shown, parallel)
        if self.server is None:
            return group
        where = f"at {self._run.ollama.address}"
        if self._problem:
            return self._without(group, f"no Ollama {where}: {self._problem}", tests)
        facts = model.facts
        if not model.name or (facts is not None and facts.is_remote):
            return group
        if facts is not None and facts.is_missing:
            if settings.without_ollama == "pull" and self._may_load:
                return group._replace(loads=True)
            return self._without(group, f"no model {model.name} {where}", tests)
        if not self._may_load:
            return group
        return group._replace(loads=True, reservations=self._reservations(model))

    def _vram(self, model: RunModel) -> int:
        """Bytes that have to be free for a model before it is loaded."""
        run = self._run
        facts = model.facts or ModelFacts(model.name)
        if model.context:
            facts = facts._replace(num_ctx=model.context)
        need = need_of(facts, server_of(run.settings, run.gpus, run.ollama), NOTHING_KNOWN)
        return Demand((need,)).free_needed(len(self._devices()))

    def _devices(self) -> Sequence[Device]:
        """The devices on which the server may load a model."""
        known = devices_of_ollama(self._run.settings.ollama_gpu, self._run.gpus)
        return self._run.gpus.all_devices if known is None else known

    def _reservations(self, model: RunModel) -> Mapping[str, int]:
        if not self.holds_vram or any(model.is_same(loaded) for loaded in self._loaded):
            return {}
        size = self._vram(model)
        return {device.uuid: size for device in self._devices()}

    def choose_phase(self, gpu_tests: Sequence[tuple[int, float | None]], plan: Plan) -> str:
        """Whether tests that use models run next to GPU tests, before or after them."""
        wanted = self._run.settings.ollama_phase
        if not (self._may_load and self._run.ollama.on_this_host and gpu_tests):
            return BESIDE
        loads = []
        for number, group in enumerate(self.groups):
            if group.refusal is not None:
                continue
            model = self.models[number]
            is_there = any(model.is_same(loaded) for loaded in self._loaded)
            size = self._vram(model) if model.name and group.loads and not is_there else 0
            tests = [self._work.get(test) for test, at in self.of.items() if at == number]
            loads.append(ModelLoad(size, size / LOADED_PER_SECOND, tests, group.parallel))
        budget = max(device.budget for device in plan.devices)
        if not self.holds_vram:
            # What the models take is kept for them all the time.
            loads = [load._replace(vram=0) for load in loads]
        self.estimate = choose(gpu_tests, loads, budget, len(plan.slots), wanted)
        return self.estimate.chosen

    def _without(self, group: ModelGroup, why: str, tests: int) -> ModelGroup:
        how = self._run.settings.without_ollama
        if how == "run":
            return group
        outcome = "skip" if how == "skip" else "fail"
        self.refused[f"{'skipped' if outcome == 'skip' else 'failed'}: {why}"] += tests
        return group._replace(refusal=(outcome, f"{why} (gpu_share_without_ollama = {how})"))

    # --- the service ---

    def start(self) -> None:
        """Obey commands from now on."""
        self._thread = threading.Thread(target=self._serve, name="gpu-share-llm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up what is under way, and give the models back."""
        loader = self.loader
        if loader is not None:
            loader.is_over.set()
        self._commands.put(None)
        if self._thread is not None:
            self._thread.join(_STOP)
        if loader is not None:
            loader.end()

    def obey(self, action: OpenModel | CloseModel) -> None:
        """Have a model loaded, or not kept any more; `deliver` reports the result."""
        self._commands.put(action)

    def deliver(self, models: ModelDispatch) -> None:
        """Say what came of the commands."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._outcomes.get_nowait()(models)
        if self.loader is not None and self.loader.turns is not None:
            self.loader.turns.put_in_force(models)

    def open_now(self, number: int) -> str:
        """Load the model of a group in this thread: a process without workers waits for it.

        Returns why that is not possible; empty where it is.
        """
        loader = self.loader
        if loader is None:
            return ""
        loader.close_others(number)
        if not loader.is_open(number):
            return loader.open(number)
        loader.take_turn(number)
        return ""

    def close_now(self, number: int) -> None:
        """No test of a group is left, in a process without workers."""
        if self.loader is not None:
            self.loader.close(number, makes_room=False)

    @property
    def loads(self) -> Sequence[Load]:
        """The models that were loaded."""
        return () if self.loader is None else self.loader.loads

    @property
    def phases(self) -> Sequence[Phase]:
        """When tests of which model ran."""
        return () if self.loader is None else self.loader.phases

    @property
    def given_up(self) -> Sequence[str]:
        """A sentence on each model that was not kept loaded any more."""
        return () if self.loader is None else self.loader.given_up

    def uses(self, nodeid: str) -> bool:
        """Whether a test uses a model."""
        return nodeid in self._model_of

    def answers(self) -> dict[str, tuple[int, float]]:
        """Model -> tokens and seconds of the answers that tests have recorded."""
        with self._lock:
            return dict(self._answers)

    def _received(self, _worker: str, message: Mapping[str, object]) -> None:
        """A test has recorded an answer; in the thread that receives from its worker."""
        tokens, seconds = message.get("tokens"), message.get("seconds")
        model = self._model_of.get(str(message.get("test")))
        if model is None or type(tokens) is not int or not isinstance(seconds, float):
            return
        with self._lock:
            before = self._answers.get(model, (0, 0.0))
            self._answers[model] = before[0] + tokens, before[1] + seconds

    def _serve(self) -> None:
        loader = self.loader
        while loader is None or not loader.is_over.is_set():
            pause = None if loader is None or loader.turns is None else loader.turns.look()
            try:
                command = self._commands.get(timeout=_IDLE if pause is None else pause)
            except queue.Empty:
                continue
            if command is None:
                return
            self._report(self._outcome_of(command))

    def _outcome_of(self, command: OpenModel | CloseModel) -> Outcome:
        loader, number, problem = self.loader, command.group, ""
        try:
            if isinstance(command, CloseModel):
                if loader is not None:
                    loader.close(number, makes_room=command.makes_room)
                return lambda models: models.closed(number)
            if loader is not None and command.turn_only:
                waits: Outcome = lambda models: models.has_turn(number, waits=True)  # noqa: E731
                loader.take_turn(number, lambda: self._report(waits))
                return lambda models: models.has_turn(number, waits=False)
            if loader is not None:
                problem = loader.open(number)
        except Exception as error:
            # Its tests are reported with this reason; else they would never be reported.
            problem = printable(f"{type(error).__name__}: {error}", 200)
        if problem:
            return lambda models: models.not_opened(number, problem)
        size = None if loader is None else loader.sizes.get(number)
        return lambda models: models.opened(number, size)

    def _report(self, outcome: Outcome) -> None:
        self._outcomes.put(outcome)
        self.on_outcome()
