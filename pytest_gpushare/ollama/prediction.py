"""What a model takes on the GPU: predicted from its metadata, or measured in earlier runs.

weights + KV cache + compute buffers + what its process takes beyond them. The first three are
those of the engine that Ollama runs since 0.30; older servers reserve more for the buffers.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.ollama.architectures import Shape, ShapeUnknownError, shape_of
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, ModelFacts, OllamaFacts
from pytest_gpushare.text import printable
from pytest_gpushare.units import GB, MB, MOST_VRAM, format_gb

MARGIN = 1024 * MB
"""Bytes that Ollama from 0.30 on wants to stay free on a device when it loads a model there."""

OVERHEAD = 512 * MB
"""Bytes that the process of a model takes beyond weights, cache and buffers, until they were
measured: CUDA context, libraries and their pools."""

_CELLS = 256
"""The number of cells of a cache is a multiple of this."""
_BLOCKS = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Elements of a block of a KV cache and its bytes, by the cache's type."""

_SMALLEST_IN_TABLE = 7
_TABLE = ((10, 8192 * MB), (16, 12288 * MB))
_LARGEST = 18432 * MB
"""The reservations for 7B and 14B, up to so many billions of parameters, and for more."""
_PER_BILLION, _BASE = 7 * GB // 10, GB
"""For models below 7B: bytes for each billion parameters, and beside them."""
_EMBEDDING = 2048 * MB
_EMBEDDING_NAMES = ("embed", "minilm", "bge")

_PARAMETERS = r"(?:^|[^a-z0-9.])(?:([0-9]{1,3})x)?([0-9]{1,4}(?:\.[0-9]{1,3})?)([bm])(?![a-z0-9])"


def free_needed(need: int, *, has_choice: bool) -> int:
    """Bytes that must be free on a device, so that Ollama puts all of a model there.

    A margin stays free; beside other models, or where it has several devices to choose from
    (`has_choice`), a model takes no more than 80 % of what is free.
    """
    least = need + MARGIN
    return max(least, -(-need * 5 // 4)) if has_choice else least


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
    overhead: int | None = None
    """Bytes that the process of a model takes beyond its buffers, as an earlier run measured
    them; None: not measured."""

    def key(self, digest: str, context: int) -> str:
        """Under what the size of a loaded model is kept for later runs."""
        return f"{digest[:80]} {context} x {self.parallel} {self.kv_cache_type}"

    @property
    def runs_llama_server(self) -> bool:
        """Whether it is 0.30 or newer."""
        return self._is_since(30)

    @property
    def limits_logits(self) -> bool:
        """Whether it reserves no buffer for the logits of every token of a batch."""
        return self._is_since(33)

    def _is_since(self, minor: int) -> bool:
        """Whether its version is 0.`minor` or newer; builds without a version are."""
        numbers = [int(part) for part in re.findall(r"[0-9]{1,6}", self.version or "")[:2]]
        return len(numbers) < 2 or numbers == [0, 0] or numbers >= [0, minor]


class Prediction(NamedTuple):
    """What a model will take, by its parts in bytes."""

    weights: int
    kv_cache: int
    graph: int
    context: int
    """Tokens of context for each request."""
    overhead: int = OVERHEAD
    """What its process takes beyond the first three."""
    has_window: bool = False
    """Whether a layer has a sliding window: what the server reports as `size_vram` leaves out
    one of its two caches then."""

    @property
    def buffers(self) -> int:
        """Bytes that `/api/ps` will report as `size_vram` where no layer has a window."""
        return self.weights + self.kv_cache + self.graph

    @property
    def vram(self) -> int:
        """Bytes by which a device's free VRAM will shrink."""
        return self.buffers + self.overhead


def predict(model: ModelFacts, server: Server) -> Prediction:
    """The prediction for one model. Raises `ShapeUnknownError` where its metadata do not do."""
    shape, weights = _checked(model)
    context = context_of(model.num_ctx, server, shape.trained_context)
    batch = batch_of(shape, context, server)
    found = Prediction(
        weights=weights,
        kv_cache=kv_cache_bytes(shape, context, server.parallel, server.kv_cache_type, batch),
        graph=graph_bytes(shape, context, batch, server),
        context=context,
        overhead=OVERHEAD if server.overhead is None else server.overhead,
        has_window=bool(shape.windows),
    )
    if found.vram >= MOST_VRAM:
        raise ShapeUnknownError("its metadata would need more VRAM than any GPU has")
    return found


def _checked(model: ModelFacts) -> tuple[Shape, int]:
    """The shape, and the bytes of the weights."""
    if model.info is None:
        raise ShapeUnknownError(model.problem or "/api/show gives no metadata")
    if model.tensors is None and model.file_bytes is None:
        raise ShapeUnknownError("/api/tags gives no size")
    weights = model.tensors.size if model.tensors is not None else model.file_bytes or 0
    return shape_of(model.info), weights


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


def graph_bytes(shape: Shape, context: int, batch: int, server: Server) -> int:
    """Bytes of the compute buffers, for requests of `context` tokens each.

    Measured on 0.33, to the byte: the widest feed-forward layer decides, and the mask of the
    attention grows with the context. Before, a server reserves the logits of a whole batch, and
    without "flash attention" (before 0.30, with an f16 cache) the attention of all heads.
    """
    if server.limits_logits and shape.feed_forward and not shape.is_embedding:
        wide = 3 * shape.feed_forward + (4 + shape.experts) * shape.embedding_length
        mask = 2 * batch * context
        for window in shape.windows:
            # Layers with a window have a mask of their own, and one more copy of their input.
            mask += 2 * batch * min(_padded(context), _padded(window + batch))
            wide += shape.embedding_length
        return 4 * batch * wide + mask
    tokens = context * server.parallel
    logits = 4 * batch * (shape.vocabulary + shape.embedding_length)
    if shape.is_embedding:
        logits = 4 * batch * shape.embedding_length
    if server.runs_llama_server or server.kv_cache_type != "f16":
        attention = batch * (6 * tokens + 16 * shape.embedding_length)
    else:
        attention = 4 * batch * (1 + 4 * shape.embedding_length + tokens * (1 + shape.heads))
    return max(logits, attention)


def arithmetic(model: ModelFacts, server: Server) -> Iterator[str]:
    """Each part of the prediction with what it is made from, one line each.

    Raises `ShapeUnknownError` as `predict` does.
    """
    found = predict(model, server)
    shape, _ = _checked(model)
    batch = batch_of(shape, found.context, server)
    yield f"weights {format_gb(found.weights)}: {_weights_source(model)}"
    rows = Counter(
        (min(_padded(found.context), _padded(layer.window + batch)) if layer.window
         else _padded(found.context), layer.keys + layer.values)
        for layer in shape.layers
    )  # fmt: skip
    elements, size = _BLOCKS[server.kv_cache_type]
    each = " + ".join(
        f"{count} layers × {cells} tokens × {row} elements" for (cells, row), count in rows.items()
    )
    times = f", {server.parallel} requests at once" if server.parallel > 1 else ""
    if each:
        yield (
            f"KV cache {format_gb(found.kv_cache)}: {each}, {size / elements:g} bytes each "
            f"({server.kv_cache_type}){times}"
        )
    since = "0.33" if server.limits_logits else "0.30" if server.runs_llama_server else "old"
    yield (
        f"buffers {format_gb(found.graph)}: {batch} tokens at once, feed-forward "
        f"{shape.feed_forward or 'unknown'}, embedding {shape.embedding_length} (the formula of "
        f"{f'Ollama {since} and newer' if since != 'old' else 'Ollama before 0.30'})"
    )
    source = "assumed; a run next to one loaded model measures it"
    if server.overhead is not None:
        source = "measured in an earlier run"
    yield f"process {format_gb(found.overhead)}: CUDA context and libraries, {source}"


def _weights_source(model: ModelFacts) -> str:
    tensors = model.tensors
    if tensors is None:
        return "the whole file, as /api/tags has it"
    rest = ""
    if tensors.in_host_ram:
        rest = f"; the token embeddings, {format_gb(tensors.in_host_ram)}, stay in host RAM"
    return f"{tensors.number} tensors of /api/show{rest}"


def by_name(name: str, parameter_size: str = "", file_bytes: int | None = None) -> int:
    """Bytes by the size in a model's name.

    From 7B on fixed sizes: 7B 8192 MB, 14B 12288 MB, more 18432 MB.
    Below 7B 0.7 GB for each billion parameters and 1 GB. Models for embeddings, which rarely
    name a size, get 2048 MB. Never less than a file and 2 GB, where the file is known.
    """
    billions = _billions(name.rpartition(":")[2]) or _billions(name) or _billions(parameter_size)
    if not billions:
        embeds = any(word in name.lower() for word in _EMBEDDING_NAMES)
        listed = _EMBEDDING if embeds else _TABLE[1][1]
    elif billions < _SMALLEST_IN_TABLE:
        listed = int(billions * _PER_BILLION) + _BASE
    else:
        listed = next((size for most, size in _TABLE if billions <= most), _LARGEST)
    return max(listed, file_bytes + 2 * GB if file_bytes else 0)


def _billions(text: str) -> float:
    """Parameters in billions: 14 of `14b`, 30 of `30b-a3b`, 56 of `8x7b`; 0: not said."""
    found = re.search(_PARAMETERS, text.lower())
    if found is None:
        return 0.0
    count = float(found[2]) * (int(found[1]) if found[1] else 1)
    return count if found[3] == "b" else count / 1000


_FORMAT = 2
_MOST_ENTRIES = 64
_MOST_OVERHEAD = 4 * GB


class Sighting(NamedTuple):
    """A model that an earlier run saw wholly on the GPU."""

    name: str
    vram: int
    """Bytes that its process held."""
    context: int
    """Tokens of context that it was loaded with."""
    date: str = ""
    """When, as YYYY-MM-DD."""


class KnownSizes(NamedTuple):
    """What earlier runs measured of Ollama on this host."""

    models: Mapping[str, Sighting] = MappingProxyType({})
    """Under the keys of `Server.key`."""
    overheads: Mapping[str, int] = MappingProxyType({})
    """Under the keys of `overhead_key`: bytes that a model's process takes beyond its buffers."""

    def document(self) -> dict[str, object]:
        """The sizes in builtin types, as `known_sizes` reads them."""
        return {
            "version": _FORMAT,
            "models": {key: list(model) for key, model in self.models.items()},
            "processes": dict(self.overheads),
        }


def overhead_key(device_name: str, version: str | None) -> str:
    """Under what the overhead of a process is kept: model of device and version of the server."""
    return f"{device_name[:80]}, Ollama {(version or 'unknown')[:40]}"


NOTHING_KNOWN = KnownSizes()
"""Where no earlier run measured anything."""


def known_sizes(document: object) -> KnownSizes:
    """The sizes that a document of `KnownSizes` holds; what makes no sense is left out."""
    if not isinstance(document, dict) or document.get("version") != _FORMAT:
        return KnownSizes()
    models, processes = document.get("models"), document.get("processes")
    return KnownSizes(
        {
            key: Sighting(printable(entry[0], 120), *entry[1:])
            for key, entry in (models.items() if isinstance(models, dict) else ())
            if _is_sighting(entry)
        },
        {
            key: size
            for key, size in (processes.items() if isinstance(processes, dict) else ())
            if type(size) is int and 0 <= size <= _MOST_OVERHEAD
        },
    )


def _is_sighting(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 4:
        return False
    name, vram, context, date = entry
    return (
        isinstance(name, str)
        and all(type(size) is int and 0 < size < MOST_VRAM for size in (vram, context))
        and isinstance(date, str)
        and re.fullmatch(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}", date) is not None
    )


def with_sightings(
    known: KnownSizes,
    seen: Sequence[tuple[LoadedModel, int | None]],
    ollama: OllamaFacts,
    devices: Sequence[Device],
    settings: Settings,
) -> KnownSizes:
    """What is known after a run that saw these models, each with the bytes of its process."""
    models, overheads = dict(known.models), dict(known.overheads)
    names = {device.name for device in devices}
    key = overhead_key(next(iter(names), ""), ollama.version)
    at_start = used_by(ollama.models, devices)
    for model, used in seen:
        if used is None and model.name in {each.name for each in ollama.models}:
            used = at_start
        overhead = measured_overhead(model, used, ollama.relied_on)
        if overhead is not None and len(names) == 1:
            overheads.pop(key, None)
            overheads[key] = overhead
        found = sighting(model, used, settings, ollama.relied_on, overheads.get(key, OVERHEAD))
        if found is not None:
            models.pop(found[0], None)
            models[found[0]] = found[1]
    newest = list(models.items())[-_MOST_ENTRIES:], list(overheads.items())[-_MOST_ENTRIES:]
    return KnownSizes(dict(newest[0]), dict(newest[1]))


def sighting(
    model: LoadedModel,
    used: int | None,
    settings: Settings,
    relied_on: Sequence[ModelFacts],
    overhead: int = OVERHEAD,
) -> tuple[str, Sighting] | None:
    """Key and size of a loaded model; None where what is seen does not say what it needs.

    `used` are the bytes of its process as NVML reports them; without them what the server says
    and the overhead of a process. A model that is partly on the CPU would need more than is
    seen, and a server that could not read its runner's log reports the size of the file.
    """
    if not model.digest or not model.context or not model.is_whole:
        return None
    if model.size in {m.file_bytes for m in relied_on if m.digest == model.digest}:
        return None
    # Every process has a context: one that holds no more than its model was not seen whole.
    vram = used if used is not None and used > model.size else model.size + overhead
    server = Server(
        0, parallel=settings.ollama_parallel, kv_cache_type=settings.ollama_kv_cache_type
    )
    today = time.strftime("%Y-%m-%d", time.gmtime())
    key = server.key(model.digest, model.context)
    return key, Sighting(model.name, vram, model.context, today)


def measured_overhead(
    model: LoadedModel, used: int | None, relied_on: Sequence[ModelFacts]
) -> int | None:
    """Bytes of a model's process beyond its buffers; None where that cannot be measured.

    `size_vram` leaves out a cache where layers have a window, so that only a model whose
    metadata are known to have none says what a process takes.
    """
    info = next((m.info for m in relied_on if m.digest == model.digest and m.info), None)
    if used is None or info is None or not model.is_whole or not model.digest:
        return None
    try:
        if shape_of(info).windows:
            return None
    except ShapeUnknownError:
        return None
    return used - model.size if 0 < used - model.size <= _MOST_OVERHEAD else None


def used_by(models: Sequence[LoadedModel], devices: Sequence[Device]) -> int | None:
    """Bytes that NVML reports for the process of the only loaded model; None where it does not."""
    sizes = [p.used for d in devices for p in d.processes or () if p.neighbour == OLLAMA]
    if len(models) != 1 or not sizes or None in sizes:
        return None
    return sum(size for size in sizes if size is not None)
