"""The shapes of the models under test."""

from __future__ import annotations

from .gguf import Shape

TINY = Shape("llama", 2, 64, 128, 4, 2, 16, 320, trained=2048)
"""Answers, if with nonsense, in milliseconds."""

QWEN2 = Shape("qwen2", 36, 2048, 11008, 16, 2, 128, 151936)
LLAMA = Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256)
GEMMA3 = Shape("gemma3", 12, 2560, 10240, 8, 4, 256, 262144, window=1024)
QWEN3 = Shape("qwen3", 12, 2560, 9728, 32, 8, 128, 151936)
MIXTURE = Shape("qwen3moe", 8, 2048, 768, 32, 4, 128, 151936, experts=32, experts_used=8)
QWEN14B = Shape("qwen2", 48, 5120, 13824, 40, 8, 128, 152064)

CACHE = Shape("llama", 8, 1024, 2816, 16, 16, 64, 32000)
"""A small model with a large cache: 32 KB for each token of context. It loads in seconds."""

ZEROS = {
    "kv": CACHE,
    "q3": QWEN2,
    "l1": LLAMA,
    "g3": GEMMA3,
    "q3s": QWEN3,
    "moe": MIXTURE,
}
"""Models of zeros: loaded for their size, never asked."""
