"""What hosts are asked before a run, their answers, and the checks of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.hosts.agent import settings_as_texts
from pytest_gpushare.hosts.answers import Hello, HostError, RemoteFacts, decode, decode_hello
from pytest_gpushare.hosts.checkout import Checkout, checkout_of
from pytest_gpushare.hosts.connection import START_LIMIT, HostConnection
from pytest_gpushare.hosts.specs import HostSpec
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.text import one_line

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


Answer = tuple[HostConnection, Hello, RemoteFacts]


class AskedHost:
    """One host, and what it has answered so far."""

    def __init__(self, connection: HostConnection) -> None:
        self.connection, self.name = connection, connection.name
        self.hello: Hello | None = None
        self.facts: RemoteFacts | None = None
        self.waits = ""
        """What it says while it waits for VRAM that other sessions there have leased."""

    @property
    def answer(self) -> Answer | None:
        """What it has answered; None while it has not."""
        if self.hello is None or self.facts is None:
            return None
        return self.connection, self.hello, self.facts

    def hear(self, until: float) -> bool:
        """Whether it says something until then. Raises `HostError` where it cannot take part."""
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
            self.hello = decode_hello(message)
            _check_versions(self.name, self.hello)
        elif kind == "refused":
            text = one_line(str(message.get("text")), 500).removeprefix("gpu-share: ")
            raise HostError(f"{self.name}: {text}")
        elif kind == "waiting":
            self.waits = one_line(str(message.get("text")), 500).removeprefix("gpu-share: ")
        elif kind == "facts" and self.hello is not None:
            self.facts = decode(message, self.name)

    def answered(self, until: float, *, may_wait: bool = False) -> Answer | None:
        """Its answer; None where it waits and may. Raises `HostError`, also for none until then."""
        while self.answer is None and not (may_wait and self.waits):
            if not self.hear(until):
                raise HostError(
                    f"{self.name}: no answer within {START_LIMIT:g} s: try "
                    f"`ssh {' '.join(self.connection.spec.ssh)} true`"
                )
        return self.answer


def answers_of(
    connections: Sequence[HostConnection],
    root: Path,
    has_room: Callable[[Sequence[AskedHost]], object],
    *,
    strict: bool,
) -> list[Answer]:
    """What all hosts answered. Raises `HostError` with a line for each that cannot take part.

    `has_room` is called where hosts wait for VRAM, and returns once one host has some.
    """
    until = time.monotonic() + START_LIMIT
    if connections:
        until = connections[0].begun + START_LIMIT
    here = checkout_of(root)
    hosts, problems = [AskedHost(connection) for connection in connections], []
    for host in hosts:
        try:
            host.answered(until, may_wait=True)
        except HostError as error:
            problems.append(str(error))
    if not problems:
        problems = _settle(hosts, has_room)
    found = [host.answer for host in hosts if host.answer is not None]
    for connection, _, facts in found:
        if problem := _other_checkout(connection.name, here, facts.checkout, strict=strict):
            problems.append(problem)
    if problems:
        raise HostError("\n".join(f"gpu-share: host {problem}" for problem in problems))
    return [(c, hello, _with_note(facts, here)) for c, hello, facts in found]


def _settle(
    hosts: Sequence[AskedHost], has_room: Callable[[Sequence[AskedHost]], object]
) -> list[str]:
    """Wait until one host has room; those that still wait then go on without. Returns problems."""
    try:
        has_room(hosts)
        waiting = [host for host in hosts if host.answer is None]
        for host in waiting:
            host.connection.say("enough")
        until = time.monotonic() + START_LIMIT
        for host in waiting:
            host.answered(until)
    except HostError as error:
        return [str(error)]
    return []


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


def _other_checkout(name: str, here: Checkout, there: Checkout, *, strict: bool) -> str:
    if here.commit and there.commit and here.commit != there.commit:
        return (
            f"{name}: has commit {there.commit[:12]} checked out, this host {here.commit[:12]}: "
            "check out the same commit there"
        )
    problem = _doubt(here, there)
    return f"{name}: {problem} (an error under --gpu-share-strict)" if problem and strict else ""


def _doubt(here: Checkout, there: Checkout) -> str:
    """Why nobody can say that the tests are the same there; empty where they are."""
    if here.commit is None or there.commit is None:
        return "whether it has the same tests is unknown: there is no git checkout"
    if here.changes != there.changes:
        return "its uncommitted changes differ from those of this host"
    return ""


def _with_note(facts: RemoteFacts, here: Checkout) -> RemoteFacts:
    doubt = _doubt(here, facts.checkout)
    return facts._replace(notes=(*facts.notes, doubt)) if doubt else facts


def look_at(
    specs: Sequence[HostSpec], settings: Settings, root: Path
) -> Iterator[tuple[str, RemoteFacts | None, str]]:
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
        until = time.monotonic() + START_LIMIT
        for found in connections:
            if isinstance(found, HostError):
                yield "", None, str(found)
                continue
            name = found.name
            try:
                answer = AskedHost(found).answered(until)
                assert answer is not None
                _, _, facts = answer
            except HostError as error:
                yield name, None, str(error)
                continue
            problem = _other_checkout(name, here, facts.checkout, strict=False)
            yield (name, None, problem) if problem else (name, _with_note(facts, here), "")
