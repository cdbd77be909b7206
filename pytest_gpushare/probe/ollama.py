"""What Ollama says of itself: two bounded questions, in which nothing is believed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from pytest_gpushare.probe.address import Address
from pytest_gpushare.probe.exchange import (
    Connection,
    NonsenseError,
    UnreachableError,
    connect,
)
from pytest_gpushare.probe.facts import LoadedModel, OllamaFacts
from pytest_gpushare.probe.host import is_own_address

_MOST_VRAM = 2**50
_MOST_MODELS = 256


_MOST_CONTEXT = 2**27


def unanswered(address: Address, problem: str) -> OllamaFacts:
    """The facts when no answer came, for the reason given."""
    return OllamaFacts(
        address=address.shown,
        asked=True,
        problem=f"{problem} ({address.problem})" if address.problem else problem,
    )


def ask(
    address: Address,
    timeout: float,
    opened: Callable[[Connection], object] = lambda _: None,
) -> OllamaFacts:
    """Ask for version and loaded models; `timeout` seconds for both together, then give up.

    Never raises. `opened` is given the connection: a head that drips defeats every limit on
    single reads, and closing the connection from outside is what ends it.
    """
    deadline = time.monotonic() + timeout
    try:
        on_this_host = is_own_address(address.host)
        connection = connect(address, opened)
        try:
            return _ask(connection, address, deadline, timeout, on_this_host)
        finally:
            connection.close()
    except Exception as error:
        return unanswered(address, line(f"cannot be asked: {type(error).__name__}: {error}", 200))


def _ask(
    connection: Connection, address: Address, deadline: float, timeout: float, on_this_host: bool
) -> OllamaFacts:
    version: str | None = None
    models: tuple[LoadedModel, ...] = ()
    problem = ""
    reachable = answered = False
    try:
        answer, peer = _get(connection, "/api/version", deadline)
        # A name that this machine has in its hosts file is known by where it leads.
        on_this_host = on_this_host or (peer is not None and is_own_address(peer))
        version = _version(answer)
        reachable = True
        models = loaded_models(connection, deadline)
        answered = True
    except NonsenseError as odd:
        reachable, problem = True, line(f"reachable but answers nonsense: {odd}", 200)
    except TimeoutError:
        problem = f"no answer within {timeout:g} s"
    except UnreachableError as error:
        reason = str(error)
        problem = line(f"cannot be reached: {reason}", 200) if reason else "nothing listens there"
    if problem and address.problem:
        problem = f"{problem} ({address.problem})"
    return OllamaFacts(
        address=address.shown,
        asked=True,
        answered=answered,
        version=version,
        models=models,
        problem=problem,
        reachable=reachable,
        on_this_host=on_this_host,
    )


def loaded_models(connection: Connection, deadline: float) -> tuple[LoadedModel, ...]:
    """The models that the server holds now, none of which is believed unchecked.

    Raises `TimeoutError`, `UnreachableError` or `NonsenseError`.
    """
    return _models(_get(connection, "/api/ps", deadline)[0])


def _get(connection: Connection, path: str, deadline: float) -> tuple[object, str | None]:
    """The decoded answer, and the address that gave it where the connection tells."""
    answer = connection.get(path, deadline)
    try:
        return json.loads(answer.body), answer.peer
    except (ValueError, RecursionError):
        raise NonsenseError(f"{path} gives no JSON") from None


def _version(answer: object) -> str | None:
    version = answer.get("version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise NonsenseError("/api/version gives no version")
    return line(version, 40)


def _models(answer: object) -> tuple[LoadedModel, ...]:
    models = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(models, list) or len(models) > _MOST_MODELS:
        raise NonsenseError("/api/ps gives no list of models")
    return tuple(_model(model) for model in models)


def _model(model: object) -> LoadedModel:
    if not isinstance(model, dict):
        raise NonsenseError("/api/ps gives a model that is no object")
    # `model` came in 0.1.42; older servers have `name` alone.
    name = model.get("name") or model.get("model")
    if not isinstance(name, str):
        raise NonsenseError("/api/ps gives a model without a name")
    digest, context = model.get("digest"), model.get("context_length")
    return LoadedModel(
        line(name, 120),
        _size(model, "size"),
        _size(model, "size_vram"),
        digest=line(digest, 80) if isinstance(digest, str) else "",
        # Came in 0.10. What it was loaded with decides nothing that could not do without.
        context=context if type(context) is int and 0 < context < _MOST_CONTEXT else None,
    )


def _size(model: dict[str, object], key: str) -> int:
    value = model.get(key)
    if type(value) is not int or not 0 <= value < _MOST_VRAM:
        raise NonsenseError(f"/api/ps gives a model whose {key} is {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value that makes no sense, short and harmless."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else line(json.dumps(value), 30)


def line(text: str, most: int) -> str:
    """A text from outside, fit to be printed on one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
