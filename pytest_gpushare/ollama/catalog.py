"""What Ollama says of the models that a run relies on. Imported only where some are named.

`/api/tags` once; `/api/show` for each model, and a second time with `verbose` only where the
first answer holds back a list that decides: the lists of tokens that come with it make
megabytes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence

from pytest_gpushare.gpu.host import is_own_address
from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.client import (
    Answer,
    Connection,
    NonsenseError,
    StatusError,
    UnreachableError,
    connect,
)
from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, OllamaFacts, full_name
from pytest_gpushare.text import printable
from pytest_gpushare.units import MB, MOST_VRAM

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

    Never raises. `opened` is given the connection, so that another thread can hang up.
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
    return answer.decoded(), answer.peer


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
    if type(value) is not int or not 0 <= value < MOST_VRAM:
        raise NonsenseError(f"/api/ps gives a model whose {key} is {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value that makes no sense, short and harmless."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return "null" if value is None else line(json.dumps(value), 30)


def line(text: str, most: int) -> str:
    """A text from outside, fit to be printed on one line of a terminal."""
    return printable(text, most)


_MOST_VERBOSE = 64 * MB
_MOST_KEYS = 1024
_MOST_ENTRIES = 4096
_MOST_BYTES = 2**50
# Lists that may stand in place of one figure for all layers; without `verbose` they are null.
_PER_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
)


def ask_models(
    address: Address,
    names: Sequence[str],
    deadline: float,
    opened: Callable[[Connection], object],
) -> tuple[ModelFacts, ...]:
    """What the server says of each; at most two requests for each, and one for all.

    Never raises; `deadline` is on the monotonic clock. What could not be asked has the reason
    in its `problem`.
    """
    found: dict[str, ModelFacts] = {}
    problem = ""
    try:
        connection = connect(address, opened)
        try:
            listed = _listed(connection, deadline)
            for name in names:
                found[name] = _model_facts(connection, name, listed.get(full_name(name)), deadline)
        finally:
            connection.close()
    except TimeoutError:
        problem = "no answer in time: raise gpu_share_ollama_timeout_s"
    except (NonsenseError, UnreachableError) as error:
        problem = line(str(error) or "nothing listens there", 200)
    except Exception as error:
        problem = line(f"{type(error).__name__}: {error}", 200)
    return tuple(found.get(name) or ModelFacts(name, problem=problem) for name in names)


def _listed(connection: Connection, deadline: float) -> Mapping[str, Mapping[str, object]]:
    answer = _decoded(connection.get("/api/tags", deadline))
    models = answer.get("models")
    if not isinstance(models, list):
        raise NonsenseError("/api/tags gives no list of models")
    return {
        full_name(name): model
        for model in models
        if isinstance(model, dict) and isinstance(name := model.get("name"), str)
    }


def _model_facts(
    connection: Connection, name: str, tag: Mapping[str, object] | None, deadline: float
) -> ModelFacts:
    if tag is None:
        return ModelFacts(name, problem=f"the server does not have it: ollama pull {name}")
    size, digest, details = tag.get("size"), tag.get("digest"), tag.get("details")
    parameters = details.get("parameter_size") if isinstance(details, dict) else None
    listed = ModelFacts(
        name,
        digest=line(digest, 80) if isinstance(digest, str) else "",
        file_bytes=size if type(size) is int and 0 < size < _MOST_BYTES else None,
        parameter_size=line(parameters, 40) if isinstance(parameters, str) else "",
    )
    if tag.get("remote_host") or tag.get("remote_model"):
        return listed._replace(is_remote=True)
    try:
        return _with_metadata(connection, listed, deadline)
    except StatusError as error:
        return listed._replace(problem=str(error))
    except NonsenseError as error:
        return listed._replace(problem=line(str(error), 200))


def _with_metadata(connection: Connection, model: ModelFacts, deadline: float) -> ModelFacts:
    answer = _show(connection, model.name, False, deadline)
    if answer.get("remote_host") or answer.get("remote_model"):
        return model._replace(is_remote=True)
    num_ctx = _num_ctx(answer.get("parameters"))
    if _holds_back(answer):
        answer = _show(connection, model.name, True, deadline)
    info = answer.get("model_info")
    if not isinstance(info, dict) or not info:
        raise NonsenseError("/api/show gives no metadata")
    return model._replace(num_ctx=num_ctx, info=_relevant(info))


def _show(
    connection: Connection, name: str, verbose: bool, deadline: float
) -> Mapping[str, object]:
    body: dict[str, object] = {"model": name}
    if verbose:
        body["verbose"] = True
    answer = connection.post("/api/show", json.dumps(body).encode(), deadline, _MOST_VERBOSE)
    return _decoded(answer)


def _holds_back(answer: Mapping[str, object]) -> bool:
    """Whether a list that decides was left out."""
    info = answer.get("model_info")
    if not isinstance(info, dict):
        return False
    architecture = info.get("general.architecture")
    names = [f"{architecture}.{key}" for key in _PER_LAYER]
    return any(name in info and info[name] is None for name in names)


def _relevant(info: Mapping[str, object]) -> dict[str, object]:
    """The metadata of the architecture, and of the tokens only how many there are."""
    architecture = info.get("general.architecture")
    kept: dict[str, object] = {"general.architecture": architecture}
    for key, value in list(info.items())[:_MOST_KEYS]:
        if isinstance(architecture, str) and key.startswith(f"{architecture}."):
            kept[key] = tuple(value[:_MOST_ENTRIES]) if isinstance(value, list) else value
    tokens = info.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        kept["tokenizer.ggml.tokens"] = len(tokens)
    return kept


def _num_ctx(parameters: object) -> int | None:
    """Tokens of context in the settings of the model itself, such as `num_ctx    8192`."""
    text = parameters[:65536] if isinstance(parameters, str) else ""
    found = re.search(r"^\s*num_ctx\s+([0-9]{1,9})\s*$", text, re.MULTILINE | re.ASCII)
    return (int(found[1]) or None) if found else None


def _decoded(answer: Answer) -> Mapping[str, object]:
    value = answer.decoded()
    if not isinstance(value, dict):
        raise NonsenseError(f"{answer.path} gives no object")
    return value
