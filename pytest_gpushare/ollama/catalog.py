"""What Ollama says of the models that a run relies on. Imported only where some are named.

`/api/tags` once; `/api/show` for each model, and a second time with `verbose` only where the
first answer holds back a list that decides: the lists of tokens that come with it make
megabytes.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.gpu.host import is_own_address
from pytest_gpushare.ollama.address import Address
from pytest_gpushare.ollama.client import (
    Connection,
    NonsenseError,
    Response,
    StatusError,
    UnreachableError,
    connect,
)
from pytest_gpushare.ollama.models import (
    LoadedModel,
    ModelFacts,
    OllamaFacts,
    Tensors,
    full_name,
)
from pytest_gpushare.text import printable
from pytest_gpushare.units import MB, MOST_VRAM

_MOST_MODELS = 256
_LONGEST_NAME = 256


_MOST_CONTEXT = 2**27


NOTHING_LISTENS = "nothing listens there"


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
        reason = f"cannot be asked: {type(error).__name__}: {error}"
        return unanswered(address, printable(reason, 200))


def _ask(
    connection: Connection, address: Address, deadline: float, timeout: float, on_this_host: bool
) -> OllamaFacts:
    version: str | None = None
    answer = Loaded()
    problem = ""
    reachable = answered = False
    try:
        given, peer = _get(connection, "/api/version", deadline)
        # A name that this machine has in its hosts file is known by where it leads.
        on_this_host = on_this_host or (peer is not None and is_own_address(peer))
        version = _version(given)
        reachable = True
        answer = loaded_models(connection, deadline)
        answered = True
    except NonsenseError as odd:
        reachable, problem = True, printable(f"reachable but answers nonsense: {odd}", 200)
    except TimeoutError:
        problem = f"no answer within {timeout:g} s"
    except UnreachableError as error:
        reason = str(error)
        problem = f"cannot be reached: {printable(reason, 180)}" if reason else NOTHING_LISTENS
    if problem and address.problem:
        problem = f"{problem} ({address.problem})"
    return OllamaFacts(
        address=address.shown,
        asked=True,
        answered=answered,
        version=version,
        models=answer.models,
        odd=answer.odd,
        problem=problem,
        reachable=reachable,
        on_this_host=on_this_host,
    )


class Loaded(NamedTuple):
    """The checked answer of `/api/ps`."""

    models: tuple[LoadedModel, ...] = ()
    odd: tuple[str, ...] = ()
    """Entries that make no sense, one phrase each; they are left out."""


def loaded_models(connection: Connection, deadline: float) -> Loaded:
    """The models that the server holds now, as far as the answer makes sense.

    Raises `TimeoutError`, `UnreachableError` or `NonsenseError`.
    """
    return _models(_get(connection, "/api/ps", deadline)[0])


def _get(connection: Connection, path: str, deadline: float) -> tuple[object, str | None]:
    """The decoded answer, and the address that gave it, where the connection knows it."""
    answer = connection.get(path, deadline)
    return answer.decoded(), answer.peer


def _version(answer: object) -> str | None:
    version = answer.get("version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise NonsenseError("/api/version gives no version")
    return printable(version, 40)


def _models(answer: object) -> Loaded:
    entries = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or len(entries) > _MOST_MODELS:
        raise NonsenseError("/api/ps gives no list of models")
    models, odd = [], []
    for entry in entries:
        try:
            models.append(_model(entry))
        except NonsenseError as error:
            odd.append(str(error))
    if odd and not models:
        raise NonsenseError(odd[0])
    return Loaded(tuple(models), tuple(dict.fromkeys(odd)))


def _model(model: object) -> LoadedModel:
    if not isinstance(model, dict):
        raise NonsenseError("/api/ps gives a model that is no object")
    # `model` came in 0.1.42; older servers have `name` alone.
    name = model.get("name") or model.get("model")
    if not isinstance(name, str):
        raise NonsenseError("/api/ps gives a model without a name")
    size = _size(model, "size")
    on_gpu = _size(model, "size_vram") if model.get("size_vram") is not None else None
    digest, context = model.get("digest"), model.get("context_length")
    expires = model.get("expires_at")
    return LoadedModel(
        printable(name, 120),
        size,
        # More than all of it cannot be on GPUs: how much is there is unknown.
        on_gpu if on_gpu is None or on_gpu <= size else None,
        digest=printable(digest, 80) if isinstance(digest, str) else "",
        # Came in 0.10. What it was loaded with decides nothing that could not do without.
        context=context if type(context) is int and 0 < context < _MOST_CONTEXT else None,
        expires_at=printable(expires, 40) if isinstance(expires, str) else "",
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
    return "null" if value is None else printable(json.dumps(value), 30)


_MOST_VERBOSE = 64 * MB
_MOST_KEYS = 1024
_MOST_ENTRIES = 4096
_MOST_BYTES = 2**50
# Lists that may stand in place of one figure for all layers; without `verbose` they are null.
_PER_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "attention.recurrent_layers",
    "feed_forward_length",
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
        problem = printable(str(error) or NOTHING_LISTENS, 200)
    except Exception as error:
        problem = printable(f"{type(error).__name__}: {error}", 200)
    return tuple(found.get(name) or ModelFacts(name, problem=problem) for name in names)


def names_of(address: Address, timeout: float) -> tuple[str, ...]:
    """The full names of the models that the server has. Never raises; empty where it is unknown."""
    try:
        connection = connect(address, lambda _: None)
        try:
            found = _listed(connection, time.monotonic() + timeout)
        finally:
            connection.close()
    except Exception:
        return ()
    return tuple(printable(name, _LONGEST_NAME) for name in found)[:_MOST_MODELS]


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
        return ModelFacts(
            name, problem=f"the server does not have it: ollama pull {name}", is_missing=True
        )
    size, digest, details = tag.get("size"), tag.get("digest"), tag.get("details")
    parameters = details.get("parameter_size") if isinstance(details, dict) else None
    listed = ModelFacts(
        name,
        digest=printable(digest, 80) if isinstance(digest, str) else "",
        file_bytes=size if type(size) is int and 0 < size < _MOST_BYTES else None,
        parameter_size=printable(parameters, 40) if isinstance(parameters, str) else "",
    )
    if tag.get("remote_host") or tag.get("remote_model"):
        return listed._replace(is_remote=True)
    try:
        return _with_metadata(connection, listed, deadline)
    except StatusError as error:
        return listed._replace(problem=str(error))
    except NonsenseError as error:
        return listed._replace(problem=printable(str(error), 200))


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
    return model._replace(
        num_ctx=num_ctx,
        info=_relevant(info),
        tensors=tensors_of(answer.get("tensors")),
        blob=_blob(answer),
    )


def blob_of(connection: Connection, name: str, deadline: float) -> str:
    """The digest of a model's file, by `/api/show`; empty where the answer does not say.

    Raises `TimeoutError`, `UnreachableError` or `NonsenseError`.
    """
    return _blob(_show(connection, name, False, deadline))


def _blob(answer: Mapping[str, object]) -> str:
    text = answer.get("modelfile")
    text = text[:65536] if isinstance(text, str) else ""
    found = re.search(r"^FROM [^\n]*sha256[-:]([0-9a-f]{64})\s*$", text, re.MULTILINE)
    return found[1] if found else ""


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


_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
_MOST_TENSORS = 65_536
_MOST_DIMENSIONS = 8

# Elements and bytes of a block, by the type of a tensor, as ggml packs them.
_TENSOR_TYPES = {
    "F64": (1, 8), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q8_0": (32, 34), "Q8_1": (32, 36), "MXFP4": (32, 17), "IQ4_NL": (32, 18),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "Q8_K": (256, 292),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip


def tensors_of(listed: object) -> Tensors | None:
    """The sum of the tensors; None where one is of an unknown type or makes no sense."""
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_TENSORS:
        return None
    sizes: dict[str, int] = {}
    for number, tensor in enumerate(listed):
        size = _tensor_bytes(tensor) if isinstance(tensor, dict) else None
        if size is None:
            return None
        name = tensor.get("name")
        # Two of one name would be a file that no engine loads.
        sizes[name if isinstance(name, str) and name not in sizes else f" {number}"] = size
    embeddings = sizes.pop(_EMBEDDINGS, 0) if _OUTPUT in sizes else 0
    return Tensors(len(sizes), sum(sizes.values()), embeddings)


def _tensor_bytes(tensor: Mapping[str, object]) -> int | None:
    packing, shape = _TENSOR_TYPES.get(str(tensor.get("type")).upper()), tensor.get("shape")
    if packing is None or not isinstance(shape, list) or not 0 < len(shape) <= _MOST_DIMENSIONS:
        return None
    if not all(type(length) is int and 0 < length < 2**32 for length in shape):
        return None
    elements, size = packing
    total = math.prod(shape) // elements * size
    return total if total < _MOST_BYTES else None


def _num_ctx(parameters: object) -> int | None:
    """Tokens of context in the settings of the model itself, such as `num_ctx    8192`."""
    text = parameters[:65536] if isinstance(parameters, str) else ""
    found = re.search(r"^\s*num_ctx\s+([0-9]{1,9})\s*$", text, re.MULTILINE | re.ASCII)
    return (int(found[1]) or None) if found else None


def _decoded(answer: Response) -> Mapping[str, object]:
    value = answer.decoded()
    if not isinstance(value, dict):
        raise NonsenseError(f"{answer.path} gives no object")
    return value
