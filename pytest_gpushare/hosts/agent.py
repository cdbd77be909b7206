"""The plugin's process on another host: it probes and plans there, then samples during the run.

It holds the host's lease, and ends with its standard input: with the controller or its login.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pytest_gpushare.compat.xdist_hosts import count_of_cpus
from pytest_gpushare.config.kinds import kind_of, read
from pytest_gpushare.config.options import OPTIONS
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.host import (
    installed_frameworks,
    is_alive,
    line_of,
    mps_is_running,
)
from pytest_gpushare.gpu.readings import Live
from pytest_gpushare.hosts.answers import (
    HostAnswer,
    MemorySample,
    ModelsAnswer,
    ProcessRow,
    ProcessSample,
    Sample,
    answer_message,
    message,
)
from pytest_gpushare.hosts.checkout import Checkout, checkout_of
from pytest_gpushare.hosts.host_lease import LeaseHere
from pytest_gpushare.leases.lessee import EnoughElsewhereError
from pytest_gpushare.neighbours import other_servers
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.ollama.monitor import Question
from pytest_gpushare.ollama.prediction import known_sizes
from pytest_gpushare.planning.caps import without_caps_of_outer_run
from pytest_gpushare.planning.leasing import Terms
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.planning.startup import PlanHooks
from pytest_gpushare.session.needs_store import EarlierRuns
from pytest_gpushare.session.start import Host, start
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.timed import TimedCall
from pytest_gpushare.waiting_line import WaitingLine

Send = Callable[[dict[str, Any]], None]

BEAT = 1.0
"""Seconds between two samples when nobody asks for one: a sign of life."""

_PROCESSES_EVERY = 0.4
"""Seconds between two readings of process lists."""

_WAITING_EVERY = 0.5
"""Seconds between two messages of a host that waits for VRAM, or loads a model."""

_SILENCE = 60.0
"""Seconds without a word after which the controller counts as gone, once it sends its beat."""

_GIT = 5.0
_ASKING = 2.0
"""Seconds for the question which models Ollama has."""


def serve(request: Mapping[str, Any], send: Send, lines: Iterable[str]) -> None:
    """Answer the controller until it closes the connection."""
    lock = threading.Lock()

    def send_whole(message: dict[str, Any]) -> None:
        with lock:
            send(message)

    state = TimedCall(lambda: checkout_of(Path.cwd()), "git")
    line = _LineThere(send_whole)
    words = words_of(lines, line.has_enough)
    settings = settings_of(request["settings"], only_asks=request["only_asks"])
    try:
        if settings.ollama_preload:
            # Nothing is loaded for a run that does not start.
            state.wait(_GIT)
            send_whole(message("checkout", state.value or Checkout()))
            if next(words, "end") != "load":
                return
        facts = _started(settings, request, line)
    except BrokenPipeError:
        # The controller is gone while this host waited, or loaded.
        return
    except GpuShareError as error:
        send_whole(message("refused", str(error)))
        return
    agent = _Agent(facts, send_whole)
    cache = ""
    try:
        cache = _written(request["cache"])
        state.wait(_GIT)
        answer = answer_of(facts)
        answer = answer._replace(checkout=state.value or Checkout(), cache=cache)
        send_whole(answer_message(answer))
        if request["only_asks"]:
            return
        agent.serve(words)
    except OSError:
        # The controller is gone.
        pass
    finally:
        agent.stop()
        facts.close()
        if cache:
            shutil.rmtree(cache, ignore_errors=True)


class _LineThere(WaitingLine):
    """Informs the controller what this host loads, and that it waits for VRAM until it need not."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send
        self._next_at = float("-inf")
        self.has_enough = threading.Event()

    def show(self, text: str, _hint: str = "") -> None:
        """See `WaitingLine`."""
        if self.has_enough.is_set():
            raise EnoughElsewhereError
        self._inform("waiting", text)

    def progress(self, text: str) -> None:
        """See `WaitingLine`."""
        self._inform("loading", text)

    def _inform(self, kind: str, text: str) -> None:
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _WAITING_EVERY
            self._send(message(kind, text))

    def clear(self) -> None:
        """See `WaitingLine`."""


def words_of(
    lines: Iterable[str], has_enough: threading.Event, silence: float = _SILENCE
) -> Iterator[str]:
    """The controller's lines, except `enough`, which sets `has_enough` at once.

    They end with the connection, and where its beat stays away for so many seconds: a network that
    is cut ends nothing here for a quarter of an hour.
    """
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            if line.strip() == "enough":
                has_enough.set()
            else:
                found.put(line.strip())
        has_enough.set()
        found.put(None)

    threading.Thread(target=read, name="gpu-share-words", daemon=True).start()
    return _until_silence(found, silence)


def _until_silence(found: queue.SimpleQueue[str | None], silence: float) -> Iterator[str]:
    limit = None
    with contextlib.suppress(queue.Empty):
        while (line := found.get(timeout=limit)) is not None:
            if line == "beat":
                limit = silence
            else:
                yield line


def _started(settings: Settings, request: Mapping[str, Any], line: WaitingLine) -> StartFacts:
    environment = dict(os.environ)
    if request["only_asks"]:
        # Whether a run would wait depends on the other hosts.
        settings = settings._replace(wait=Fraction(0))
    found = start(
        settings,
        Request(),
        Host(tuple(request["simulate"]), count_of_cpus(), environment),
        PlanHooks(),
        EarlierRuns(known_sizes(request["sizes"]), dict(request["contexts"])),
        no_gpu_tests=request["no_gpu_tests"],
        terms=Terms(Path.cwd(), only_asks=request["only_asks"], line=line),
    )
    devices = (
        replace(planned, alone=found.alone.get(planned.device.uuid, 0))
        for planned in found.plan.devices
    )
    return found._replace(plan=replace(found.plan, devices=tuple(devices)))


def models_of_server(ollama: OllamaFacts) -> tuple[str, ...]:
    """The full names of the models that a server has; none where it has not answered."""
    if not ollama.answered or ollama.server is None:
        return ()
    from pytest_gpushare.ollama.catalog import names_of

    return names_of(ollama.server, _ASKING)


def _written(files: Mapping[str, str]) -> str:
    """A directory for pytest's cache with these files; empty where there are none."""
    if not files:
        return ""
    directory = tempfile.mkdtemp(prefix="gpu-share-cache-")
    for name, text in files.items():
        path = Path(directory, *name.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


CONTROLLER_ONLY = frozenset({"markers", "vram", "config", "hosts"})
"""Keys of options that only the controller goes by."""


def settings_as_texts(settings: Settings) -> dict[str, str]:
    """The settings that sizing goes by, as a user would write them."""
    return {
        option.key: kind_of(option).write(getattr(settings, option.attribute))
        for option in OPTIONS
        if option.key not in CONTROLLER_ONLY
    }


def settings_of(texts: Mapping[str, str], *, only_asks: bool) -> Settings:
    """The settings that these texts mean; whatever is not among them has its default.

    `only_asks`: no test will follow, so no model is loaded.
    """
    values: dict[str, Any] = {
        option.attribute: read(option, texts.get(option.key) or option.default, "controller")
        for option in OPTIONS
    }
    settings = on_several_hosts(Settings(**values))
    return settings._replace(
        # The controller decides for all hosts together whether CPU workers will do.
        fallback_to_cpu_when_constrained=True,
        ollama_preload=settings.ollama_preload and not only_asks,
    )


def on_several_hosts(settings: Settings) -> Settings:
    """The settings as each host of a run goes by them.

    The server of each host loads models as its tests ask for them, at any time, so that VRAM is
    kept for it throughout.
    """
    return settings._replace(ollama_phase="beside")


def answer_of(facts: StartFacts) -> HostAnswer:
    """What a host answers when it has probed and planned."""
    lessee, loading = facts.lessee, facts.loading
    path = lessee.ledger.record_path if lessee is not None else None
    return HostAnswer(
        facts.gpus,
        facts.plan,
        facts.ollama,
        models_of_server(facts.ollama),
        without_caps_of_outer_run(os.environ),
        installed_frameworks() if facts.plan.slots else {},
        mps_is_running(os.environ),
        "" if path is None else str(path),
        facts.problems,
        loading.sentences if loading is not None else (),
        facts.leases,
        servers=other_servers(facts.answers),
    )


class _Agent:
    """Samples of the devices, and questions to the host's Ollama."""

    def __init__(self, facts: StartFacts, send: Send) -> None:
        self._live: Live | None = facts.live
        self._server = facts.ollama.server
        self._loading, self._not_kept = facts.loading, 0
        self._lease: LeaseHere | None = None
        if facts.lessee is not None:
            names = facts.settings.report_names
            self._lease = LeaseHere(facts.lessee, facts.plan, names, send)
        self._send = send
        self._wanted = threading.Event()
        self._stopped = threading.Event()
        self._processes_at = float("-inf")
        self._looks = False
        """Whether the processes are to be read, too, however short ago that was."""
        self._thread = threading.Thread(target=self._run, name="gpu-share-agent", daemon=True)

    def serve(self, lines: Iterable[str]) -> None:
        """Do what the controller says, until its last line."""
        self._thread.start()
        if self._lease is not None:
            self._lease.start()
        for line in lines:
            word, _, rest = line.partition(" ")
            if word in ("read", "look"):
                self._looks = self._looks or word == "look"
                self._wanted.set()
            elif word == "models" and rest.isdigit():
                threading.Thread(target=self._ask, args=(int(rest),), daemon=True).start()
            elif word == "worker" and self._lease is not None:
                self._lease.joined(rest)
            elif word == "share" and self._lease is not None:
                self._lease.share(rest)
            elif word == "end":
                return

    def stop(self) -> None:
        """Sample no more."""
        self._stopped.set()
        self._wanted.set()
        if self._lease is not None:
            self._lease.stop()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._wanted.clear()
                memory = processes = None
                # Whatever a reading runs into, the host is still there, and says so.
                with contextlib.suppress(Exception):
                    processes = self._read_processes()
                    memory = self._read_memory()
                # The clocks as late as can be.
                sample = Sample(time.monotonic(), time.time(), memory, processes)
                self._send(message("sample", sample))
                self._say_what_is_not_kept()
                self._wanted.wait(BEAT)
        except OSError:
            # Nobody listens any more; the main thread sees the end of its input.
            return

    def _say_what_is_not_kept(self) -> None:
        kept = self._loading.kept if self._loading is not None else None
        texts = kept.service.given_up if kept is not None else []
        for text in texts[self._not_kept :]:
            self._not_kept += 1
            self._send(message("not-kept", text))

    def _read_processes(self) -> ProcessSample | None:
        now, looks, self._looks = time.monotonic(), self._looks, False
        if self._live is None or not (looks or now - self._processes_at >= _PROCESSES_EVERY):
            return None
        self._processes_at = now
        found = self._live.processes(0.0)
        devices = {
            uuid: None
            if listed is None
            else tuple(ProcessRow(p, tuple(line_of(p.pid)[1:]), is_alive(p.pid)) for p in listed)
            for uuid, listed in found.devices.items()
        }
        return ProcessSample(found.at, devices)

    def _read_memory(self) -> MemorySample | None:
        if self._live is None:
            return None
        found = self._live.memory(0.0)
        return MemorySample(found.at, found.devices, self._live.is_answering)

    def _ask(self, number: int) -> None:
        if self._server is None:
            return
        question = Question(self._server, 5.0)
        question.wait(5.5)
        answer = ModelsAnswer(number, question.models, question.problem, question.is_refused)
        with contextlib.suppress(OSError):
            self._send(message("models", answer))
