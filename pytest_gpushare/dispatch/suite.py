"""The tests of a run as the dispatcher knows them, from what each worker collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.scheduler.needs import (
    CollectedTests,
    Declared,
    ModelUse,
    Patterns,
    means_cpu,
    only_one,
    use_by_rules,
    wanted,
)

if TYPE_CHECKING:
    from pytest_gpushare.scheduler.types import Job

UNKNOWN = -1
"""The number of a test that is not in the run's list."""


class Collection(NamedTuple):
    """What one worker collected, and where in the run's list its tests stand."""

    ids: Sequence[str]
    numbers: Sequence[int]
    """Its index -> the test's number; the same object for workers that collected the same."""
    indices: Mapping[int, int] | None
    """The test's number -> its index; None where the two are equal."""

    def without(self, tests: frozenset[int]) -> Collection:
        """The same, as of a worker that has not collected these tests."""
        indices = self.indices or {number: index for index, number in enumerate(self.numbers)}
        left = {number: index for number, index in indices.items() if number not in tests}
        return self._replace(indices=left)

    def place(self, number: int) -> int:
        """The worker's index of the test of this number."""
        return number if self.indices is None else self.indices[number]


class Suite:
    """The union of what the workers collected; a test's number is its place in it."""

    def __init__(self) -> None:
        self.nodeids: list[str] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._known: list[tuple[Sequence[str], Collection]] = []
        self.is_closed = False
        """Whether the run has begun: what only a later worker collects is not run any more."""

    def add(self, ids: Sequence[str]) -> Collection:
        """Take a worker's tests in; those that no other has come at the end."""
        for before, collection in self._known:
            if before == ids:
                return collection
        numbers, seen = [], dict[str, int]()
        for nodeid in ids:
            # A test that is named twice on the command line may be collected twice.
            turn = seen[nodeid] = seen.get(nodeid, -1) + 1
            new = UNKNOWN if self.is_closed else len(self.nodeids)
            number = self._numbers.setdefault((nodeid, turn), new)
            if number == len(self.nodeids):
                self.nodeids.append(nodeid)
            numbers.append(number)
        same = numbers == list(range(len(numbers)))
        indices = None if same else {number: index for index, number in enumerate(numbers)}
        if indices is not None:
            indices.pop(UNKNOWN, None)
        collection = Collection(ids, numbers, indices)
        self._known.append((ids, collection))
        return collection

    def number(self, nodeid: str) -> int | None:
        """The test of this node id."""
        return self._numbers.get((nodeid, 0))


class KindsOfWorkers:
    """The workers of the start by kind, with what each collected."""

    def __init__(self) -> None:
        self.on_gpu: list[tuple[Collection, CollectedTests]] = []
        self.on_cpu: list[tuple[Collection, CollectedTests]] = []

    def add(self, has_gpu: bool, collection: Collection, tests: CollectedTests) -> None:
        """A worker has collected."""
        (self.on_gpu if has_gpu else self.on_cpu).append((collection, tests))


class Weighed(NamedTuple):
    """The tests with their needs, and which of them are GPU tests only because of skips."""

    jobs: list[Job]
    by_skip: list[int]
    """Unmarked tests that markers skip on CPU workers but not on GPU workers."""
    uses: Mapping[int, ModelUse] = {}
    """The models of Ollama's that tests use, by their numbers."""

    @property
    def has_needs(self) -> bool:
        """Whether any test asks for more than to be run on a GPU worker."""
        return any(job.refusal or (job.need is not None and job.need.asks()) for job in self.jobs)


Learned: TypeAlias = Callable[[str], "tuple[int | None, float | None]"]
"""Node id -> need in bytes and duration in seconds, as far as known from earlier runs."""


def weigh(
    suite: Suite, kinds: KindsOfWorkers, settings: Settings, dist: str, learned: Learned
) -> Weighed:
    """The jobs of the run, with which the dispatcher begins."""
    # A run that leaves the tests to xdist does not get here, and needs none of its types.
    from pytest_gpushare.scheduler.types import Job

    collected = _merged(len(suite.nodeids), [*kinds.on_gpu, *kinds.on_cpu])
    skipped = _skipped(kinds.on_cpu) - _skipped(kinds.on_gpu)
    runs_on_gpu = {number for collection, _ in kinds.on_gpu for number in collection.numbers}
    rules, all_gpu = Patterns(settings.vram), means_cpu(settings.markers)
    jobs, by_skip = [], []
    uses: dict[int, ModelUse] = {}
    models, only = Patterns(settings.ollama_tests), only_one(settings.ollama_models)
    for number, nodeid in enumerate(suite.nodeids):
        said, group = collected[number]
        plain = plain_id(nodeid, dist)
        need, duration = learned(plain)
        want = wanted(plain, said, rules, learned=need, gpu_unless_marked=all_gpu)
        marked = want.marked
        if (said.llm or settings.ollama_tests) and (
            use := use_by_rules(plain, said.llm, models, only)
        ):
            uses[number] = use
        if not marked and number in skipped and number in runs_on_gpu and said.route != "cpu":
            by_skip.append(number)
            marked = True
        jobs.append(
            Job(nodeid, marked, want.need, group_of(nodeid, group, dist), duration, said.refusal)
        )
    return Weighed(jobs, by_skip, uses)


def _merged(
    count: int, workers: Iterable[tuple[Collection, CollectedTests]]
) -> list[tuple[Declared, str]]:
    found: list[tuple[Declared, str] | None] = [None] * count
    done: set[int] = set()
    for collection, tests in workers:
        # A worker that sent nothing must not stand for others that collected the same.
        if id(collection) in done or not tests.declared:
            continue
        done.add(id(collection))
        for number, said, group in zip(
            collection.numbers, tests.declared, tests.groups, strict=False
        ):
            if found[number] is None:
                found[number] = (said, group)
    return [one or (Declared(), "") for one in found]


def _skipped(workers: Iterable[tuple[Collection, CollectedTests]]) -> set[int]:
    """Tests that markers skip on every worker of a kind that has collected them."""
    skipped: set[int] = set()
    runs: set[int] = set()
    for collection, tests in workers:
        if not any(tests.skips):
            runs.update(collection.numbers)
            continue
        for number, skips in zip(collection.numbers, tests.skips, strict=False):
            (skipped if skips else runs).add(number)
    return skipped - runs


def plain_id(nodeid: str, dist: str) -> str:
    """The node id without the group that xdist writes behind it."""
    if dist == "loadgroup" and nodeid.rfind("@") > nodeid.rfind("]"):
        return nodeid.rpartition("@")[0]
    return nodeid


def group_of(nodeid: str, sent: str, dist: str) -> str:
    """What must run on one worker, as xdist splits; `sent` is what the worker says.

    That is what shares fixtures, and under loadgroup the name in the markers: pytest 9.2 takes no
    other node ids, so that xdist 3.8 cannot write the name behind them.
    """
    if dist == "loadscope":
        return nodeid.rpartition("::")[0]
    if dist == "loadfile":
        return nodeid.partition("::")[0]
    if dist == "loadgroup":
        return nodeid[len(plain_id(nodeid, dist)) + 1 :] or sent
    return sent


_SPEAKS_OF_GPU = re.compile(
    # Not the names of options here, as in a skip for lack of a model.
    r"gpu(?!_share_)|cuda|nvidia|nvml|vram|nccl|cudnn|cupy|triton|accelerator|"
    r"(no|needs?|requires?) device",
    re.I,
)


class Skip(NamedTuple):
    """A test that skipped itself on a CPU worker, for lack of a GPU as far as its reason says."""

    nodeid: str
    reason: str


class Parity:
    """Compares the kinds of worker; a plugin of pytest while the own dispatch lasts."""

    def __init__(self, weighed: Weighed, kinds: KindsOfWorkers) -> None:
        on_gpu = {number for collection, _ in kinds.on_gpu for number in collection.numbers}
        on_cpu = {number for collection, _ in kinds.on_cpu for number in collection.numbers}
        self.has_cpu_workers = bool(kinds.on_cpu)
        self.gpu_tests = sum(job.marked for job in weighed.jobs)
        self.tests = len(weighed.jobs)
        self.uses_models = bool(weighed.uses)
        self.by_skip = [weighed.jobs[number].nodeid for number in weighed.by_skip]
        """Tests that markers skip without a GPU; they went to GPU workers."""
        self.only_on_gpu = len(on_gpu - on_cpu) if kinds.on_cpu else 0
        """How many tests only GPU workers collected, and ran."""
        self.only_on_cpu = len(on_cpu - on_gpu) if kinds.on_gpu else 0
        self._unmarked = {job.nodeid for job in weighed.jobs if not job.marked}
        self._workers: dict[str, bool] = {}
        self._on_cpu: dict[str, tuple[Any, ...]] = {}
        self._on_gpu: set[tuple[Any, ...]] = set()

    def worker_up(self, worker: str, *, has_gpu: bool) -> None:
        """A worker will report tests."""
        self._workers[worker] = has_gpu

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Remember where tests skip, and why; most do not."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        where = report.longrepr
        node = getattr(report, "node", None)
        if node is None or not isinstance(where, (tuple, list)) or len(where) != 3:
            return
        if self._workers.get(node.gateway.id):
            self._on_gpu.add(tuple(where))
        elif report.nodeid in self._unmarked:
            self._on_cpu[report.nodeid] = tuple(where)

    def lost(self) -> Sequence[Skip]:
        """Tests that skipped on CPU workers, and that GPU workers would run.

        That a test skips in its body or in a fixture shows only when it runs. It counts as lost
        where its reason speaks of a GPU, unless a GPU worker gave the same reason at that place.
        """
        return [
            Skip(nodeid, str(where[2]).removeprefix("Skipped: "))
            for nodeid, where in self._on_cpu.items()
            if where not in self._on_gpu and _SPEAKS_OF_GPU.search(str(where[2]))
        ]
