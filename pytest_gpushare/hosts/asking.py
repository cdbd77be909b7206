"""What hosts are asked before a run, their answers, and the checks of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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


def answers_of(connections: Sequence[HostConnection], root: Path, *, strict: bool) -> list[Answer]:
    """What all hosts answered. Raises `HostError` with a line for each that cannot take part."""
    until = time.monotonic() + START_LIMIT
    if connections:
        until = connections[0].begun + START_LIMIT
    here = checkout_of(root)
    found, problems = [], []
    for connection in connections:
        try:
            found.append(answer_of(connection, until))
        except HostError as error:
            problems.append(str(error))
    for connection, _, facts in found:
        if problem := _other_checkout(connection.name, here, facts.checkout, strict=strict):
            problems.append(problem)
    if problems:
        raise HostError("\n".join(f"gpu-share: host {problem}" for problem in problems))
    return [(c, hello, _with_note(facts, here)) for c, hello, facts in found]


def answer_of(connection: HostConnection, until: float) -> Answer:
    """What a host answers until then. Raises `HostError` where it cannot take part."""
    name = connection.name
    hello = None
    try:
        while (message := connection.next(until)) is not None:
            kind = message.get("kind")
            if kind == "hello":
                hello = decode_hello(message)
                _check_versions(name, hello)
            elif kind == "refused":
                text = one_line(str(message.get("text")), 500).removeprefix("gpu-share: ")
                raise HostError(f"{name}: {text}")
            elif kind == "facts" and hello is not None:
                return connection, hello, decode(message, name)
    except (ValueError, TypeError, LookupError):
        raise HostError(
            f"{name}: it answers nonsense: use the same pytest-gpushare there"
        ) from None
    if connection.is_over:
        raise HostError(f"{name}: {connection.failure()}")
    raise HostError(
        f"{name}: no answer within {START_LIMIT:g} s: try "
        f"`ssh {' '.join(connection.spec.ssh)} true`"
    )


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
                _, _, facts = answer_of(found, until)
            except HostError as error:
                yield name, None, str(error)
                continue
            problem = _other_checkout(name, here, facts.checkout, strict=False)
            yield (name, None, problem) if problem else (name, _with_note(facts, here), "")
