"""A scheduler for xdist: the plugin's own where there is something to route, else xdist's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gpushare.dispatch.reports import HeldBackReports
from pytest_gpushare.dispatch.suite import Crew, Suite
from pytest_gpushare.planning.placement import NUMBER
from pytest_gpushare.scheduler.needs import Told, read
from pytest_gpushare.session.needs_store import LearnedNeeds, remember_needs
from pytest_gpushare.session.run import ActiveRun

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.dispatch.executor import HandOut
    from pytest_gpushare.dispatch.suite import Crew, Learned, Parity, Suite
    from pytest_gpushare.scheduler.types import Policy, Room, Worker
    from pytest_gpushare.wire import Links


_SILENT = Told(0, (), (), ())


class GpuShareScheduling:
    """xdist's scheduler protocol, which xdist calls from one thread.

    Who schedules is decided when all tests are collected, as only markers tell whether there
    are needs. Until then xdist's scheduler hears all that is said; after that only one does.
    """

    def __init__(self, stock: Any, links: Links, own: Own, most_deaths: int | None) -> None:
        """`stock` is what xdist would use; of workers that die xdist replaces `most_deaths`."""
        self._stock = stock
        self._own = own
        self._most_deaths = most_deaths
        self._deaths = 0
        self._nodes: dict[Any, list[str] | None] = {}
        self._told: dict[str, Told] = {}
        self._suite = Suite()
        self._hand_out: HandOut | None = None
        self._decided = False
        self._due = False
        links.on("collected", self._hear)

    def __getattr__(self, name: str) -> Any:
        """What is not in the protocol: pytest-rerunfailures wants `config` when a worker dies."""
        return getattr(self._stock, name)

    def _hear(self, worker: str, message: Mapping[str, Any]) -> None:
        self._told[worker] = read(message)

    @property
    def nodes(self) -> list[Any]:
        """The workers that are there."""
        # xdist's loadscope drops workers for which there is no work.
        return list(self._stock.nodes if self._hand_out is None else self._nodes)

    @property
    def collection_is_completed(self) -> bool:
        """Whether all workers of the start, or their replacements, have collected."""
        return self._hand_out is not None or bool(self._stock.collection_is_completed)

    @property
    def tests_finished(self) -> bool:
        """Whether the workers may be told to end; xdist asks after everything that happens."""
        if self._hand_out is None:
            return bool(self._stock.tests_finished)
        if self._due:
            # Only now is all told that came with the event, such as that a test comes again.
            self._due = False
            self._hand_out.step()
        return self._hand_out.is_done

    @property
    def has_pending(self) -> bool:
        """Whether tests are left that have not had their outcome."""
        if self._hand_out is None:
            return bool(self._stock.has_pending)
        return not self._hand_out.is_done

    def add_node(self, node: Any) -> None:
        """A worker is up, and collects."""
        self._nodes[node] = None
        if self._hand_out is None:
            self._stock.add_node(node)

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        """A worker has collected these tests."""
        self._nodes[node] = list(collection)
        if self._hand_out is None:
            self._stock.add_node_collection(node, collection)

    def schedule(self) -> None:
        """All have collected, for the first time or after a worker was replaced."""
        if not self._decided:
            self._decided = True
            self._decide()
        elif self._hand_out is None:
            self._stock.schedule()
        else:
            self._join(self._hand_out)
            self._hand_out.step()

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """A worker has done a test."""
        self._stock.mark_test_complete(node, item_index, duration)

    def mark_test_pending(self, item: str) -> None:
        """Another plugin wants a test to run once more."""
        if self._hand_out is None:
            self._stock.mark_test_pending(item)
            return
        number = self._suite.number(item)
        if number is not None:
            self._hand_out.again(number)
            self._due = True

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        """Tests were taken back from a worker; with none of them, a nudge of our own."""
        if self._hand_out is None:
            self._stock.remove_pending_tests_from_node(node, indices)
        else:
            self._hand_out.step()

    def remove_node(self, node: Any) -> str | None:
        """A worker has ended or died; returns the test in which it died."""
        has_died = not hasattr(node, "workeroutput")
        self._deaths += has_died
        self._nodes.pop(node, None)
        if self._hand_out is None:
            return self._stock.remove_node(node)  # type: ignore[no-any-return]
        replaced = has_died and (self._most_deaths is None or self._deaths <= self._most_deaths)
        self._due = True
        worker, held_back = node.gateway.id, self._own.held_back
        lost = self._hand_out.leave(worker, replaced=replaced, torn_down=held_back.of(worker))
        held_back.settle(worker, died_in=lost)
        return lost if has_died else None

    def _decide(self) -> None:
        collected = [(node, ids) for node, ids in self._nodes.items() if ids is not None]
        crew = Crew()
        for node, ids in collected:
            told = self._told.get(node.gateway.id, _SILENT)
            crew.add(self._own.has_gpu(node), self._suite.add(ids), told)
        self._hand_out = self._own.begin(self._suite, crew)
        if self._hand_out is None:
            # Called for each test: as if nobody stood in between.
            self.mark_test_complete = self._stock.mark_test_complete  # type: ignore[method-assign]
            self._stock.schedule()
            return
        self.mark_test_complete = self._complete  # type: ignore[method-assign]
        self._join(self._hand_out)
        self._hand_out.step()

    def _complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        assert self._hand_out is not None
        self._hand_out.done(node.gateway.id, item_index, duration)

    def _join(self, hand_out: HandOut) -> None:
        for node, ids in self._nodes.items():
            if ids is not None and not hand_out.knows(node.gateway.id):
                told = self._told.get(node.gateway.id, _SILENT)
                collection = self._suite.add(ids)
                hand_out.join(node, self._own.joins(node, self._suite), collection, told.pid)


def most_deaths(options: Any) -> int | None:
    """How many dead workers xdist replaces; None: any number."""
    given = options.maxworkerrestart
    if given is not None:
        return int(given)
    return options.numprocesses * 4 if options.numprocesses else None


class Own:
    """Begins the plugin's own dispatch where the design says so."""

    def __init__(
        self,
        started: ActiveRun,
        config: pytest.Config,
        learned: Learned,
        report_lost: Callable[[str, str], None],
    ) -> None:
        self._started = started
        self._config = config
        self._options: Any = config.option
        self._learned = learned
        self._report_lost = report_lost
        self._plugins = config.pluginmanager
        self._parity: Parity | None = None
        self.held_back = HeldBackReports(config.hook.pytest_runtest_logreport)

    def has_gpu(self, node: Any) -> bool:
        """Whether a worker was placed on a GPU."""
        return int(node.gateway.spec.env[NUMBER]) < len(self._started.plan.slots)

    def joins(self, node: Any, suite: Suite) -> Worker:
        """The worker as the dispatcher knows it."""
        from pytest_gpushare.scheduler.types import Worker

        plan, parity = self._started.plan, self._parity
        self.held_back.join(node)
        if parity is not None:
            parity.worker_up(node.gateway.id, has_gpu=self.has_gpu(node))
        session = self._plugins.get_plugin("session")
        if session is not None:
            # xdist takes the worker that collected last for the measure of all.
            session.testscollected = len(suite.nodeids)
        if not self.has_gpu(node):
            return Worker(node.gateway.id)
        slot = plan.slots[int(node.gateway.spec.env[NUMBER])]
        return Worker(node.gateway.id, self._started.seen_by(slot), slot.unknown_need)

    def begin(self, suite: Suite, crew: Crew) -> HandOut | None:
        """What hands the tests out; None where xdist's scheduler does as well."""
        started, dist = self._started, self._options.dist
        if not (crew.on_cpu or self._may_have_needs(crew)):
            return None
        from pytest_gpushare.dispatch.executor import HandOut, Readings, Ticker
        from pytest_gpushare.dispatch.suite import Parity, weigh
        from pytest_gpushare.scheduler.dispatcher import Dispatcher

        weighed = weigh(suite, crew, started.settings, dist, self._learned)
        packs = "packed" in started.settings.presets
        if not (weighed.has_needs or crew.on_cpu or packs):
            return None
        if started.plan.request.fixed and not any(job.marked for job in weighed.jobs):
            # Workers of --tx that got no slot: nobody chose CPU workers, and nothing is to route.
            return None
        suite.is_closed = True
        if weighed.has_needs or packs:
            remember_needs(self._config)
        rooms = self._rooms()
        dispatcher = Dispatcher(weighed.jobs, rooms, self._policy())
        hand_out = HandOut(
            dispatcher,
            suite.nodeids,
            started.links,
            Readings(
                started.live, [room.uuid for room in rooms], started.resident, started.attribution
            ),
            {room.uuid: room.context for room in rooms},
            started.tests,
            started.record.note,
            self._report_lost,
        )
        started.links.on("test", hand_out.hold)
        started.links.on("emptied", hand_out.emptied)
        started.links.on("wider", self.held_back.amend)
        self._plugins.register(self.held_back, "gpu-share-held-back")
        self._parity = Parity(weighed, crew)
        started.routing.begin(self._parity, has_needs=weighed.has_needs)
        self._plugins.register(self._parity, "gpu-share-parity")
        ticker = Ticker(lambda: hand_out.waits, lambda: _nudge(hand_out))
        hand_out.on_wait = ticker.wake
        started.services.add(ticker)
        return hand_out

    def _may_have_needs(self, crew: Crew) -> bool:
        """Whether a closer look is worth loading what it takes: most suites mark nothing."""
        settings = self._started.settings
        if settings.vram or settings.markers or "packed" in settings.presets:
            return True
        return any(said.asks() for _, told in crew.on_gpu for said in set(told.declared))

    def _rooms(self) -> list[Room]:
        from pytest_gpushare.scheduler.types import Room

        started = self._started
        return [
            Room(
                planned.device.uuid,
                planned.device.label,
                planned.budget,
                planned.reservation,
                planned.safety_buffer,
                planned.device.free,
                planned.resident,
                started.context_of(planned.device.name),
            )
            for planned in started.plan.devices
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
            chunk=self._options.maxschedchunk,
            # xdist has the option since 3.8, and always reordered before.
            reorder=getattr(self._options, "loadscopereorder", True),
        )


def scheduler_for(
    started: ActiveRun,
    config: pytest.Config,
    stock: Any,
    report_lost: Callable[[str, str], None],
) -> Any:
    """The scheduler of this run, given the one that xdist would use.

    `report_lost` reports a test that no worker can run any more, by node id, with the reason.
    """
    options = config.option
    if not started.plan.slots or options.dist == "each":
        return stock
    if not started.has_placed_all:
        return stock
    own = Own(started, config, LearnedNeeds(started, config), report_lost)
    return GpuShareScheduling(stock, started.links, own, most_deaths(options))


def _nudge(hand_out: HandOut) -> None:
    """Have xdist call the scheduler in its own thread, by an event that changes nothing."""
    node = hand_out.node()
    if node is not None:
        node.notify_inproc("unscheduled", node=node, indices=[])
