"""Ollama during a run: its models, and who held VRAM when they were loaded."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.ollama import history
from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.history import Change, History
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel
from pytest_gpushare.text import printable
from pytest_gpushare.timed import TimedCall
from pytest_gpushare.units import GB

if TYPE_CHECKING:
    from pytest_gpushare.ollama.client import Connection
    from pytest_gpushare.ollama.spill import Promise, Spill


class Question:
    """`GET /api/ps`, asked as soon as this is made."""

    def __init__(self, address: Address, patience: float) -> None:
        """`patience` is how many seconds an answer may take."""
        self.models: tuple[LoadedModel, ...] | None = None
        """The answer; None where none came that makes sense."""
        self.problem = f"no answer within {patience:g} s"
        """Why there is none."""
        self.is_refused = False
        """Whether nothing listens there."""
        self._address = address
        self._deadline = time.monotonic() + patience
        self._connection: Connection | None = None
        self._call = TimedCall(self._ask, "ollama")

    @property
    def is_over(self) -> bool:
        """Whether there is an answer, or will be none."""
        return self.is_gone or time.monotonic() >= self._deadline

    @property
    def is_gone(self) -> bool:
        """Whether its thread has ended, so that the next question overlaps with nothing."""
        return self._call.is_over

    def wait(self, seconds: float) -> None:
        """Wait for the answer, at most for so many seconds."""
        self._call.wait(seconds)

    def hang_up(self) -> None:
        """End the request: its answer is not wanted any more."""
        if self._connection is not None and not self.is_gone:
            self._connection.hang_up()

    def _ask(self) -> None:
        # Imported here, where it delays nothing: the workers are being started meanwhile.
        from pytest_gpushare.ollama.catalog import loaded_models
        from pytest_gpushare.ollama.client import NonsenseError, UnreachableError, connect

        try:
            with contextlib.closing(connect(self._address, self._opened)) as connection:
                self.models = loaded_models(connection, self._deadline).models
            return
        except TimeoutError:
            return
        except UnreachableError as error:
            self.is_refused = True
            problem = f"cannot be reached: {error}" if str(error) else "nothing listens"
        except NonsenseError as odd:
            problem = f"answers nonsense: {odd}"
        except Exception as error:
            problem = f"cannot be asked: {type(error).__name__}: {error}"
        self.problem = printable(problem, 200)

    def _opened(self, connection: Connection) -> None:
        self._connection = connection


_MOST_SAMPLES = 600
_MOST_SPILLS = 1000
_LOADED_PER_SECOND = GB
"""A model that is being loaded is in no answer: it may have been decided so long ago."""

EVERY = 1.0
"""Seconds between looks at whose VRAM is whose."""

Look = Callable[[Sequence[LoadedModel], bool], Mapping[str, DeviceUsage]]
"""What is held now, by device, given the models that Ollama has loaded, and whether with
its owners."""


class MonitoredServer:
    """The answers of one server, judged by what was held when they came."""

    def __init__(
        self,
        models: Sequence[LoadedModel] | None,
        promise: Promise,
        look: Look,
        record: Record,
        saw: Callable[[LoadedModel, int | None], None] = lambda _model, _used: None,
    ) -> None:
        """`models` are those at the start, None where the server did not answer; `saw` gets
        what a loaded model takes, in bytes of its process where NVML reports them."""
        self.history = History(models)
        self.promise = promise
        self.spills: list[Spill] = []
        self.doubted: dict[str, int] = {}
        """Model -> bytes that NVML shows of Ollama's, where the server says that more of the
        model is on the GPU."""
        self.is_over = False
        """Whether the last answer was asked for."""
        self._look, self._record, self._saw = look, record, saw
        self._samples: deque[tuple[float, Mapping[str, DeviceUsage]]] = deque(maxlen=_MOST_SAMPLES)
        self._samples.append((0.0, promise.start))
        self._split_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_worth_asking(self) -> bool:
        """Whether the server answered when it was asked last."""
        return self.history.answered_at is not None and not self.history.failures

    def resident(self) -> Mapping[str, int]:
        """UUID -> bytes that Ollama holds there now."""
        with self._lock:
            return {uuid: held.of(OLLAMA) for uuid, held in self._samples[-1][1].items()}

    def sample(self, *, by_worker: bool = False) -> None:
        """Look at how much is held, and once a second, or when it matters, by which process."""
        now = self._record.now()
        by_worker = by_worker or now - self._split_at >= EVERY
        held = self._look(self.history.models, by_worker)
        if by_worker:
            self._split_at = now
        if held:
            with self._lock:
                self._samples.append((now, held))

    def answer(self, models: Sequence[LoadedModel]) -> None:
        """The server has answered with its models."""
        changes = self.history.look(self._record.now(), models)
        if changes:
            self.sample(by_worker=True)
            self._learn(models)
        for change in changes:
            self._note(change)
        self._doubt()

    def silence(self, problem: str, *, certain: bool) -> None:
        """The server has not answered."""
        for change in self.history.fail(self._record.now(), problem, certain=certain):
            self._note(change)

    def end(self) -> None:
        """Nothing more will be asked."""
        self.is_over = True
        self.history.end(self._record.now())

    def _learn(self, models: Sequence[LoadedModel]) -> None:
        """What a model takes is known best where it is alone."""
        with self._lock:
            seen = [held.identified.get(OLLAMA) for held in self._samples[-1][1].values()]
        known = sum(size for size in seen if size is not None)
        for model in models:
            self._saw(model, known if known and len(models) == 1 else None)

    def _note(self, change: Change) -> None:
        facts = self._facts(change)
        if change.kind != history.SPILLED:
            self._record.note(change.kind, history.sentence(change), **facts)
            return
        # Imported here: in most runs nothing spills.
        from pytest_gpushare.ollama.spill import spilled

        spill = self._judge(change)
        if len(self.spills) < _MOST_SPILLS:
            self.spills.append(spill)
        facts |= {"cause": spill.cause.value, "under_tests": spill.is_ours}
        if spill.setting is not None:
            facts["setting"] = {spill.setting.key: spill.setting.value}
        self._record.note(change.kind, spilled(spill), **facts)

    def _judge(self, change: Change) -> Spill:
        from pytest_gpushare.ollama.spill import judge

        model = change.model
        assert model is not None
        began = change.since - model.size / _LOADED_PER_SECOND
        with self._lock:
            samples = list(self._samples)
        window = [held for at, held in samples if at >= began] or [samples[-1][1]]
        other_models = [other for other in self.history.models if other.name != model.name]
        return judge(change.at, model, other_models, window, self.promise)

    def _doubt(self) -> None:
        """Ollama may report `100 % GPU` of what it could not see: does NVML show as much?"""
        with self._lock:
            held = self._samples[-1][1].values()
        seen = [device.identified.get(OLLAMA) for device in held]
        shown = sum(size for size in seen if size is not None)
        if not any(size is not None for size in seen):
            shown = sum(device.used for device in held)
        reported = sum(model.on_gpu for model in self.history.models)
        self.doubted = {}
        if held and shown < reported // 2:
            self.doubted = {m.name: shown for m in self.history.models if m.is_whole}

    def _facts(self, change: Change) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if change.model is not None:
            facts |= {
                "model": change.model.name,
                "size_bytes": change.model.size,
                "size_vram_bytes": change.model.size_vram,
                "context": change.model.context,
            }
        if change.problem:
            facts["problem"] = change.problem
        with self._lock:
            held = self._samples[-1][1]
        facts["held"] = {
            uuid: {
                "ollama_bytes": device.of(OLLAMA),
                "workers_bytes": None if device.workers is None else dict(device.workers),
                "others_bytes": device.remainder,
                "free_bytes": device.free,
            }
            for uuid, device in held.items()
        }
        return facts


class Pace(NamedTuple):
    """How often Ollama is asked, and how long it may take; seconds."""

    every: float = 2.0
    later: float = 10.0
    """From `often` questions on."""
    often: int = 1800
    """An hour's worth."""
    most: int = 10_000
    """Questions of one run; then no more are asked."""
    longest: float = 30.0
    """Between questions to a server that does not answer."""
    patience: float = 5.0
    """An answer may take so long: during an unload Ollama itself blocks."""
    last_patience: float = 1.0
    """The last answer, for which the end of the run waits."""
    sample: float = 0.2
    """Between looks at how much VRAM is held."""

    def pause(self, asked: int, failures: int) -> float:
        """Seconds until the next question: the more in vain, the longer."""
        usual = self.every if asked < self.often else self.later
        return min(max(usual, self.longest), usual * (1 << min(failures, 16)))


class Monitor:
    """The service that asks, from before the first test until after the last."""

    def __init__(
        self, address: Address, make_server: Callable[[], MonitoredServer], pace: Pace | None = None
    ) -> None:
        """`make_server` makes what receives the answers; it is called in the monitor's thread."""
        self.asked = 0
        """Questions so far."""
        self.problem = ""
        """Why it ended before the tests did; empty where it did not."""
        self._address, self._make_server, self._pace = address, make_server, pace or Pace()
        self._server: MonitoredServer | None = None
        self._stop = threading.Event()
        self._question: Question | None = None
        """The one that is open."""
        self._handled: Question | None = None
        """The last one whose outcome was handed on."""
        self._thread = threading.Thread(target=self._run, name="gpu-share-monitor", daemon=True)

    @property
    def server(self) -> MonitoredServer | None:
        """What is known so far; None before the first moment."""
        return self._server

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask once more and end, within the last answer's limit and a little."""
        self._stop.set()
        self._thread.join(self._pace.last_patience + 0.5)

    @property
    def models(self) -> Sequence[LoadedModel] | None:
        """The models of the last answer; None before the first one."""
        server = self._server
        return (
            None if server is None or server.history.answered_at is None else server.history.models
        )

    def resident(self) -> Mapping[str, int]:
        """UUID -> bytes that Ollama holds there now; empty before the first look."""
        return self._server.resident() if self._server is not None else {}

    def has_failed(self) -> bool:
        """Whether a part of a model is on the CPU because of the tests."""
        return self._server is not None and any(spill.is_ours for spill in self._server.spills)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            # Or pytest would report it as a warning of whatever test runs then.
            self.problem = f"{type(error).__name__}: {error}"[:200]

    def _watch(self) -> None:
        server = self._server = self._make_server()
        due = time.monotonic() + self._pace.every
        while not self._stop.wait(self._pace.sample):
            server.sample()
            self._take(server)
            if self._question is None and time.monotonic() >= due and self._may_ask():
                self._ask(self._pace.patience)
                due = time.monotonic() + self._pace.pause(self.asked, server.history.failures)
        self._finish(server)

    def _may_ask(self) -> bool:
        return self.asked < self._pace.most

    def _ask(self, patience: float) -> Question:
        self.asked += 1
        self._question = Question(self._address, patience)
        return self._question

    def _take(self, server: MonitoredServer) -> None:
        """Hand on the answer to the question that is open, if it came or never will."""
        question = self._question
        if question is None or not question.is_over:
            return
        if question is not self._handled:
            self._handled = question
            question.hang_up()
            if question.models is not None:
                server.answer(question.models)
            else:
                server.silence(question.problem, certain=question.is_refused)
        # A look-up of a name cannot be cancelled: until it ends, no other question is asked.
        if question.is_gone:
            self._question = None

    def _finish(self, server: MonitoredServer) -> None:
        """The last question: what Ollama holds now that the tests are over."""
        until = time.monotonic() + self._pace.last_patience
        server.sample()
        if self._question is not None:
            # A server that did not answer before is not waited for.
            if server.is_worth_asking:
                self._question.wait(until - time.monotonic())
            self._take(server)
        if self._question is None and server.is_worth_asking and self._may_ask():
            last = self._ask(max(0.1, until - time.monotonic()))
            last.wait(until - time.monotonic())
            server.sample()
            self._take(server)
        if self._question is not None and self._question is not self._handled:
            # It may still come, but the end of the run does not wait for it.
            server.silence(self._question.problem, certain=False)
        server.end()
