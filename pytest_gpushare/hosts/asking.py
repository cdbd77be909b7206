"""What hosts are asked before a run, the checks of their answers, and the wait for room on one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.hosts.agent import settings_as_texts
from pytest_gpushare.hosts.answers import Hello, HostAnswer, HostError, read, read_answer
from pytest_gpushare.hosts.checkout import Checkout, checkout_of
from pytest_gpushare.hosts.connection import START_LIMIT, HostConnection
from pytest_gpushare.hosts.specs import HostSpec
from pytest_gpushare.leases.lessee import EnoughElsewhereError
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.session.start_facts import StartFacts
from pytest_gpushare.text import one_line
from pytest_gpushare.waiting_line import WaitingLine

_LOOK = 0.05
"""Seconds for which one host is listened to while the run waits."""

_LOADING = 30.0
"""Seconds without a word after which a host that loads models counts as silent."""

_PACKAGES = ("pytest", "pytest-xdist", "pytest-gpushare")


def request_for(
    settings: Settings,
    *,
    simulate: Sequence[str] = (),
    contexts: Mapping[str, int] | None = None,
    sizes: KnownSizes = NOTHING_KNOWN,
    no_gpu_tests: str = "",
    only_asks: bool = True,
    cache: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What each host is asked; `only_asks`: no test will follow, so it leases nothing."""
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "settings": settings_as_texts(settings),
        "simulate": list(simulate),
        "contexts": dict(contexts or {}),
        "sizes": sizes.document(),
        "no_gpu_tests": no_gpu_tests,
        "only_asks": only_asks,
        "cache": dict(cache or {}),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class AskedHost:
    """One host, and what it has answered so far."""

    def __init__(self, connection: HostConnection, here: Checkout, *, strict: bool = False) -> None:
        """`here`: the checkout of this host; `strict`: a doubt about the other's is an error."""
        self.connection, self.name = connection, connection.name
        self._here, self._strict = here, strict
        self.hello = Hello("", "", "", (), {})
        """Empty until it has said it, which it does before all else."""
        self.has_tests = False
        """Whether its checkout is known and fits; before the rest where it is to load models."""
        self.answer: HostAnswer | None = None
        """None while it has not answered."""
        self.waits = ""
        """What it says while it waits for VRAM that other sessions there have leased."""
        self.loads = ""
        """What it says while a model is being loaded there."""
        self.until = connection.begun + START_LIMIT
        """Until when it has to say something."""

    def receive_until(self, until: float) -> bool:
        """Take its next message; whether one came until then.

        Raises `HostError` where it cannot take part.
        """
        message = self.connection.next(until)
        if message is None:
            if self.connection.is_over:
                raise HostError(f"{self.name}: {self.connection.failure()}")
            return False
        try:
            self._take(message)
        except (ValueError, TypeError, LookupError):
            raise HostError(
                f"{self.name}: it answers nonsense: use the same pytest-gpushare there"
            ) from None
        return True

    def _take(self, message: Mapping[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "hello":
            self.hello = read(Hello, message)
            _check_versions(self.name, self.hello)
        elif kind == "refused":
            raise HostError(f"{self.name}: {_words(message)}")
        elif kind == "checkout":
            self._check(read(Checkout, message))
        elif kind == "loading":
            self.loads, self.until = _words(message), time.monotonic() + _LOADING
        elif kind == "waiting":
            self.waits = _words(message)
        elif kind == "facts" and self.hello.versions:
            answer = read_answer(message, self.name)
            self._check(answer.checkout)
            doubt = self._here.doubt(answer.checkout)
            notes = (*answer.notes, doubt) if doubt else answer.notes
            self.answer = answer._replace(notes=notes)

    def _check(self, checkout: Checkout) -> None:
        if problem := self._here.problem(checkout, strict=self._strict):
            raise HostError(f"{self.name}: {problem}")
        self.has_tests = True

    def await_answer(self, line: WaitingLine | None = None, *, may_wait: bool = False) -> None:
        """Take what it says until it has answered, or waits and may.

        `line` shows what it loads. Raises `HostError`, also where it says nothing in time.
        """
        while self.answer is None and not (may_wait and self.waits):
            self.says_something()
            if line is not None and self.loads:
                line.progress(f"host {self.name}: {self.loads}")

    def await_tests(self) -> None:
        """Take what it says until its checkout is known. Raises `HostError`."""
        while not self.has_tests:
            self.says_something()

    def says_something(self) -> None:
        """Take what it says next. Raises `HostError`."""
        if not self.receive_until(self.until):
            raise HostError(
                f"{self.name}: no answer within {START_LIMIT:g} s: try "
                f"`ssh {' '.join(self.connection.spec.ssh)} true`"
            )


def _words(message: Mapping[str, Any]) -> str:
    return one_line(read(str, message), 500).removeprefix("gpu-share: ")


StartHere = Callable[[Settings, WaitingLine], StartFacts]


class StartOfHosts:
    """The hosts of a run until all have answered and one has room. This host is one of them."""

    def __init__(
        self,
        settings: Settings,
        connections: Sequence[HostConnection],
        start_here: StartHere | None,
        checkout: Checkout,
        *,
        strict: bool,
    ) -> None:
        """`start_here` probes and plans on this host; None: it takes no part. See `AskedHost`."""
        self._settings, self._start_here = settings, start_here
        # Whether CPU workers will do is decided for all hosts together.
        self._here = settings._replace(fallback_to_cpu_when_constrained=True)
        self.hosts = [AskedHost(each, checkout, strict=strict) for each in connections]
        self.here: StartFacts | None = None
        """What was found on this host."""

    def close(self) -> None:
        """Give back what this host has leased and loaded."""
        if self.here is not None:
            self.here.close()

    def ask(self) -> None:
        """Have all hosts answer, and look at this one, too.

        Raises `HostError` with a line for each that cannot take part.
        """
        if self._settings.ollama_preload:
            # Nothing is loaded for a run that does not start.
            self._each(AskedHost.await_tests)
            for host in self.hosts:
                host.connection.say("load")
        self._look_here()
        line = WaitingLine()
        try:
            self._each(lambda host: host.await_answer(line, may_wait=True))
        finally:
            line.clear()
        self._await_room()
        # Those that still wait go on without.
        for host in self.hosts:
            if host.answer is None:
                host.connection.say("enough")
                host.until = time.monotonic() + START_LIMIT
        self._each(AskedHost.await_answer)

    def _each(self, ask: Callable[[AskedHost], object]) -> None:
        problems = []
        for host in self.hosts:
            try:
                ask(host)
            except HostError as error:
                problems.append(str(error))
        _refuse(problems)

    def _look_here(self) -> None:
        """Probe this host, and do not wait for VRAM: others may have some."""
        if self._start_here is not None:
            at_once = self._here._replace(wait=Fraction(0))
            found = self._start_here(at_once, WaitingLine())
            # Its tests may wait.
            self.here = found._replace(settings=self._settings)

    def _await_room(self) -> None:
        """Wait, as `gpu_share_wait` says, until one host has room, or none waits any more."""
        if self.has_room():
            return
        line = _LineOfAll(self)
        try:
            if self.here is not None and self._start_here is not None:
                self._wait_here(self.here, self._start_here, line)
            while any(host.answer is None for host in self.hosts) and not self.has_room():
                line.look()
                line.show("")
        except EnoughElsewhereError:
            pass
        except HostError as error:
            _refuse([str(error)])
        finally:
            line.clear()

    def _wait_here(self, before: StartFacts, start_here: StartHere, line: WaitingLine) -> None:
        before.release()
        # What was loaded is there, and stays.
        found = start_here(self._here._replace(ollama_preload=False), line)
        if before.loading is not None:
            before.loading.look_by(found.live, found.lessee)
        self.here = found._replace(settings=self._settings, loading=before.loading)

    def has_room(self) -> bool:
        """Whether there is room for a GPU worker on one of them, as far as is known."""
        here = self.here is not None and bool(self.here.plan.slots)
        return here or any(host.answer and host.answer.plan.slots for host in self.hosts)


def _refuse(problems: Sequence[str]) -> None:
    """Raises `HostError` where there are problems."""
    if problems:
        raise HostError("\n".join(f"gpu-share: host {problem}" for problem in problems))


class _LineOfAll(WaitingLine):
    """Says on what the run waits; the wait is over as soon as one host has room."""

    def __init__(self, start: StartOfHosts) -> None:
        super().__init__()
        self._start = start

    def look(self, limit: float = _LOOK) -> None:
        """Take what the hosts say. Raises `HostError`, and `EnoughElsewhereError`."""
        for host in self._start.hosts:
            if host.answer is None:
                while host.receive_until(time.monotonic() + limit) and host.answer is None:
                    pass
        if self._start.has_room():
            raise EnoughElsewhereError

    def show(self, text: str, hint: str = "") -> None:
        """See `WaitingLine`."""
        self.look(0.0)
        waits = [f"host {host.name}: {host.waits}" for host in self._start.hosts
                 if not host.answer]  # fmt: skip
        if text or waits:
            super().show(text or f"gpu-share: {waits[0]}", hint)


def _check_versions(name: str, hello: Hello) -> None:
    for package in _PACKAGES:
        here, there = _version(package), hello.versions.get(package)
        if there is None:
            raise HostError(
                f"{name}: {package} is not installed for {hello.executable}: install "
                f"{package}=={here} there, or name another python="
            )
        if there != here:
            raise HostError(
                f"{name}: {package} {there} is installed there, {here} here: install the same"
            )


def look_at(
    specs: Sequence[HostSpec], settings: Settings, root: Path
) -> Iterator[tuple[str, HostAnswer | None, str]]:
    """Ask hosts without a run: the name of each, what it answered, or why it cannot take part."""
    here = checkout_of(root)
    request = request_for(settings)
    with ExitStack() as stack:
        connections: list[HostConnection | HostError] = []
        for spec in specs:
            if spec.is_local:
                continue
            try:
                connection = HostConnection(spec, request)
            except HostError as error:
                connections.append(error)
            else:
                stack.callback(connection.close)
                connections.append(connection)
        for found in connections:
            if isinstance(found, HostError):
                yield "", None, str(found)
                continue
            host = AskedHost(found, here)
            try:
                host.await_answer()
            except HostError as error:
                yield host.name, None, str(error)
            else:
                yield host.name, host.answer, ""
