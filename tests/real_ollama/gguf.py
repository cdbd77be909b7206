"""Models in the GGUF format: small random ones that answer, and zeros in the shapes of real ones.

A file of zeros is sparse: it takes next to nothing on disk, and in VRAM what the real one takes.
"""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

F32, Q4_K, Q6_K = 0, 12, 14
"""Types of tensors."""

_BLOCK = {F32: (1, 4), Q4_K: (256, 144), Q6_K: (256, 210)}
"""Elements and bytes of a block, by type."""

_ALIGNMENT = 32


class Shape(NamedTuple):
    """What decides how much VRAM a model takes."""

    architecture: str
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    """Elements of a head."""
    vocabulary: int
    trained: int = 131072
    """Tokens of context that it was trained for."""
    window: int = 0
    experts: int = 0
    experts_used: int = 0
    """The feed-forward length is then that of one expert."""

    @property
    def is_tied(self) -> bool:
        """Whether the token embeddings are the output, too."""
        return self.architecture == "gemma3"


class _Tensor(NamedTuple):
    name: str
    dimensions: tuple[int, ...]
    """The fastest first."""
    type: int

    @property
    def elements(self) -> int:
        count = 1
        for length in self.dimensions:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        elements, size = _BLOCK[self.type]
        return self.elements // elements * size


def write_model(path: Path, shape: Shape, seed: int | None = None) -> None:
    """Write a model: all of its weights zero, or in F32 and random where a *seed* is given."""
    tensors = list(_tensors(shape, is_random=seed is not None))
    metadata = _metadata(shape)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)) + b"".join(metadata)
    at = 0
    for tensor in tensors:
        lengths = struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions)
        head += _text(tensor.name) + struct.pack("<I", len(tensor.dimensions)) + lengths
        head += struct.pack("<IQ", tensor.type, at)
        at += _padded(tensor.bytes)
    with path.open("wb") as file:
        file.write(head.ljust(_padded(len(head)), b"\0"))
        if seed is None:
            file.truncate(_padded(len(head)) + at)
            return
        draw = random.Random(seed)
        for tensor in tensors:
            is_norm = len(tensor.dimensions) == 1
            spread = (1.0, 1.0) if is_norm else (-0.3, 0.3)
            weights = array("f", (draw.uniform(*spread) for _ in range(tensor.elements)))
            file.write(weights.tobytes().ljust(_padded(tensor.bytes), b"\0"))


def _tensors(shape: Shape, *, is_random: bool) -> Iterator[_Tensor]:
    small, large = (F32, F32) if is_random else (Q4_K, Q6_K)
    wide, narrow = shape.heads * shape.head, shape.kv_heads * shape.head
    yield _Tensor("token_embd.weight", (shape.embedding, shape.vocabulary), small)
    yield _Tensor("output_norm.weight", (shape.embedding,), F32)
    if not shape.is_tied:
        yield _Tensor("output.weight", (shape.embedding, shape.vocabulary), large)
    for number in range(shape.layers):
        for name, dimensions, kind in (
            ("attn_norm", (shape.embedding,), F32),
            ("ffn_norm", (shape.embedding,), F32),
            ("attn_q", (shape.embedding, wide), small),
            ("attn_k", (shape.embedding, narrow), small),
            ("attn_v", (shape.embedding, narrow), large),
            ("attn_output", (wide, shape.embedding), small),
            *_extras(shape),
            *_feed_forward(shape, small, large),
        ):
            suffix = "" if name.endswith(".bias") else ".weight"
            yield _Tensor(f"blk.{number}.{name}{suffix}", dimensions, kind)


def _extras(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], int]]:
    if shape.architecture == "qwen2":
        yield "attn_q.bias", (shape.heads * shape.head,), F32
        yield "attn_k.bias", (shape.kv_heads * shape.head,), F32
        yield "attn_v.bias", (shape.kv_heads * shape.head,), F32
    if shape.architecture in ("qwen3", "qwen3moe", "gemma3"):
        yield "attn_q_norm", (shape.head,), F32
        yield "attn_k_norm", (shape.head,), F32
    if shape.architecture == "gemma3":
        yield "post_attention_norm", (shape.embedding,), F32
        yield "post_ffw_norm", (shape.embedding,), F32


def _feed_forward(
    shape: Shape, small: int, large: int
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    inward, outward = (shape.embedding, shape.feed_forward), (shape.feed_forward, shape.embedding)
    if shape.experts:
        yield "ffn_gate_inp", (shape.embedding, shape.experts), F32
        yield "ffn_gate_exps", (*inward, shape.experts), small
        yield "ffn_up_exps", (*inward, shape.experts), small
        yield "ffn_down_exps", (*outward, shape.experts), large
        return
    yield "ffn_gate", inward, small
    yield "ffn_up", inward, small
    yield "ffn_down", outward, large


def _metadata(shape: Shape) -> list[bytes]:
    name = shape.architecture
    whole = {
        "context_length": shape.trained,
        "embedding_length": shape.embedding,
        "block_count": shape.layers,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head,
        "attention.value_length": shape.head,
        "attention.sliding_window": shape.window,
        "expert_count": shape.experts,
        "expert_used_count": shape.experts_used,
        "expert_feed_forward_length": shape.feed_forward if shape.experts else 0,
    }
    tokens = _tokens(shape.vocabulary)
    # Bytes that are no ASCII are control tokens: a random model would answer with broken UTF-8.
    plain = [1 if byte == 10 or 32 <= byte < 127 else 3 for byte in range(256)]
    kinds = [*plain, 3, 3] + [1] * (shape.vocabulary - 258)
    return [
        _entry("general.architecture", name),
        _entry("general.file_type", 15),
        *(_entry(f"{name}.{key}", value) for key, value in whole.items() if value),
        _entry(f"{name}.attention.layer_norm_rms_epsilon", 1e-6),
        _entry(f"{name}.rope.freq_base", 1e6),
        _entry("tokenizer.ggml.model", "gpt2"),
        _entry("tokenizer.ggml.pre", "default"),
        _list("tokenizer.ggml.tokens", 8, b"".join(map(_text, tokens)), len(tokens)),
        _list("tokenizer.ggml.token_type", 5, array("i", kinds).tobytes(), len(kinds)),
        _list("tokenizer.ggml.merges", 8, _text("a b") + _text("c d"), 2),
        _entry("tokenizer.ggml.bos_token_id", 256),
        _entry("tokenizer.ggml.eos_token_id", 257),
    ]


def _tokens(count: int) -> list[str]:
    """The bytes as GPT-2 writes them, two special tokens, two pairs, and names."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokens = [*letters, "<s>", "</s>", "ab", "cd"]
    return tokens + [f"<x{number}>" for number in range(len(tokens), count)]


def _entry(key: str, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", 8) + _text(value)
    kind, form = (4, "I") if isinstance(value, int) else (6, "f")
    return _text(key) + struct.pack(f"<I{form}", kind, value)


def _list(key: str, kind: int, content: bytes, length: int) -> bytes:
    return _text(key) + struct.pack("<IIQ", 9, kind, length) + content


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
