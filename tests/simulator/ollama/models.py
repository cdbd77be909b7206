"""Models that a simulated Ollama has: what they need, and what the API tells of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sizes import Size, to_bytes

DEFAULT_CONTEXT = 4096
"""Tokens of context for which `Model.size` is meant."""

BLOBS = "/usr/share/ollama/.ollama/models/blobs"

MODIFIED_AT = "2026-08-01T10:00:00.123456789+02:00"


@dataclass(frozen=True)
class Model:
    """One model.

    name: without a tag, ``:latest`` is meant.
    size: bytes of VRAM that it needs at a context of 4096 tokens and one parallel request.
    weights: bytes of the tensors that go to the GPU; by default `size` less the KV cache and
        the graph.
    embeddings: bytes of the token embeddings, which stay in host RAM; in the file beside the
        weights, and part of the size that the server reports once a part is on the CPU.
    graph: bytes of the compute buffers.
    feed_forward: elements of the widest feed-forward layer.
    copy_of: another model of which this is a copy (`ollama cp`): one manifest, one blob.
    made_from: another model from which this was created with settings of its own: another
        manifest, the same blob. Models of one blob share one process.
    layers, heads, kv_heads, key_length, value_length, embedding_length, trained_context:
        the shape, from which the KV cache follows; the defaults are qwen2.5:14b's, but for
        a model that is no larger than four such KV caches, where they are a toy's. `kv_heads`
        may have a figure for each layer.
    window, windowed: tokens of the sliding window, and for each layer whether it has one.
    num_ctx: the context that the model's own settings ask for.
    remote: the host in the cloud on which it runs.
    info: metadata in place of what the shape says, or besides.
    """

    name: str
    size: Size
    weights: Size | None = None
    embeddings: Size = 0
    graph: Size = 0
    feed_forward: int = 13824
    copy_of: str = ""
    made_from: str = ""
    architecture: str = "qwen2"
    layers: int | None = None
    heads: int = 40
    kv_heads: int | Sequence[int] | None = None
    key_length: int = 128
    value_length: int = 128
    embedding_length: int = 5120
    trained_context: int = 32768
    parameter_size: str = "14.8B"
    quantization: str = "Q4_K_M"
    embeds: bool = False
    window: int = 0
    windowed: Sequence[bool] = ()
    num_ctx: int = 0
    remote: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight_bytes <= 0:
            raise ValueError(f"{self.name}: nothing of its size is left to the weights")

    @property
    def full_name(self) -> str:
        """The name with its tag."""
        return full_name(self.name)

    @property
    def digest(self) -> str:
        """A digest like the one of a real manifest: 64 hexadecimal digits."""
        return _hash(full_name(self.copy_of or self.name))

    @property
    def blob(self) -> str:
        """The digest of its file; models of one file share one process."""
        return _hash(full_name(self.made_from or self.copy_of or self.name) + " blob")

    @property
    def shape(self) -> tuple[int, int | Sequence[int]]:
        """(layers, KV heads)."""
        kv_of_14b = 48 * 8 * (self.key_length + self.value_length) * DEFAULT_CONTEXT * 2
        layers, kv_heads = (48, 8) if to_bytes(self.size) > 4 * kv_of_14b else (8, 1)
        return self.layers or layers, self.kv_heads or kv_heads

    @property
    def file_bytes(self) -> int:
        """Bytes of the model's file."""
        return self.weight_bytes + to_bytes(self.embeddings)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors that go to the GPU."""
        if self.weights is not None:
            return to_bytes(self.weights)
        return to_bytes(self.size) - self.kv_bytes(DEFAULT_CONTEXT) - to_bytes(self.graph)

    def kv_bytes(self, context: int) -> int:
        """Bytes of an f16 KV cache for *context* tokens; a window keeps 512 beside its own."""
        layers, kv_heads = self.shape
        heads = [kv_heads] * layers if isinstance(kv_heads, int) else kv_heads
        windowed = self.windowed or [False] * layers
        cells = [min(context, self.window + 512) if short else context for short in windowed]
        tokens = sum(count * many for count, many in zip(heads, cells, strict=True))
        return tokens * (self.key_length + self.value_length) * 2

    def need(self, context: int, parallel: int = 1) -> int:
        """Bytes of VRAM needed for *parallel* requests of *context* tokens each."""
        if self.weights is None:
            fixed = to_bytes(self.size) - self.kv_bytes(DEFAULT_CONTEXT)
        else:
            fixed = to_bytes(self.weights) + to_bytes(self.graph)
        return fixed + self.kv_bytes(context) * parallel

    def tensors(self) -> list[dict[str, Any]]:
        """The tensors of its file: the output, the embeddings where they are apart, the rest."""
        sizes = {"output.weight": 1, "token_embd.weight": to_bytes(self.embeddings)}
        left = self.weight_bytes - 1
        for layer in range(self.shape[0]):
            sizes[f"blk.{layer}.ffn_up.weight"] = each = min(left, 2**31)
            left -= each
        return [
            {"name": name, "type": "I8", "shape": [size]} for name, size in sizes.items() if size
        ]

    def details(self) -> dict[str, Any]:
        """The `details` of /api/tags, /api/ps and /api/show."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.architecture,
            "families": [self.architecture],
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization,
        }

    def tag(self) -> dict[str, Any]:
        """The entry in /api/tags."""
        return {
            "name": self.full_name,
            "model": self.full_name,
            "modified_at": MODIFIED_AT,
            "size": self.file_bytes,
            "digest": self.digest,
            "details": self.details(),
            **({"remote_host": self.remote, "remote_model": self.name} if self.remote else {}),
        }

    def show(self, *, verbose: bool) -> dict[str, Any]:
        """The answer of /api/show. Arrays are null unless *verbose*, as in the real one."""
        a = self.architecture
        layers, kv_heads = self.shape
        info: dict[str, Any] = {
            "general.architecture": a,
            "general.file_type": 15,
            "general.parameter_count": 14770033664,
            f"{a}.block_count": layers,
            f"{a}.attention.head_count": self.heads,
            f"{a}.attention.head_count_kv": kv_heads,
            f"{a}.attention.key_length": self.key_length,
            f"{a}.attention.value_length": self.value_length,
            f"{a}.embedding_length": self.embedding_length,
            f"{a}.feed_forward_length": self.feed_forward,
            f"{a}.context_length": self.trained_context,
            "tokenizer.ggml.tokens": ["a", "b"] * 76032,
        }
        if self.window:
            info[f"{a}.attention.sliding_window"] = self.window
            info[f"{a}.attention.sliding_window_pattern"] = list(self.windowed)
        info.update(self.info)
        if not verbose:
            info = {k: None if isinstance(v, (list, tuple)) else v for k, v in info.items()}
        return {
            "modelfile": f"# Modelfile\nFROM {BLOBS}/sha256-{self.blob}\n",
            "parameters": f'num_ctx    {self.num_ctx}\nstop    "x"' if self.num_ctx else "",
            "template": "{{ .Prompt }}",
            "details": self.details(),
            "model_info": info,
            "tensors": self.tensors(),
            "capabilities": ["completion"],
            "modified_at": MODIFIED_AT,
        }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def full_name(name: str) -> str:
    """Return a model's name with its tag."""
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def as_models(models: Mapping[str, Any] | list[Model]) -> dict[str, Model]:
    """Return models by full name, from Model values or a mapping of name to size or fields."""
    if isinstance(models, list):
        made = models
    else:
        made = [
            value
            if isinstance(value, Model)
            else Model(name, **(value if isinstance(value, dict) else {"size": value}))
            for name, value in models.items()
        ]
    return {model.full_name: model for model in made}
