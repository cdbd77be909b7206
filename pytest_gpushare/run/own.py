"""Dispatch by the plugin itself: whether there is a reason for it, and what it works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_gpushare.run.dispatch import GpuShareScheduling, most_deaths
from pytest_gpushare.run.held_back import HeldBackReports
from pytest_gpushare.run.lessons import Lessons, remember_needs
from pytest_gpushare.run.places import NUMBER
from pytest_gpushare.run.started import LeftAlone, Started

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.plan.work import Policy, Room, Worker
    from pytest_gpushare.run.hand_out import HandOut
    from pytest_gpushare.run.jobs import Learned
    from pytest_gpushare.run.suite import Crew, Suite


class Own:
    """Begins the plugin's own dispatch where the design says so."""

    def __init__(
        self,
        started: Started,
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
        self.held_back = HeldBackReports(config.hook.pytest_runtest_logreport)

    def has_gpu(self, node: Any) -> bool:
        """Whether a worker was placed on a GPU."""
        return int(node.gateway.spec.env[NUMBER]) < len(self._started.plan.slots)

    def joins(self, node: Any, suite: Suite) -> Worker:
        """The worker as the dispatcher knows it."""
        from pytest_gpushare.plan.work import Worker

        plan, parity = self._started.plan, self._started.parity
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
        return Worker(node.gateway.id, self._started.seen_by(slot), slot.vram)

    def begin(self, suite: Suite, crew: Crew) -> HandOut | None:
        """What hands the tests out; None where xdist's scheduler does as well."""
        started, dist = self._started, self._options.dist
        if not (crew.on_cpu or self._may_have_needs(crew)):
            return None
        from pytest_gpushare.plan.dispatcher import Dispatcher
        from pytest_gpushare.run.hand_out import HandOut
        from pytest_gpushare.run.jobs import weigh
        from pytest_gpushare.run.parity import Parity
        from pytest_gpushare.run.readings import Readings
        from pytest_gpushare.run.ticker import Ticker

        weighed = weigh(suite, crew, started.settings, dist, self._learned)
        if not (weighed.has_needs or crew.on_cpu):
            return None
        if started.plan.request.fixed and not any(job.marked for job in weighed.jobs):
            # Workers of --tx that got no slot: nobody chose CPU workers, and nothing is to route.
            return None
        suite.is_closed = True
        if weighed.has_needs:
            remember_needs(self._config)
        rooms = self._rooms()
        dispatcher = Dispatcher(weighed.jobs, rooms, self._policy())
        hand_out = HandOut(
            dispatcher,
            suite.nodeids,
            started.links,
            Readings(started.live, [room.uuid for room in rooms], started.resident),
            {room.uuid: room.context for room in rooms},
            started.journal,
            started.record.note,
            self._report_lost,
        )
        started.links.on("test", hand_out.hold)
        started.links.on("emptied", hand_out.emptied)
        started.links.on("wider", self.held_back.amend)
        self._plugins.register(self.held_back, "gpu-share-held-back")
        started.parity = Parity(weighed, crew)
        self._plugins.register(started.parity, "gpu-share-parity")
        ticker = Ticker(lambda: hand_out.waits, lambda: _nudge(hand_out))
        hand_out.on_wait = ticker.wake
        started.services.append(ticker)
        ticker.start()
        return hand_out

    def _may_have_needs(self, crew: Crew) -> bool:
        """Whether a closer look is worth loading what it takes: most suites mark nothing."""
        settings = self._started.settings
        if settings.vram or settings.markers or "packed" in settings.presets:
            return True
        return any(said.asks() for _, told in crew.on_gpu for said in set(told.declared))

    def _rooms(self) -> list[Room]:
        from pytest_gpushare.plan.work import Room

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
        from pytest_gpushare.plan.work import Policy

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
    started: Started | LeftAlone,
    config: pytest.Config,
    stock: Any,
    report_lost: Callable[[str, str], None],
) -> Any:
    """The scheduler of this run, given the one that xdist would use.

    `report_lost` reports a test that no worker can run any more, by node id, with the reason.
    """
    options = config.option
    if isinstance(started, LeftAlone) or not started.plan.slots or options.dist == "each":
        return stock
    if not started.has_placed_all:
        return stock
    own = Own(started, config, Lessons(started, config), report_lost)
    return GpuShareScheduling(stock, started.links, own, most_deaths(options))


def _nudge(hand_out: HandOut) -> None:
    """Have xdist call the scheduler in its own thread, by an event that changes nothing."""
    node = hand_out.node()
    if node is not None:
        node.notify_inproc("unscheduled", node=node, indices=[])
