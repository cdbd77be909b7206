"""What Ollama says of itself: two bounded questions, in which nothing is believed.

httpx is imported here alone, and this module only when a server is asked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import httpx

from pytest_gpushare.probe.address import Address
from pytest_gpushare.probe.facts import LoadedModel, OllamaFacts
from pytest_gpushare.probe.host import is_own_address
from pytest_gpushare.units import MB

MOST_BYTES = MB
"""The largest answer that is read."""

_MOST_VRAM = 2**50
_MOST_MODELS = 256


class _Nonsense(Exception):
    """An answer that an Ollama server would not give; the text says what was odd."""


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
    opened: Callable[[httpx.Client], object] = lambda _: None,
) -> OllamaFacts:
    """Ask for version and loaded models; `timeout` seconds for both together, then give up.

    Never raises. `opened` is given the client: a head that drips defeats every limit on single
    reads, and closing the client from outside is what ends it.
    """
    deadline = time.monotonic() + timeout
    try:
        on_this_host = is_own_address(address.host)
        # Without verification no certificate store is loaded, which costs 50 to 90 ms; without
        # trust in the environment no proxy and no .netrc comes between. Plain http needs neither.
        with httpx.Client(
            base_url=address.url,
            verify=address.scheme == "https",
            trust_env=False,
            follow_redirects=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "pytest-gpushare"},
        ) as client:
            opened(client)
            return _ask(client, address, deadline, timeout, on_this_host)
    except Exception as error:
        return unanswered(address, _line(f"cannot be asked: {type(error).__name__}: {error}", 200))


def _ask(
    client: httpx.Client, address: Address, deadline: float, timeout: float, on_this_host: bool
) -> OllamaFacts:
    version: str | None = None
    models: tuple[LoadedModel, ...] = ()
    problem = ""
    reachable = answered = False
    try:
        answer, peer = _get(client, "/api/version", deadline)
        # A name that this machine has in its hosts file is known by where it leads.
        on_this_host = on_this_host or (peer is not None and is_own_address(peer))
        version = _version(answer)
        reachable = True
        models = _models(_get(client, "/api/ps", deadline)[0])
        answered = True
    except _Nonsense as odd:
        reachable, problem = True, f"reachable but answers nonsense: {odd}"
    except httpx.TimeoutException:
        problem = f"no answer within {timeout:g} s"
    except httpx.ConnectError as error:
        refused = "refused" in str(error).lower() or "10061" in str(error)
        problem = "nothing listens there" if refused else _line(f"cannot be reached: {error}", 200)
    except httpx.HTTPError as error:
        reachable = True
        problem = _line(f"reachable but answers nonsense: {type(error).__name__}: {error}", 200)
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


def _get(client: httpx.Client, path: str, deadline: float) -> tuple[object, str | None]:
    """The decoded answer, and the address that gave it where the connection tells."""

    def left() -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise httpx.ReadTimeout("out of time")
        return seconds

    with client.stream("GET", path, timeout=left()) as response:
        if response.status_code != 200:
            raise _Nonsense(f"{path} gives status {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _Nonsense(f"{path} gives a compressed answer that was not asked for")
        stream = response.extensions.get("network_stream")
        peer = stream.get_extra_info("server_addr") if stream is not None else None
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MOST_BYTES:
                raise _Nonsense(f"{path} gives more than {MOST_BYTES // MB} MB")
            left()
    try:
        return json.loads(bytes(body)), peer[0] if isinstance(peer, tuple) else None
    except (ValueError, RecursionError):
        raise _Nonsense(f"{path} gives no JSON") from None


def _version(answer: object) -> str | None:
    version = answer.get("version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise _Nonsense("/api/version gives no version")
    return _line(version, 40)


def _models(answer: object) -> tuple[LoadedModel, ...]:
    models = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(models, list) or len(models) > _MOST_MODELS:
        raise _Nonsense("/api/ps gives no list of models")
    return tuple(_model(model) for model in models)


def _model(model: object) -> LoadedModel:
    if not isinstance(model, dict):
        raise _Nonsense("/api/ps gives a model that is no object")
    # `model` came in 0.1.42; older servers have `name` alone.
    name = model.get("name") or model.get("model")
    if not isinstance(name, str):
        raise _Nonsense("/api/ps gives a model without a name")
    return LoadedModel(_line(name, 120), _size(model, "size"), _size(model, "size_vram"))


def _size(model: dict[str, object], key: str) -> int:
    value = model.get(key)
    if type(value) is not int or not 0 <= value < _MOST_VRAM:
        raise _Nonsense(f"/api/ps gives a model whose {key} is {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value that makes no sense, short and harmless."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else _line(json.dumps(value), 30)


def _line(text: str, most: int) -> str:
    """A text from outside, fit to be printed on one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
