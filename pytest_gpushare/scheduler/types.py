"""What the dispatcher is told and what it answers. Sizes in bytes, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from pytest_gpushare.scheduler.needs import Need


class Job(NamedTuple):
    """One collected test as the controller knows it; its index in the list is its number."""

    nodeid: str
    marked: bool = False
    """Whether it is a GPU test: it goes to GPU workers; the others go to any, CPU first."""
    need: Need | None = None
    """None: unknown; see `Need.vram`."""
    group: str = ""
    """Tests of one group go to one worker, one after the other: the key of loadscope, loadfile or
    loadgroup; under load and worksteal what shares fixtures of a class or module, which may be
    split where workers would be idle else. Empty: a group of its own."""
    duration: float | None = None
    """As an earlier run measured it; None: unknown."""
    refusal: str = ""
    """Why it fails without being run: a marker that cannot be understood."""


class Worker(NamedTuple):
    """A worker process."""

    id: str
    devices: tuple[str, ...] = ()
    """UUIDs of the devices that it sees, its own first; none: a CPU worker."""
    slot: int = 0


class Room(NamedTuple):
    """A device as the plan leaves it to the tests."""

    uuid: str
    label: str
    """`GPU 0`, as messages name it."""
    budget: int
    reservation: int = 0
    """Kept for Ollama; what it holds already counts towards it."""
    safety_buffer: int = 0
    free: int | None = None
    """Free when the plan was made."""
    resident: int = 0
    """What Ollama held when the plan was made."""
    context: int = 0
    """What a process holds that has used the device and gave everything else back."""


class Reading(NamedTuple):
    """What NVML and Ollama say of a device now."""

    free: int | None = None
    """None: cannot be told."""
    resident: int | None = None
    """What Ollama holds there; None: cannot be told, so what it held before."""
    held: Mapping[str, int | None] = {}
    """Worker -> what it and its descendants hold there, where the driver tells.

    Read before `free`, and after the last report of the worker: an older figure shows what a
    test that is over held, and would be taken for what the next one has allocated already.
    """
    holders: str = ""
    """Who else holds VRAM there, in words for messages: `Ollama 10.8 GB, PID 7 3.0 GB`."""


class Policy(NamedTuple):
    """The settings that the dispatcher follows."""

    dist: str = "load"
    """xdist's `--dist`."""
    without_gpu: str = "run"
    empty_caches: str = "when-needed"
    pressure_timeout: float = 300.0
    return_timeout: float = 30.0
    """How long VRAM that a test or a dead worker had is waited for before others are blamed."""
    visible_devices: str = "own"
    chunk: int | None = None
    """xdist's `--maxschedchunk`."""
    reorder: bool = True
    """xdist's `--loadscope-reorder`: larger groups go first, GPU tests as packing says. False:
    groups go in the order of collection, as far as they fit."""


class Run(NamedTuple):
    """Send these tests to the worker, in this order, after what it has already.

    A GPU test comes alone, to a worker that has nothing else.
    """

    worker: str
    tests: tuple[int, ...]
    last: bool = True
    """Nothing follows for now: the worker is to start the last of them too (the rest item).
    With no tests at all: the last one that it has."""
    need: int = 0
    """What a GPU test was admitted with on each of its devices."""
    source: str = ""
    """Where the need is from: marker, rule, learned, slot; empty where it has none."""
    waited: float = 0.0
    """How long it was its turn before it fitted."""
    note: str = ""
    """Why a GPU test runs without a GPU, or without room on it."""
    alone: bool = False
    """Whether no other GPU test runs on its devices meanwhile."""


class Instead(NamedTuple):
    """Have the worker report this test without running it; it is `finished` as any other."""

    worker: str
    test: int
    outcome: str
    """`fail` or `skip`."""
    reason: str


class EmptyCaches(NamedTuple):
    """Have this idle worker give back what it retains; answered by `Dispatcher.emptied`."""

    worker: str
    fixtures: bool = False
    """Also tear down its fixtures of classes and modules, the last resort before `Shutdown`."""


class Shutdown(NamedTuple):
    """Let the worker end; it has nothing left to do. `worker_down` follows."""

    worker: str


class Drop(NamedTuple):
    """This test cannot be run: no worker that has collected it is left. It counts as done."""

    test: int
    reason: str


class Tell(NamedTuple):
    """Note what happened, for the record and for the user."""

    kind: str
    """`pressure`, `pressure-over`, `late`, `caches-emptied`, `worker-ended`."""
    text: str
    facts: Mapping[str, int | float | str] = {}


Action: TypeAlias = Run | Instead | EmptyCaches | Shutdown | Drop | Tell


class Lost(NamedTuple):
    """What a worker had when it went down."""

    running: int | None = None
    """The test that it ran, which does not come again by itself."""
    queued: tuple[int, ...] = ()
    """Tests that it had not begun; they are dispatched anew."""
