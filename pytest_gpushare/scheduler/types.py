"""The events and actions of the dispatcher as values. Sizes in bytes, times in seconds."""

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
    model: int | None = None
    """The group of the model of Ollama's that it uses, by its number; None: it uses none."""


class ModelGroup(NamedTuple):
    """The tests that use one model with one context."""

    name: str
    """As messages name it."""
    parallel: int = 1
    """How many of its tests may run at once."""
    loads: bool = False
    """Whether the session loads it before its first test starts."""
    refusal: tuple[str, str] | None = None
    """(`fail` or `skip`, reason): its tests are reported so without being run."""
    reservations: Mapping[str, int] = {}
    """UUID -> bytes that have to be free there before it is loaded, and are kept for it as long
    as it is used; empty where the plan keeps VRAM for Ollama all the time."""


BESIDE, BEFORE, AFTER = "beside", "before", "after"
"""When tests that use models run: next to the GPU tests, before or after them."""


class Worker(NamedTuple):
    """A worker process."""

    id: str
    devices: tuple[str, ...] = ()
    """UUIDs of the devices that it sees, its own first; none: a CPU worker."""
    slot: int = 0


class DeviceCapacity(NamedTuple):
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
    beside: int = 0
    """Kept for other servers than Ollama: those whose models no test waits for."""


class Others(NamedTuple):
    """What the other sessions of the host have of a device, in bytes."""

    claimed: int = 0
    """What is free and theirs: leased and not yet taken, or kept for those that asked before.
    Where nobody knows what is free, also what they hold: it is counted off the budget."""
    held_by_others: int = 0
    """VRAM that this session could use if the others had none."""
    keepable: int | None = None
    """What this session may keep between its tests, beyond what it keeps already; None: any."""
    owed: int = 0
    """What it is to free for an older session, by ending workers that it can do without."""
    lacks: int = 0
    """What it is to free in the same way for a test of its own, as no other session can."""
    are_waiting: bool = False
    """Whether any of them waits for VRAM here."""
    limit: int | None = None
    """The most that its workers may hold in all, where the others cannot be asked; None: they
    can."""
    leased: int | None = None
    """The most that its workers may hold in all until more is leased, on a host where that takes
    a message there and back; None: no such limit."""
    is_asked: bool = False
    """Whether more was asked for there, and no answer has come yet."""
    progress: int = 0
    """Another number whenever one of them has done a test or given VRAM back."""
    names: str = ""
    """Who they are and what they have leased, in words for messages."""


NOBODY = Others()


class DeviceReading(NamedTuple):
    """What NVML and the servers say of a device now."""

    free: int | None = None
    """None: unknown."""
    resident: int | None = None
    """What Ollama holds there; None: unknown, so what it held before."""
    held: Mapping[str, int | None] = {}
    """Worker -> what it and its descendants hold there, where the driver reports it.

    Read before `free`, and after the last report of the worker: an older figure shows what a
    test that is over held, and would be taken for what the next one has allocated already.
    """
    holders: str = ""
    """Who else holds VRAM there, in words for messages: `Ollama 10.8 GB, PID 7 3.0 GB`."""
    others: Others = NOBODY
    left_behind: Mapping[str, int] = {}
    """Worker -> the part of what it holds that processes hold which its tests started: where none
    of its tests runs, the next one cannot use that."""
    is_attributed: bool = True
    """Whether the driver says which process holds how much, as far as is known."""
    outstanding: int = 0
    """What other servers than Ollama have not yet taken of what is kept for them."""


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
    awaits_losses: bool = False
    """Whether a worker without tests waits until all are done: it may get those of a host that is
    lost. False: it ends."""


class Admission(NamedTuple):
    """How one test was admitted, where there is anything to say of it."""

    need: int = 0
    """Bytes on each of its devices."""
    source: str = ""
    """Where the need is from: marker, rule, learned, slot; empty where it has none."""
    waited: float = 0.0
    """Seconds for which it was first in the order and did not fit, or a free worker waited for its
    model."""
    alone: bool = False
    """Whether no other GPU test runs on its devices meanwhile."""
    note: str = ""
    """Why a GPU test runs without a GPU, or without room on it."""
    refusal: tuple[str, str] | None = None
    """(`fail` or `skip`, reason): it is reported so, without its fixtures and its body."""


class Run(NamedTuple):
    """Send these tests to the worker, in this order, after what it has already."""

    worker: str
    tests: tuple[int, ...]
    admissions: Mapping[int, Admission] = {}
    """By test; for tests of which there is nothing to say, none."""
    admitted: bool = True
    """False: a single test that waits in the worker, between two protocols, for `Admit`."""
    ahead: int = 0
    """0: the worker asks for what follows when the call of the last one is over. Else they are
    short, and it asks when one of the last so many starts."""


class Admit(NamedTuple):
    """The test that the worker was sent and that waits there may start."""

    worker: str
    test: int
    admission: Admission = Admission()


class Park(NamedTuple):
    """Nothing follows for this worker for now: it tears everything down, and waits."""

    worker: str


class EmptyCaches(NamedTuple):
    """Have a worker between two tests give back what it retains; `Dispatcher.emptied` follows."""

    worker: str
    withdraw: bool = False
    """Also take back the test that waits in the worker, and tear down the fixtures kept for it."""


class MoreWanted(NamedTuple):
    """What a running test wants of its device."""

    number: int
    size: int
    """Bytes in all."""
    takes_less: bool = False
    """Whether it does not wait: what is there will do."""
    is_noted: bool = False
    """Whether the test knows that it waits."""


class Raised(NamedTuple):
    """What became of a running test's wish for more VRAM: it waits for this answer."""

    worker: str
    number: int
    """That of the wish."""
    granted: bool
    size: int = 0
    """Bytes that it has then."""
    is_final: bool = True
    """False: it waits."""
    text: str = ""
    """Why it waits or is refused."""


class OpenModel(NamedTuple):
    """Have this model loaded; `ModelDispatch.opened` or `ModelDispatch.not_opened` follows."""

    group: int
    turn_only: bool = False
    """Wait until no other session uses another model of the server; `ModelDispatch.has_turn`
    follows."""


class CloseModel(NamedTuple):
    """Nothing uses this model any more; `ModelDispatch.closed` follows."""

    group: int
    makes_room: bool = False
    """Whether other tests need the VRAM that it has."""


class Recall(NamedTuple):
    """Take back the short tests that the worker has not begun; `Dispatcher.returned` follows."""

    worker: str


class Shutdown(NamedTuple):
    """Let the worker end; nothing follows for it. `worker_down` follows."""

    worker: str


class Drop(NamedTuple):
    """This test cannot be run: no worker that has collected it is left. It counts as done."""

    test: int
    reason: str


class Note(NamedTuple):
    """An event for the record and for the user."""

    kind: str
    """`pressure`, `pressure-over`, `late`, `worker-ended`."""
    text: str
    facts: Mapping[str, int | float | str] = {}


Action: TypeAlias = (
    Run
    | Admit
    | Park
    | EmptyCaches
    | Recall
    | Shutdown
    | Raised
    | Drop
    | Note
    | OpenModel
    | CloseModel
)
