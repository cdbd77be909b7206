"""What Ollama says of the models that a run relies on. Imported only where some are named.

`/api/tags` once; `/api/show` for each model, and a second time with `verbose` only where the
first answer holds back a list that decides: the lists of tokens that come with it make
megabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from pytest_gpushare.probe.address import Address
from pytest_gpushare.probe.exchange import (
    Connection,
    NonsenseError,
    StatusError,
    UnreachableError,
    connect,
)
from pytest_gpushare.probe.facts import ModelFacts, full_name
from pytest_gpushare.probe.ollama import line
from pytest_gpushare.units import MB

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
                found[name] = _model(connection, name, listed.get(full_name(name)), deadline)
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
    answer = _decoded("/api/tags", connection.get("/api/tags", deadline).body)
    models = answer.get("models")
    if not isinstance(models, list):
        raise NonsenseError("/api/tags gives no list of models")
    return {
        full_name(name): model
        for model in models
        if isinstance(model, dict) and isinstance(name := model.get("name"), str)
    }


def _model(
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
        return _shown(connection, listed, deadline)
    except StatusError as error:
        return listed._replace(problem=str(error))
    except NonsenseError as error:
        return listed._replace(problem=line(str(error), 200))


def _shown(connection: Connection, model: ModelFacts, deadline: float) -> ModelFacts:
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
    return _decoded("/api/show", answer.body)


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


def _decoded(path: str, body: bytes) -> Mapping[str, object]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise NonsenseError(f"{path} gives no JSON") from None
    if not isinstance(answer, dict):
        raise NonsenseError(f"{path} gives no object")
    return answer
