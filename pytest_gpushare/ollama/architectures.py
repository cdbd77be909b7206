"""The shape of a model, from the metadata of its GGUF file as `/api/show` gives it.

Nothing in the metadata is believed: what makes no sense is a `ShapeUnknownError` with the
reason. Which layers keep what follows llama.cpp, which is what Ollama runs since 0.30.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.text import printable

MOST_LAYERS = 1024
_MOST_HEADS = 8192
_MOST_LENGTH = 2**20
_MOST_EXPERTS = 4096
_MOST_CONTEXT = 2**27
_MOST_VOCABULARY = 2**24

# Of how many layers in a row all but the last look only through a window, where the file does
# not say; and the window, where it does not say that either.
_PERIODS = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "gptoss": 2,
    "cohere2": 4,
    "llama4": 4,
    "exaone4": 4,
    "olmo2": 4,
}
_WINDOWS = {"gemma2": 4096, "llama4": 8192}
# Files of these name a window, and llama.cpp keeps the whole context all the same.
_WINDOW_IS_IGNORED = frozenset({"phi3", "phimoe"})

_WITHOUT_CACHE = frozenset(
    {
        "bert",
        "nomic-bert",
        "nomic-bert-moe",
        "jina-bert-v2",
        "jina-bert-v3",
        "neo-bert",
        "modern-bert",
        "eurobert",
        "gemma-embedding",
        "t5encoder",
        "dream",
        "llada",
        "llada-moe",
    }
)
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_ATTENTION_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
_ATTENTION_AND_STATE = frozenset({"falcon-h1"})
_CACHING_LAYERS = {"gemma3n": 20}

_VOCABULARIES = {"gemma": 262144, "gpt-oss": 201088, "gptoss": 201088, "llama4": 202048}
_USUAL_VOCABULARY = 152064


class ShapeUnknownError(ValueError):
    """The metadata lacks a figure, or gives one that cannot be; the text says which."""


class Layer(NamedTuple):
    """What one layer keeps for each token: elements, not bytes."""

    keys: int
    values: int
    window: int = 0
    """Tokens that it looks back at; 0: the whole context."""


class Shape(NamedTuple):
    """What of a model decides on the VRAM that it needs beside its weights."""

    architecture: str
    layers: tuple[Layer, ...]
    """The layers that have a KV cache."""
    trained_context: int | None
    """Tokens; None where the file does not say."""
    embedding_length: int
    heads: int
    vocabulary: int
    state: int
    """Bytes of recurrent state for each sequence; 0 for a plain transformer."""
    is_embedding: bool
    """Whether it turns texts into vectors, and so gets larger batches."""
    feed_forward: int = 0
    """Elements of the widest feed-forward layer, of all the experts that compute at once
    together; 0 where the file does not say."""
    experts: int = 0
    """Experts that compute at once; 0 where there are none."""

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows of its layers, each once; empty where every layer sees the whole context."""
        return tuple(sorted({layer.window for layer in self.layers if layer.window}))


class _Metadata:
    """The figures of one architecture; each of them is checked as it is read."""

    def __init__(self, info: Mapping[str, object]) -> None:
        architecture = info.get("general.architecture")
        if not isinstance(architecture, str) or not re.fullmatch(r"[\w.-]{1,64}", architecture):
            raise ShapeUnknownError("the metadata names no architecture")
        self.architecture = architecture
        self._info = info

    def has(self, key: str) -> bool:
        return self._info.get(f"{self.architecture}.{key}") is not None

    def number(self, key: str, most: int, default: int | None = None, low: int = 0) -> int:
        name = f"{self.architecture}.{key}"
        value = self._info.get(name)
        if value is None and default is not None:
            return default
        return self._checked(name, value, low, most)

    def each(self, key: str, layers: int, most: int, default: int | None = None) -> list[int]:
        """A figure for each layer, whether the file gives one for all or a list."""
        name = f"{self.architecture}.{key}"
        value = self._info.get(name)
        if not isinstance(value, (list, tuple)):
            return [self.number(key, most, default)] * layers
        if len(value) < layers:
            raise ShapeUnknownError(f"{name} has {len(value)} entries for {layers} layers")
        return [self._checked(name, entry, 0, most) for entry in value[:layers]]

    def pattern(self, layers: int) -> int | list[bool] | None:
        """Which layers have a window: a period, or a truth value for each; None: not said."""
        name = f"{self.architecture}.attention.sliding_window_pattern"
        value = self._info.get(name)
        if not isinstance(value, (list, tuple)):
            return None if value is None else self._checked(name, value, 0, MOST_LAYERS)
        return self._flags(name, value, layers)

    def flags(self, key: str, layers: int) -> list[bool] | None:
        """A truth value for each layer; None where the file has no such list."""
        name = f"{self.architecture}.{key}"
        value = self._info.get(name)
        return self._flags(name, value, layers) if isinstance(value, (list, tuple)) else None

    @staticmethod
    def _flags(name: str, value: Sequence[object], layers: int) -> list[bool]:
        if not value or not all(type(entry) in (bool, int) for entry in value):
            raise ShapeUnknownError(f"{name} is no list of truth values")
        return [bool(value[layer % len(value)]) for layer in range(layers)]

    @staticmethod
    def _checked(name: str, value: object, low: int, most: int) -> int:
        # Go writes every number of a map as a float where it is large: 1e+06 is a whole number.
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if type(value) is not int or not low <= value <= most:
            raise ShapeUnknownError(f"{name} is {_shown(value)}")
        return value


def shape_of(info: Mapping[str, object]) -> Shape:
    """The shape that the metadata describe. Raises `ShapeUnknownError`."""
    data = _Metadata(info)
    count = data.number("block_count", MOST_LAYERS, low=1)
    embedding = data.number("embedding_length", _MOST_LENGTH, low=1)
    heads = max(data.each("attention.head_count", count, _MOST_HEADS, default=1))
    is_embedding = data.has("pooling_type")
    no_cache = (
        data.architecture in _WITHOUT_CACHE
        or info.get(f"{data.architecture}.attention.causal") is False
    )
    # Ollama's own files of embedding models based on gemma3 carry its name.
    no_cache = no_cache or (data.architecture == "gemma3" and is_embedding)
    layers = [] if no_cache else _layers(data, count, embedding)
    return Shape(
        architecture=data.architecture,
        layers=tuple(layer for layer in layers if layer is not None),
        trained_context=data.number("context_length", _MOST_CONTEXT, 0) or None,
        embedding_length=embedding,
        heads=heads,
        vocabulary=_vocabulary(data, info),
        state=_state(data, _recurrent_layers(data, layers), embedding),
        is_embedding=is_embedding or no_cache,
        feed_forward=_feed_forward(data, count),
        experts=data.number("expert_used_count", _MOST_EXPERTS, 0),
    )


def _feed_forward(data: _Metadata, count: int) -> int:
    experts = data.number("expert_used_count", _MOST_EXPERTS, 0)
    widest = max(data.each("feed_forward_length", count, _MOST_LENGTH, default=0))
    each = data.number("expert_feed_forward_length", _MOST_LENGTH, 0)
    return experts * (each or widest) if experts else widest


def _layers(data: _Metadata, count: int, embedding: int) -> list[Layer | None]:
    """What each layer keeps; None for a layer that keeps no keys and values."""
    if data.architecture in _RECURRENT:
        return [None] * count
    head_counts = data.each("attention.head_count", count, _MOST_HEADS, default=1)
    kv_heads = head_counts
    if data.has("attention.head_count_kv"):
        kv_heads = data.each("attention.head_count_kv", count, _MOST_HEADS)
    usual = embedding // (head_counts[0] or max(head_counts) or 1)
    key = data.number("attention.key_length", _MOST_LENGTH, usual)
    value = data.number("attention.value_length", _MOST_LENGTH, usual)
    key_in_window = data.number("attention.key_length_swa", _MOST_LENGTH, key)
    value_in_window = data.number("attention.value_length_swa", _MOST_LENGTH, value)
    if data.has("attention.key_length_mla"):
        # Latent attention keeps one compressed row of keys, from which values follow.
        kv_heads, value, value_in_window = [1] * count, 0, 0
    windows = _windows(data, count)
    keeps = _keeps(data, count)
    return [
        Layer(
            kv_heads[i] * (key_in_window if windows[i] else key),
            kv_heads[i] * (value_in_window if windows[i] else value),
            windows[i],
        )
        if kv_heads[i] and keeps(i)
        else None
        for i in range(count)
    ]


def _keeps(data: _Metadata, count: int) -> Callable[[int], bool]:
    """Whether a layer has a cache of its own: not where it is recurrent, or shares another's."""
    interval = _ATTENTION_INTERVALS.get(data.architecture, 1)
    interval = data.number("full_attention_interval", MOST_LAYERS, interval) or 1
    shared = data.number("attention.shared_kv_layers", MOST_LAYERS, 0)
    first = min(_CACHING_LAYERS.get(data.architecture, count), max(0, count - shared))
    recurrent = data.flags("attention.recurrent_layers", count)
    if recurrent is not None:
        return lambda layer: layer < first and not recurrent[layer]
    return lambda layer: layer < first and (layer + 1) % interval == 0


def _windows(data: _Metadata, count: int) -> list[int]:
    """Tokens of each layer's window; 0 for one that looks at the whole context."""
    architecture = data.architecture
    window = data.number("attention.sliding_window", _MOST_CONTEXT, _WINDOWS.get(architecture, 0))
    pattern = data.pattern(count)
    if pattern is None:
        pattern = _PERIODS.get(architecture)
    if not window or pattern is None or architecture in _WINDOW_IS_IGNORED:
        return [0] * count
    if isinstance(pattern, int):
        period = pattern
        pattern = [period == 0 or layer % period < period - 1 for layer in range(count)]
    return [window if has_window else 0 for has_window in pattern]


def _recurrent_layers(data: _Metadata, layers: Sequence[Layer | None]) -> int:
    if data.architecture in _ATTENTION_AND_STATE:
        return len(layers)
    return sum(layer is None for layer in layers)


def _state(data: _Metadata, layers: int, embedding: int) -> int:
    """Bytes of recurrent state for each sequence, in 32-bit floats."""
    if data.has("wkv.head_size"):
        each = embedding * (2 + data.number("wkv.head_size", _MOST_LENGTH))
    elif data.has("shortconv.l_cache"):
        each = embedding * max(0, data.number("shortconv.l_cache", _MOST_LENGTH) - 1)
    elif data.has("ssm.inner_size"):
        inner = data.number("ssm.inner_size", _MOST_LENGTH)
        state = data.number("ssm.state_size", _MOST_LENGTH, 0)
        groups = data.number("ssm.group_count", _MOST_LENGTH, 0)
        convolution = max(0, data.number("ssm.conv_kernel", _MOST_LENGTH, 0) - 1)
        each = convolution * (inner + 2 * groups * state) + state * inner
    else:
        return 0
    return 4 * layers * each


def _vocabulary(data: _Metadata, info: Mapping[str, object]) -> int:
    """Tokens that the model knows; where no list was sent, as many as its family has."""
    tokens = info.get("tokenizer.ggml.tokens")
    if type(tokens) is int and 0 < tokens <= _MOST_VOCABULARY:
        return tokens
    family = (size for name, size in _VOCABULARIES.items() if data.architecture.startswith(name))
    return data.number("vocab_size", _MOST_VOCABULARY, next(family, _USUAL_VOCABULARY), low=1)


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "a list"
    text = "missing" if value is None else repr(value)
    return printable(text, 30)
