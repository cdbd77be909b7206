"""Real models: what their files say, and what people saw them take.

The KV caches are written down here as they follow from the figures by hand, in MiB: for each
layer KV heads × (key + value) × 2 bytes a token, for q8_0 17/32 of that; a layer with a window
keeps the window and a batch (512 tokens up to a context of 4096, 1024 up to 32768, else 2048),
rounded up to 256. Contexts beyond what a model was trained for are cut to that.
"""

from __future__ import annotations

from typing import NamedTuple

LLAMA_CPP, OLLAMA = "https://github.com/ggml-org/llama.cpp", "https://github.com/ollama/ollama"

CONTEXTS = (4096, 32768, 131072)


class Real(NamedTuple):
    """A model as its file describes it."""

    name: str
    file_gb: float
    """Gigabytes (10^9 bytes) of its files, as Ollama's library has them."""
    info: dict[str, object]
    f16: tuple[float, float, float]
    """MiB of KV cache at the three contexts."""
    q8_0: tuple[float, float, float]
    source: str
    """Where the figures of its file can be read."""


def info(architecture: str, **figures: object) -> dict[str, object]:
    """Metadata with the usual names; `kv`, `key` and the like are short for them."""
    short = {
        "layers": "block_count",
        "embedding": "embedding_length",
        "trained": "context_length",
        "heads": "attention.head_count",
        "kv": "attention.head_count_kv",
        "key": "attention.key_length",
        "value": "attention.value_length",
        "window": "attention.sliding_window",
        "vocabulary": "vocab_size",
    }
    named = {f"{architecture}.{short.get(k, k)}": value for k, value in figures.items()}
    return {"general.architecture": architecture, **named}


MODELS = (
    Real(
        "llama3.1:8b", 4.9,
        info("llama", layers=32, embedding=4096, trained=131072, heads=32, kv=8,
             vocabulary=128256),
        (512, 4096, 16384), (272, 2176, 8704),
        "https://github.com/utilityai/llama-cpp-rs/pull/400",
    ),
    Real(
        "llama3.2:3b", 2.0,
        info("llama", layers=28, embedding=3072, trained=131072, heads=24, kv=8, key=128,
             value=128, vocabulary=128256),
        (448, 3584, 14336), (238, 1904, 7616),
        f"{OLLAMA}/issues/7673",
    ),
    Real(
        "llama3.3:70b", 43,
        info("llama", layers=80, embedding=8192, trained=131072, heads=64, kv=8, key=128,
             value=128, vocabulary=128256),
        (1280, 10240, 40960), (680, 5440, 21760),
        f"{OLLAMA}/issues/10553",
    ),
    Real(
        "qwen2.5:7b", 4.7,
        info("qwen2", layers=28, embedding=3584, trained=32768, heads=28, kv=4),
        (224, 1792, 1792), (119, 952, 952),
        f"{OLLAMA}/issues/11388",
    ),
    Real(
        "qwen2.5:14b", 9.0,
        info("qwen2", layers=48, embedding=5120, trained=32768, heads=40, kv=8),
        (768, 6144, 6144), (408, 3264, 3264),
        "https://huggingface.co/Qwen/Qwen2.5-14B-Instruct",
    ),
    Real(
        "qwen3:32b", 20,
        info("qwen3", layers=64, embedding=5120, trained=40960, heads=64, kv=8, key=128,
             value=128),
        (1024, 8192, 10240), (544, 4352, 5440),
        f"{OLLAMA}/issues/10740",
    ),
    Real(
        "qwen3:30b-a3b", 19,
        info("qwen3moe", layers=48, embedding=2048, trained=40960, heads=32, kv=4, key=128,
             value=128, expert_count=128, expert_used_count=8),
        (384, 3072, 3840), (204, 1632, 2040),
        f"{OLLAMA}/issues/10458",
    ),
    Real(
        "gemma2:9b", 5.4,
        info("gemma2", layers=42, embedding=3584, trained=8192, heads=16, kv=8, key=256,
             value=256, window=4096),
        (1344, 2184, 2184), (714, 1160.25, 1160.25),
        f"{OLLAMA}/issues/5331",
    ),
    Real(
        "gemma2:27b", 16,
        info("gemma2", layers=46, embedding=4608, trained=8192, heads=32, kv=16, key=128,
             value=128, window=4096),
        (1472, 2392, 2392), (782, 1270.75, 1270.75),
        f"{OLLAMA}/issues/5832",
    ),
    Real(
        "gemma3:12b", 8.1,
        info("gemma3", layers=48, embedding=3840, trained=131072, heads=16, kv=8, key=256,
             value=256, window=1024),
        (736, 2688, 9152), (391, 1428, 4862),
        f"{OLLAMA}/pull/12000",
    ),
    Real(
        "gemma3:27b", 17,
        info("gemma3", layers=62, embedding=5376, trained=131072, heads=32, kv=16, key=128,
             value=128, window=1024),
        (944, 3392, 11488), (501.5, 1802, 6103),
        f"{LLAMA_CPP}/issues/14097",
    ),
    Real(
        "mistral-nemo:12b", 7.1,
        info("llama", layers=40, embedding=5120, trained=1024000, heads=32, kv=8, key=128,
             value=128, vocabulary=131072),
        (640, 5120, 20480), (340, 2720, 10880),
        f"{OLLAMA}/issues/8277",
    ),
    Real(
        "mistral-small3.1:24b", 15,
        info("mistral3", layers=40, embedding=5120, trained=131072, heads=32, kv=8, key=128,
             value=128, vocabulary=131072),
        (640, 5120, 20480), (340, 2720, 10880),
        f"{OLLAMA}/issues/10615",
    ),
    Real(
        "phi4:14b", 9.1,
        info("phi3", layers=40, embedding=5120, trained=16384, heads=40, kv=10, window=0),
        (800, 3200, 3200), (425, 1700, 1700),
        f"{OLLAMA}/issues/13552",
    ),
    Real(
        "gpt-oss:20b", 14,
        info("gpt-oss", layers=24, embedding=2880, trained=131072, heads=64, kv=8, key=64,
             value=64, window=128, expert_count=32, expert_used_count=4),
        (114, 798, 3126), (60.5625, 423.9375, 1660.6875),
        "https://github.com/ikawrakow/ik_llama.cpp/issues/822",
    ),
    Real(
        "nomic-embed-text", 0.274,
        info("nomic-bert", layers=12, embedding=768, trained=2048, heads=12, pooling_type=1),
        (0, 0, 0), (0, 0, 0),
        f"{OLLAMA}/issues/7606",
    ),
)  # fmt: skip

BY_NAME = {model.name: model for model in MODELS}

_SMALL = info("qwen2", layers=36, embedding=2048, trained=32768, heads=16, kv=2, vocabulary=151936)
_HUGE = info(
    "qwen3moe", layers=94, embedding=4096, trained=131072, heads=64, kv=4, key=128, value=128
)
_LLAMA3 = info("llama", layers=32, embedding=4096, trained=8192, heads=32, kv=8, vocabulary=128256)


class Logged(NamedTuple):
    """A figure from the log of a server that somebody published."""

    name: str
    info: dict[str, object]
    context: int
    cache_type: str
    version: str
    """Of Ollama: before 0.30 a batch has 512 tokens whatever the context."""
    mib: float
    source: str


KV_CACHES = (
    Logged("qwen2.5:3b", _SMALL, 4096, "f16", "0.5.0", 144,
           "https://github.com/SciSharp/LLamaSharp/issues/1099"),
    Logged("llama3:8b", _LLAMA3, 2048, "f16", "0.1.40", 256, f"{OLLAMA}/issues/4726"),
    Logged("llama3.3:70b", BY_NAME["llama3.3:70b"].info, 4096, "f16", "0.7.1", 1280,
           f"{OLLAMA}/issues/10553"),
    Logged("qwen3:32b", BY_NAME["qwen3:32b"].info, 8192, "f16", "0.10.0", 2048,
           f"{OLLAMA}/issues/11499"),
    Logged("qwen3:235b-a22b", _HUGE, 16384, "q8_0", "0.7.0", 1598,
           "https://github.com/ikawrakow/ik_llama.cpp/pull/370"),
    Logged("gemma3:12b", BY_NAME["gemma3:12b"].info, 2048, "f16", "0.6.5", 608,
           f"{OLLAMA}/issues/10341"),
    Logged("gemma3:12b", BY_NAME["gemma3:12b"].info, 8192, "f16", "0.11.6", 992,
           f"{OLLAMA}/pull/12000"),
    Logged("mistral-small3.1:24b", BY_NAME["mistral-small3.1:24b"].info, 131072, "f16", "0.6.8",
           20480, f"{OLLAMA}/issues/10615"),
)  # fmt: skip

BUFFERS = (
    Logged("qwen2.5:3b", _SMALL, 4096, "f16", "0.5.0", 300.75,
           "https://github.com/SciSharp/LLamaSharp/issues/1099"),
    Logged("gemma3:12b", BY_NAME["gemma3:12b"].info, 8192, "f16", "0.11.6", 519.5,
           f"{OLLAMA}/pull/12000"),
    Logged("qwen3:32b", BY_NAME["qwen3:32b"].info, 8192, "f16", "0.10.0", 1092,
           f"{OLLAMA}/issues/11499"),
)  # fmt: skip


class Reported(NamedTuple):
    """What somebody saw a model take in all."""

    name: str
    file_gb: float
    info: dict[str, object]
    context: int
    parallel: int
    version: str
    gib: float
    with_context: bool
    """Whether the figure has the CUDA context in it: those of Ollama itself have not."""
    by: str
    """What told it."""
    source: str


SUMS = (
    Reported("qwen2.5:14b", 9.0, BY_NAME["qwen2.5:14b"].info, 4096, 1, "0.9.0", 10.8, True,
             "the requirement in the project's founding write-up; context assumed", ""),
    Reported("llama3:8b", 4.66, _LLAMA3, 2048, 1, "0.1.40", 4.6, False,
             "`memory.required.full` in the log", f"{OLLAMA}/issues/4726"),
    Reported("llama3.1:8b-instruct-q8_0", 8.54, BY_NAME["llama3.1:8b"].info, 2048, 32, "0.3.3",
             22e9 / 2**30, False, "`ollama ps`: 22 GB", f"{OLLAMA}/issues/6160"),
    Reported("llama3.3:70b-instruct-q3_K_M", 34, BY_NAME["llama3.3:70b"].info, 4096, 1, "0.7.1",
             39e9 / 2**30, False, "`ollama ps`: 39 GB, on two GPUs", f"{OLLAMA}/issues/10553"),
    Reported("Qwen3-32B-Q6_K", 26.9, BY_NAME["qwen3:32b"].info, 32768, 1, "0.7.0", 36, True,
             "actual VRAM, on three GPUs", f"{OLLAMA}/issues/10740"),
    Reported("qwen3:4b-instruct-2507", 2.86,
             info("qwen3", layers=36, embedding=2560, trained=262144, heads=32, kv=8, key=128,
                  value=128), 262144, 1, "0.33.0", 40.7, False,
             "total memory required", f"{OLLAMA}/issues/15051"),
)  # fmt: skip
