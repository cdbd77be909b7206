"""A scheduler for xdist: the plugin's own where there is something to route, else xdist's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat.xdist_events import collection_difference, count_tests, is_ending, wake
from pytest_gpushare.compat.xdist_options import chunk_size, most_deaths, reorders_groups
from pytest_gpushare.dispatch.suite import KindsOfWorkers, Parity, Suite, plain_id, weigh
from pytest_gpushare.leases.claims import Naming
from pytest_gpushare.planning.placement import NUMBER
from pytest_gpushare.scheduler.needs import CollectedTests, read
from pytest_gpushare.service import AtSigterm
from pytest_gpushare.session.needs_store import LearnedNeeds, remember_suite
from pytest_gpushare.session.run import ActiveRun

if TYPE_CHECKING:
    from pytest_gpushare.dispatch.executor import Executor
    from pytest_gpushare.dispatch.suite import Weighed
    from pytest_gpushare.scheduler.model_queue import ModelQueue
    from pytest_gpushare.scheduler.needs import ModelUse
    from pytest_gpushare.scheduler.types import DeviceCapacity, Job, Policy, Worker
    from pytest_gpushare.wire import Links


_NOTHING = CollectedTests(0, (), (), ())


class GpuShareScheduling:
    """xdist's scheduler interface: xdist calls it by these names, from one thread.

    Each event of xdist's, such as `unscheduled`, calls one method, and then `tests_finished`.
    Who schedules is decided when all tests are collected, as only markers show whether there
    are needs. Until then xdist's scheduler receives everything; after that only one does.
    """

    def __init__(
        self, stock: Any, links: Links, dispatch: VramDispatch, most_deaths: int | None
    ) -> None:
        """`stock` is what xdist would use; of workers that die xdist replaces `most_deaths`."""
        self._stock = stock
        self._dispatch = dispatch
        self._most_deaths = most_deaths
        self._deaths = 0
        self._nodes: dict[Any, list[str] | None] = {}
        self._collected: dict[str, CollectedTests] = {}
        self._has_loop: set[str] = set()
        """The workers that can run tests as the dispatcher needs it."""
        self._differs = False
        """Whether workers of one kind collected different tests, so that nothing is run."""
        self._suite = Suite()
        self._executor: Executor | None = None
        self._decided = False
        self._due = False
        links.on("collected", self._on_collected)

    def __getattr__(self, name: str) -> Any:
        """What is not in the protocol: pytest-rerunfailures wants `config` when a worker dies."""
        return getattr(self._stock, name)

    def _on_collected(self, worker: str, message: Mapping[str, Any]) -> None:
        self._collected[worker] = read(message)
        if message.get("loop"):
            self._has_loop.add(worker)

    @property
    def nodes(self) -> list[Any]:
        """The workers that are there."""
        # xdist's loadscope drops workers for which there is no work.
        return list(self._stock.nodes if self._executor is None else self._nodes)

    @property
    def collection_is_completed(self) -> bool:
        """Whether all workers of the start, or their replacements, have collected."""
        return self._executor is not None or bool(self._stock.collection_is_completed)

    @property
    def tests_finished(self) -> bool:
        """Whether the workers may be ended. xdist reads this after each event: a step that the
        event made due is made here."""
        executor = self._executor
        if executor is None:
            return self._differs or bool(self._stock.tests_finished)
        if self._due:
            # All is known now that came with the event, such as that a test comes again.
            self._due = False
            executor.step()
        return executor.is_done

    @property
    def has_pending(self) -> bool:
        """Whether tests are left that have not had their outcome."""
        if self._executor is None:
            return bool(self._stock.has_pending)
        return not self._executor.is_done

    @property
    def numnodes(self) -> int:
        """How many workers are to collect before any test is run."""
        return int(self._stock.numnodes)

    @numnodes.setter
    def numnodes(self, number: int) -> None:
        self._stock.numnodes = number

    def add_node(self, node: Any) -> None:
        """A worker is up, and collects."""
        self._nodes[node] = None
        if self._executor is None:
            self._stock.add_node(node)

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        """A worker has collected these tests."""
        self._nodes[node] = list(collection)
        if self._executor is None:
            self._stock.add_node_collection(node, collection)

    def schedule(self) -> None:
        """All have collected, for the first time or after a worker was replaced."""
        if not self._decided:
            self._decided = True
            self._decide()
        elif self._executor is None:
            self._stock.schedule()
        else:
            self._join(self._executor)
            self._executor.step()

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """xdist's event `runtest_protocol_complete`: a worker has done a test."""
        if self._executor is None:
            self._stock.mark_test_complete(node, item_index, duration)
        else:
            self._executor.on_test_done(node.gateway.id, item_index, duration)

    def mark_test_pending(self, item: str) -> None:
        """Another plugin wants a test to run once more."""
        if self._executor is None:
            self._stock.mark_test_pending(item)
            return
        number = self._suite.number(item)
        if number is not None:
            self._executor.again(number)
            self._due = True

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        """xdist's event `unscheduled`: tests that a worker gave back.

        Under the plugin's dispatch it carries a worker's message: asked, emptied, raise, returned.
        """
        if self._executor is None:
            self._stock.remove_pending_tests_from_node(node, indices)
        else:
            self._executor.on_message(node.gateway.id, indices)

    def remove_node(self, node: Any) -> str | None:
        """A worker has ended or died; returns the test in which it died."""
        has_died = not hasattr(node, "workeroutput")
        self._deaths += has_died
        self._nodes.pop(node, None)
        if self._executor is None:
            lost = self._stock.remove_node(node)
            goes_on = bool(self._stock.nodes)
        else:
            most = self._most_deaths
            replaced = (
                has_died
                and (most is None or self._deaths <= most)
                and self._dispatch.may_replace(node)
            )
            self._due = True
            # Also where the worker ended in order: a test may have ended it, by `pytest.exit`.
            lost = self._executor.leave(node.gateway.id, replaced=replaced)
            goes_on = not self._executor.is_done
        if goes_on and not has_died:
            self._dispatch.release(node)
        return lost  # type: ignore[no-any-return]

    def _decide(self) -> None:
        collected = [(node, ids) for node, ids in self._nodes.items() if ids is not None]
        kinds = KindsOfWorkers()
        for node, ids in collected:
            found = self._collected.get(node.gateway.id, _NOTHING)
            kinds.add(self._dispatch.has_gpu(node), self._suite.add(ids), found)
        can_run = all(node.gateway.id in self._has_loop for node, _ in collected)
        if self._dispatch.is_wanted(kinds, can_run=can_run):
            self._differs = self._dispatch.report_differences(collected)
            if self._differs:
                return
            self._executor = self._dispatch.begin(self._suite, kinds)
        if self._executor is None:
            self._stock.schedule()
            return
        self._join(self._executor)
        self._executor.step()

    def _join(self, executor: Executor) -> None:
        for node, ids in self._nodes.items():
            if ids is not None and not executor.knows(node.gateway.id):
                found = self._collected.get(node.gateway.id, _NOTHING)
                collection = self._suite.add(ids)
                if barred := self._dispatch.barred(node):
                    collection = collection.without(barred)
                executor.join(node, self._dispatch.joins(node, self._suite), collection, found.pid)


class VramDispatch:
    """Begins the plugin's own dispatch where the design says so."""

    def __init__(self, started: ActiveRun, config: pytest.Config) -> None:
        self._started = started
        self._uses: Mapping[int, ModelUse] = {}
        """The models of Ollama's that tests use, by their numbers."""
        self._config = config
        self._options: Any = config.option
        self._plugins = config.pluginmanager
        self._parity: Parity | None = None

    def may_replace(self, node: Any) -> bool:
        """Whether another worker may come in the place of one that has died."""
        return self._started.may_replace(node)

    def has_gpu(self, node: Any) -> bool:
        """Whether a worker was placed on a GPU."""
        number = node.gateway.spec.env.get(NUMBER, "")
        return number.isdigit() and int(number) < len(self._started.plan.slots)

    def barred(self, node: Any) -> frozenset[int]:
        """Tests that this worker must not run."""
        return self._started.barred(node.gateway.spec, self._uses)

    def release(self, node: Any) -> None:
        """End the process of a worker that has no tests left while others have: only that gives
        back the VRAM of its context and of its frameworks' caches."""
        if self.has_gpu(node) and not node.gateway.spec.via:
            self._started.read_workers_now(node.gateway.id)
            with contextlib.suppress(OSError):
                node.gateway.exit()

    def is_wanted(self, kinds: KindsOfWorkers, *, can_run: bool) -> bool:
        """Whether there may be something to decide that xdist's scheduler does not.

        `can_run`: whether all workers can run tests as the dispatcher needs it.
        """
        if not self._started.plan.slots:
            # Only tests that use models give CPU workers alone something to decide.
            said = {one for _, found in kinds.on_cpu for one in found.declared}
            rules = self._started.settings.ollama_tests
            return can_run and (bool(rules) or any(one.llm is not None for one in said))
        if self._started.hosts:
            # xdist's own scheduler does not know what a host that is lost had not begun.
            return can_run
        if not (kinds.on_cpu or self._may_have_needs(kinds)):
            return False
        if not can_run:
            self._started.notes.append(
                "GPU tests are not admitted by their needs: this version of pytest-xdist lacks "
                "what that takes"
            )
        return can_run

    def report_differences(self, collected: Sequence[tuple[Any, Sequence[str]]]) -> bool:
        """Report, as xdist does, workers of one kind that collected different tests."""
        first: dict[bool, tuple[Any, Sequence[str]]] = {}
        found = False
        for node, ids in collected:
            other, expected = first.setdefault(self.has_gpu(node), (node, ids))
            names = other.gateway.id, node.gateway.id
            if text := collection_difference(expected, ids, *names):
                found = True
                report_difference(self._config, node.gateway.id, text)
        return found

    def joins(self, node: Any, suite: Suite) -> Worker:
        """The worker as the dispatcher knows it."""
        from pytest_gpushare.scheduler.types import Worker

        plan, parity = self._started.plan, self._parity
        if parity is not None:
            parity.worker_up(node.gateway.id, has_gpu=self.has_gpu(node))
        count_tests(self._plugins, len(suite.nodeids))
        if not self.has_gpu(node):
            return Worker(node.gateway.id)
        slot = plan.slots[int(node.gateway.spec.env[NUMBER])]
        return Worker(node.gateway.id, self._started.seen_by(slot), slot.unknown_need)

    def begin(self, suite: Suite, kinds: KindsOfWorkers) -> Executor | None:
        """What hands the tests out; None where xdist's scheduler does as well."""
        started, dist = self._started, self._options.dist
        from pytest_gpushare.dispatch.device_readings import readings_of
        from pytest_gpushare.dispatch.executor import Executor, Timer
        from pytest_gpushare.dispatch.leases_by_test import SharedDevices
        from pytest_gpushare.scheduler.dispatcher import Dispatcher

        packs = "packed" in started.settings.presets
        names = {slot.device.name for slot in started.plan.slots}
        contexts = {name: started.context_of(name) for name in names}
        learned = LearnedNeeds(self._config, contexts, packs=packs)
        weighed = weigh(suite, kinds, started.settings, dist, learned)
        if not started.plan.slots and not weighed.uses:
            return None
        routes = kinds.on_cpu or weighed.uses or started.hosts
        if not (weighed.has_needs or packs or routes):
            return None
        marks = weighed.uses or any(job.marked for job in weighed.jobs)
        if started.plan.request.fixed and not marks:
            # Workers of --tx that got no slot: nobody chose CPU workers, and nothing is to route.
            return None
        suite.is_closed = True
        remember_suite(
            self._config,
            has_needs=weighed.has_needs or packs,
            uses_models=bool(weighed.uses),
        )
        self._uses = weighed.uses
        if started.shares_devices:
            started.allow_vram_of_others()
        capacities = self._capacities()
        jobs, models = weighed.jobs, None
        if weighed.uses:
            jobs, models = self._with_models(weighed)
        dispatcher = Dispatcher(jobs, capacities, self._policy(), models)
        executor = Executor(
            dispatcher,
            suite.nodeids,
            started.links,
            readings_of(started.readings()),
            {each.uuid: each.context for each in capacities},
            started.tests,
            started.record.note,
            partial(report_lost, self._config),
            lambda: is_ending(self._plugins),
        )
        started.links.on("test", executor.note_held)
        if started.llm is not None:
            executor.models = started.llm
            started.llm.on_outcome = lambda: wake(executor.node())
            started.services.add(AtSigterm(started.llm))
        self._parity = Parity(weighed, kinds)
        started.dispatches(self._parity, has_needs=weighed.has_needs)
        if kinds.on_cpu:
            # Its hook is called for each report, and only skips on CPU workers are lost tests.
            self._plugins.register(self._parity, "gpu-share-parity")
        timer = Timer(executor.due_in, lambda: wake(executor.node()))
        executor.on_due = timer.look
        started.services.add(timer)
        if started.lessee is not None and started.shares_devices:
            executor.shared = SharedDevices(
                started.lessee,
                [each for each in capacities if each.uuid in started.lessee.totals],
                Naming(started.settings.report_names),
                lambda text: started.record.note("leases-unknown", text),
                lambda: wake(executor.node()),
            )
            started.look_with(executor.shared.look)
        executor.elsewhere = started.leases_elsewhere(lambda: wake(executor.node()))
        return executor

    def _with_models(self, weighed: Weighed) -> tuple[list[Job], ModelQueue]:
        """The tests with the groups of the models that they use; the server is asked."""
        from pytest_gpushare.scheduler.model_queue import ModelQueue
        from pytest_gpushare.session.llm import LlmTests

        jobs, started = weighed.jobs, self._started
        work = {test: job.duration for test, job in enumerate(jobs) if job.duration is not None}
        llm = started.llm = LlmTests(
            started,
            weighed.uses,
            work,
            [plain_id(job.nodeid, self._options.dist) for job in jobs],
            holds_vram=started.facts.is_phased,
            has_server=not started.hosts,
        )
        if not started.plan.slots:
            # Each worker decides by itself what becomes of tests that need a GPU.
            jobs = [job._replace(marked=False, need=None) for job in jobs]
        jobs = [job._replace(model=llm.of.get(test)) for test, job in enumerate(jobs)]
        models = ModelQueue(jobs, llm.groups)
        models.patience = float(started.settings.ollama_load_timeout)
        if started.plan.slots:
            gpu_tests = [
                (job.need.vram or slot if job.need else slot, job.duration)
                for job in jobs
                if job.model is None and (job.marked or not started.plan.cpu_workers)
                for slot in (started.plan.slots[0].unknown_need,)
            ]
            models.phase = llm.choose_phase(gpu_tests, started.plan)
        return jobs, models

    def _may_have_needs(self, kinds: KindsOfWorkers) -> bool:
        """Whether a closer look is worth loading what it takes: most suites mark nothing."""
        settings = self._started.settings
        if settings.vram or settings.markers or settings.ollama_tests:
            return True
        return "packed" in settings.presets or any(
            said.asks() or said.llm is not None
            for _, found in kinds.on_gpu
            for said in set(found.declared)
        )

    def _capacities(self) -> list[DeviceCapacity]:
        from pytest_gpushare.planning.leasing import capacities_of

        started = self._started
        return [
            each._replace(context=started.context_on(each.uuid))
            for each in capacities_of(started.plan)
        ]

    def _policy(self) -> Policy:
        from pytest_gpushare.scheduler.types import Policy

        settings = self._started.settings
        return Policy(
            dist=self._options.dist,
            without_gpu=settings.without_gpu,
            empty_caches=settings.empty_caches,
            pressure_timeout=float(settings.pressure_timeout),
            visible_devices=settings.visible_devices,
            chunk=chunk_size(self._options),
            reorder=reorders_groups(self._options),
            awaits_losses=bool(self._started.hosts),
        )


def report_lost(config: pytest.Config, nodeid: str, reason: str) -> None:
    """Report a test as failed that no worker can run any more."""
    path = nodeid.partition("::")[0]
    report = pytest.TestReport(
        nodeid=nodeid,
        location=(path, None, path),
        keywords={},
        outcome="failed",
        longrepr=reason,
        when="call",
    )
    config.hook.pytest_runtest_logreport(report=report)


def report_difference(config: pytest.Config, worker: str, text: str) -> None:
    """Report an error of collection: this worker collected other tests than one of its kind."""
    report = pytest.CollectReport(nodeid=worker, outcome="failed", longrepr=text, result=[])
    config.hook.pytest_collectreport(report=report)


def scheduler_for(started: ActiveRun, config: pytest.Config, stock: Any) -> Any:
    """The scheduler of this run, given the one that xdist would use."""
    options = config.option
    if options.dist == "each" or not started.has_placed_all:
        return stock
    # xdist counts those of its options. One that a hook added may have collected before a GPU
    # worker has.
    if hasattr(stock, "numnodes"):
        stock.numnodes = max(stock.numnodes, len(list(started.workers)))
    dispatch = VramDispatch(started, config)
    return GpuShareScheduling(stock, started.links, dispatch, most_deaths(options))
