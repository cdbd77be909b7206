"""The tests of a run as the dispatcher knows them, from what each worker collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from pytest_gpushare.plan.declared import Declared, means_cpu
from pytest_gpushare.plan.needs import rules_of, wanted
from pytest_gpushare.plan.work import Job
from pytest_gpushare.run.suite import Collection, Crew, Suite
from pytest_gpushare.run.told import Told
from pytest_gpushare.settings.values import Settings


class Weighed(NamedTuple):
    """The tests with their needs, and which of them are GPU tests only because of skips."""

    jobs: list[Job]
    by_skip: list[int]
    """Unmarked tests that markers skip on CPU workers but not on GPU workers."""

    @property
    def has_needs(self) -> bool:
        """Whether any test asks for more than to be run on a GPU worker."""
        return any(job.refusal or (job.need is not None and _asks(job)) for job in self.jobs)


def _asks(job: Job) -> bool:
    need = job.need
    return need is not None and (need.source != "slot" or need.devices > 1 or need.exclusive)


Learned: TypeAlias = Callable[[str], "tuple[int | None, float | None]"]
"""Node id -> need in bytes and duration in seconds, as far as earlier runs tell."""


def weigh(suite: Suite, crew: Crew, settings: Settings, dist: str, learned: Learned) -> Weighed:
    """The jobs of the run, with which the dispatcher begins."""
    told = _merged(len(suite.nodeids), [*crew.on_gpu, *crew.on_cpu])
    skipped = _skipped(crew.on_cpu) - _skipped(crew.on_gpu)
    runs_on_gpu = {number for collection, _ in crew.on_gpu for number in collection.numbers}
    rules, all_gpu = rules_of(settings.vram), means_cpu(settings.markers)
    jobs, by_skip = [], []
    for number, nodeid in enumerate(suite.nodeids):
        said, group = told[number]
        plain = plain_id(nodeid, dist)
        need, duration = learned(plain)
        want = wanted(plain, said, rules, learned=need, gpu_unless_marked=all_gpu)
        marked = want.marked
        if not marked and number in skipped and number in runs_on_gpu and said.route != "cpu":
            by_skip.append(number)
            marked = True
        jobs.append(
            Job(nodeid, marked, want.need, group_of(nodeid, group, dist), duration, said.refusal)
        )
    return Weighed(jobs, by_skip)


def _merged(count: int, workers: Iterable[tuple[Collection, Told]]) -> list[tuple[Declared, str]]:
    found: list[tuple[Declared, str] | None] = [None] * count
    done: set[int] = set()
    for collection, told in workers:
        # A worker that told nothing must not stand for others that collected the same.
        if id(collection) in done or not told.declared:
            continue
        done.add(id(collection))
        for number, said, group in zip(
            collection.numbers, told.declared, told.groups, strict=False
        ):
            if found[number] is None:
                found[number] = (said, group)
    return [one or (Declared(), "") for one in found]


def _skipped(workers: Iterable[tuple[Collection, Told]]) -> set[int]:
    """Tests that markers skip on every worker of a kind that has collected them."""
    skipped: set[int] = set()
    runs: set[int] = set()
    for collection, told in workers:
        if not any(told.skips):
            runs.update(collection.numbers)
            continue
        for number, skips in zip(collection.numbers, told.skips, strict=False):
            (skipped if skips else runs).add(number)
    return skipped - runs


def plain_id(nodeid: str, dist: str) -> str:
    """The node id without the group that xdist writes behind it."""
    if dist == "loadgroup" and nodeid.rfind("@") > nodeid.rfind("]"):
        return nodeid.rpartition("@")[0]
    return nodeid


def group_of(nodeid: str, fixtures: str, dist: str) -> str:
    """What must run on one worker: as xdist splits; under load what shares fixtures."""
    if dist == "loadscope":
        return nodeid.rpartition("::")[0]
    if dist == "loadfile":
        return nodeid.partition("::")[0]
    if dist == "loadgroup":
        return nodeid.rpartition("@")[2] if nodeid.rfind("@") > nodeid.rfind("]") else ""
    return fixtures
