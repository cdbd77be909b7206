"""What a model will take on the GPU when Ollama loads it: predicted from what Ollama says of it.

weights + KV cache + compute buffers + a CUDA context. The cache is exact, as llama.cpp
allocates it; the weights are the whole file, of which Ollama may leave the token embeddings
in host RAM; the buffers are what the graph needs at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.ollama.architectures import Shape, ShapeUnknownError, shape_of
from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, OllamaFacts, full_name
from pytest_gpushare.units import GB, MB, MOST_VRAM

MARGIN = 1024 * MB
"""Bytes that Ollama from 0.30 on wants to stay free on a device when it loads a model there."""

SHARE = (4, 5)
"""Of a device's free VRAM, what a model may take where Ollama has several devices to choose."""

CUDA_CONTEXT = 512 * MB
"""Bytes that the process of a model takes beside its buffers: CUDA context and libraries."""

_CELLS = 256
"""The number of cells of a cache is a multiple of this."""
_BLOCKS = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Elements of a block of a KV cache and its bytes, by the cache's type."""

_TABLE = ((10, 8192 * MB), (16, 12288 * MB))
_LARGEST = 18432 * MB
_EMBEDDING = 2048 * MB
_EMBEDDING_NAMES = ("embed", "minilm", "bge")
"""The founding write-up's reservations: 7B, 14B, and 34B or more."""

_PARAMETERS = re.compile(
    r"(?:^|[^a-z0-9.])(?:([0-9]{1,3})x)?([0-9]{1,4}(?:\.[0-9]{1,3})?)([bm])(?![a-z0-9])", re.ASCII
)


class Server(NamedTuple):
    """How the server is set up, as far as it is known."""

    total_vram: int
    """Bytes of VRAM of all the devices that it uses."""
    version: str | None = None
    context: int | None = None
    """Tokens of context where a model names none; None: chosen by the total VRAM."""
    parallel: int = 1
    """Requests at once per model."""
    kv_cache_type: str = "f16"

    def key(self, digest: str, context: int) -> str:
        """Under what the size of a loaded model is kept for later runs."""
        return f"{digest[:80]} {context} x {self.parallel} {self.kv_cache_type}"

    @property
    def runs_llama_server(self) -> bool:
        """Whether it is 0.30 or newer; builds without a version are taken to be."""
        numbers = [int(part) for part in re.findall(r"[0-9]{1,6}", self.version or "")[:2]]
        return len(numbers) < 2 or numbers == [0, 0] or numbers >= [0, 30]


class Prediction(NamedTuple):
    """What a model will take, by its parts in bytes."""

    weights: int
    kv_cache: int
    graph: int
    context: int
    """Tokens of context for each request."""
    cuda_context: int = CUDA_CONTEXT

    @property
    def buffers(self) -> int:
        """Bytes that `/api/ps` will tell as `size_vram`: the CUDA context is not among them."""
        return self.weights + self.kv_cache + self.graph

    @property
    def vram(self) -> int:
        """Bytes by which a device's free VRAM will shrink."""
        return self.buffers + self.cuda_context


def predict(model: ModelFacts, server: Server) -> Prediction:
    """The prediction for one model. Raises `ShapeUnknownError` where its metadata do not do."""
    if model.info is None:
        raise ShapeUnknownError(model.problem or "/api/show gives no metadata")
    if model.file_bytes is None:
        raise ShapeUnknownError("/api/tags gives no size")
    shape = shape_of(model.info)
    context = context_of(model.num_ctx, server, shape.trained_context)
    batch = batch_of(shape, context, server)
    found = Prediction(
        weights=model.file_bytes,
        kv_cache=kv_cache_bytes(shape, context, server.parallel, server.kv_cache_type, batch),
        graph=graph_bytes(shape, context * server.parallel, batch, server),
        context=context,
    )
    if found.vram >= MOST_VRAM:
        raise ShapeUnknownError("its metadata would need more VRAM than any GPU has")
    return found


def context_of(num_ctx: int | None, server: Server, trained: int | None = None) -> int:
    """Tokens of context that Ollama gives a model: what the model's own settings say, else the
    server's, else by the total VRAM; never more than the model was trained for."""
    wanted = num_ctx or server.context or _context_by_vram(server.total_vram)
    return min(wanted, trained or wanted)


def _context_by_vram(total: int) -> int:
    if total >= 47 * GB:
        return 262144
    return 32768 if total >= 23 * GB else 4096


def batch_of(shape: Shape, context: int, server: Server) -> int:
    """Tokens that are computed at once. From 0.30 on more for long contexts, if there is VRAM."""
    if shape.is_embedding:
        return min(2048, context)
    tokens = context * server.parallel
    if not server.runs_llama_server or tokens <= 4096:
        return 512
    return 1024 if tokens <= 32768 else 2048


def kv_cache_bytes(shape: Shape, context: int, parallel: int, cache_type: str, batch: int) -> int:
    """Bytes of the KV cache, and of recurrent state where the model has that.

    Each request has its own cells: one for each token of the context, or in a layer with a
    window as many as the window and a batch.
    """
    cells = _padded(context)
    total = 0
    for layer in shape.layers:
        each = min(cells, layer.window + batch) if layer.window else cells
        total += _padded(each) * (_row(layer.keys, cache_type) + _row(layer.values, cache_type))
    return (total + shape.state) * parallel


def _padded(cells: int) -> int:
    return -(-cells // _CELLS) * _CELLS


def _row(elements: int, cache_type: str) -> int:
    each, size = _BLOCKS[cache_type]
    return -(-elements // each) * size


def graph_bytes(shape: Shape, tokens: int, batch: int, server: Server) -> int:
    """Bytes of the compute buffers at most: of the logits or of the attention, whichever is more.

    From 0.30 on, and with a quantized cache, attention is computed in one piece ("flash
    attention") and only its mask grows with the context.
    """
    logits = 4 * batch * (shape.vocabulary + shape.embedding_length)
    if shape.is_embedding:
        logits = 4 * batch * shape.embedding_length
    if server.runs_llama_server or server.kv_cache_type != "f16":
        attention = batch * (6 * tokens + 16 * shape.embedding_length)
    else:
        attention = 4 * batch * (1 + 4 * shape.embedding_length + tokens * (1 + shape.heads))
    return max(logits, attention)


def by_name(name: str, parameter_size: str = "", file_bytes: int | None = None) -> int:
    """Bytes by the size in a model's name, as the founding write-up has them: 7B 8192 MB,
    14B 12288 MB, more 18432 MB. Models for embeddings, which rarely name a size, get 2048 MB.
    Never less than a file and 2 GB beside it, where it is known."""
    billions = _billions(name.rpartition(":")[2]) or _billions(name) or _billions(parameter_size)
    listed = next((size for most, size in _TABLE if billions <= most), _LARGEST)
    if not billions:
        embeds = any(word in name.lower() for word in _EMBEDDING_NAMES)
        listed = _EMBEDDING if embeds else _TABLE[1][1]
    return max(listed, (file_bytes or 0) + 2 * GB if file_bytes else 0)


def _billions(text: str) -> float:
    """Parameters in billions: 14 of `14b`, 30 of `30b-a3b`, 56 of `8x7b`; 0: not said."""
    found = _PARAMETERS.search(text.lower())
    if found is None:
        return 0.0
    count = float(found[2]) * (int(found[1]) if found[1] else 1)
    return count if found[3] == "b" else count / 1000


class Source(str, Enum):
    """Where a figure comes from, in the words of the output."""

    LOADED = "loaded"
    SEEN = "seen in an earlier run"
    PREDICTED = "predicted"
    NAME = "by the size in its name"
    CLOUD = "runs in the cloud"


@dataclass(frozen=True)
class ModelNeed:
    """What one model needs."""

    name: str
    vram: int
    """Bytes that have to be free, or held by it, so that it is wholly on the GPU."""
    source: Source
    reason: str = ""
    """Why there is nothing better than its name to go by."""
    prediction: Prediction | None = None
    """What was predicted, whether or not something better was found."""
    missing: int = 0
    """Bytes of a loaded model that are not on the GPU."""

    @property
    def difference(self) -> int | None:
        """Bytes by which the model takes more than predicted; None where one is not known."""
        if self.prediction is None or self.source not in (Source.LOADED, Source.SEEN):
            return None
        if self.source is Source.LOADED:
            return self.vram - self.prediction.buffers
        return self.vram - self.prediction.vram


@dataclass(frozen=True)
class Demand:
    """What all the models together need."""

    needs: tuple[ModelNeed, ...] = ()
    asked: bool = True
    """Whether the server could be asked; if not, the figures are whole reservations."""

    @property
    def pending(self) -> int:
        """Bytes that models still have to be given: those not loaded, and what is missing."""
        return sum(
            need.missing if need.source is Source.LOADED else need.vram for need in self.needs
        )

    @property
    def margin(self) -> int:
        """Bytes that have to stay free beside a model when it is loaded."""
        return MARGIN if self.asked else 0

    def room(self, choices: int) -> int:
        """Bytes that must be free on a device, beside what Ollama holds there already.

        Where Ollama has several devices to choose from it takes no more than 80 % of what is
        free on one, so that so much more must be free.
        """
        least = self.pending + self.margin
        if choices < 2 or not self.asked:
            return least
        return max(least, -(-self.pending * SHARE[1] // SHARE[0]))

    def document(self) -> list[dict[str, object]]:
        """The needs in builtin types, for reports; sizes in bytes."""
        return [
            {
                "name": need.name,
                "vram_bytes": need.vram,
                "source": need.source.value,
                "predicted_bytes": need.prediction.vram if need.prediction else None,
                "difference_bytes": need.difference,
                "reason": need.reason,
            }
            for need in self.needs
        ]


def demand_of(
    names: Sequence[str], ollama: OllamaFacts, server: Server, seen: Mapping[str, int]
) -> Demand:
    """What the named models need, and what is loaded beside them.

    `seen` has the sizes of earlier runs in bytes, under the keys of `Server.key`.
    """
    if not ollama.answered:
        return Demand(
            tuple(_by_name(name, "Ollama cannot be asked") for name in names), asked=False
        )
    told = {full_name(model.name): model for model in ollama.relied_on}
    loaded = {full_name(model.name): model for model in ollama.models}
    digests = {model.digest for model in ollama.models} - {""}
    needs = [_loaded(model, told.get(name), server) for name, model in loaded.items()]
    if not ollama.on_this_host:
        # What is loaded elsewhere is not resident here, so that room for all of it is kept.
        needs = [replace(need, missing=need.vram) for need in needs]
    for name, written in {full_name(written): written for written in names}.items():
        model = told.get(name, ModelFacts(written, problem="it was not asked for"))
        if name not in loaded and model.digest not in digests:
            needs.append(_need(model, server, seen))
    return Demand(tuple(needs))


def _loaded(model: LoadedModel, told: ModelFacts | None, server: Server) -> ModelNeed:
    """What it holds; one that the run relies on wants what it lacks, too, when it is reloaded."""
    if told is None:
        return ModelNeed(model.name, model.size_vram, Source.LOADED)
    # Predicted for the context that it has, so that the two figures can be compared.
    as_loaded = server._replace(context=model.context or server.context)
    return ModelNeed(
        model.name,
        max(model.size, model.size_vram),
        Source.LOADED,
        prediction=_prediction(told._replace(num_ctx=None), as_loaded),
        missing=max(0, model.size - model.size_vram),
    )


def _prediction(model: ModelFacts, server: Server) -> Prediction | None:
    try:
        return predict(model, server)
    except ShapeUnknownError:
        return None


def _need(model: ModelFacts, server: Server, seen: Mapping[str, int]) -> ModelNeed:
    if model.is_remote:
        return ModelNeed(model.name, 0, Source.CLOUD)
    reason, prediction = "", None
    try:
        prediction = predict(model, server)
    except ShapeUnknownError as error:
        reason = str(error)
    context = prediction.context if prediction else context_of(model.num_ctx, server)
    known = seen.get(server.key(model.digest, context)) if model.digest else None
    if known is not None:
        return ModelNeed(model.name, known, Source.SEEN, prediction=prediction)
    if prediction is None:
        return _by_name(model.name, reason, model)
    return ModelNeed(model.name, prediction.vram, Source.PREDICTED, prediction=prediction)


def _by_name(name: str, reason: str, model: ModelFacts | None = None) -> ModelNeed:
    size = by_name(name, model.parameter_size, model.file_bytes) if model else by_name(name)
    return ModelNeed(name, size, Source.NAME, reason)
