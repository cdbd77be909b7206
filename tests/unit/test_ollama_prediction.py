"""What models need, against real ones: KV caches to the byte, sums within 10 %."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator.ollama import OllamaServer

from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.architectures import ShapeUnknownError, shape_of
from pytest_gpushare.ollama.catalog import ask_models, tensors_of
from pytest_gpushare.ollama.models import ModelFacts
from pytest_gpushare.ollama.prediction import (
    OVERHEAD,
    Prediction,
    Server,
    arithmetic,
    by_name,
    context_of,
    predict,
)
from pytest_gpushare.units import GB, MB, format_gb

from .real_models import (
    BUFFERS,
    BY_NAME,
    CONTEXTS,
    KV_CACHES,
    MODELS,
    SUMS,
    Logged,
    Real,
    Reported,
    info,
)

PAGE = Path(__file__).parent / "golden" / "real-models.md"
NEW = "0.33.0"


def predicted(
    metadata: dict[str, object],
    context: int | None = 4096,
    cache_type: str = "f16",
    *,
    file_gb: float = 1,
    version: str | None = NEW,
    parallel: int = 1,
    total: int = 24 * GB,
) -> Prediction:
    model = ModelFacts("m", file_bytes=int(file_gb * 10**9), info=metadata)
    return predict(model, Server(total, version, context, parallel, cache_type))


# --- real models ---


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_kv_cache_of_real_models(model: Real) -> None:
    """To the byte, at three contexts and two types of cache."""
    for cache_type, expected in (("f16", model.f16), ("q8_0", model.q8_0)):
        found = [predicted(model.info, context, cache_type).kv_cache for context in CONTEXTS]
        assert found == [mib * MB for mib in expected]


@pytest.mark.parametrize("logged", KV_CACHES, ids=lambda logged: f"{logged.name}-{logged.context}")
def test_kv_cache_in_published_logs(logged: Logged) -> None:
    """To the byte what llama.cpp and Ollama logged."""
    found = predicted(logged.info, logged.context, logged.cache_type, version=logged.version)
    assert found.kv_cache == logged.mib * MB


@pytest.mark.parametrize("logged", BUFFERS, ids=lambda logged: logged.name)
def test_buffers_in_published_logs(logged: Logged) -> None:
    """Within 2 %; some to the byte."""
    found = predicted(logged.info, logged.context, version=logged.version).graph
    assert abs(found / MB - logged.mib) <= 0.02 * logged.mib


def total_of(reported: Reported) -> int:
    found = predicted(
        reported.info,
        reported.context,
        file_gb=reported.file_gb,
        version=reported.version,
        parallel=reported.parallel,
    )
    return found.vram if reported.with_context else found.buffers


@pytest.mark.parametrize("reported", SUMS, ids=lambda reported: reported.name)
def test_sum_against_reports(reported: Reported) -> None:
    """Within 10 % of what users saw."""
    assert abs(total_of(reported) / GB - reported.gib) <= 0.1 * reported.gib


def test_tables_of_real_models() -> None:
    """The page shows these figures and no others; UPDATE_GOLDEN=1 writes them."""
    text = PAGE.read_text(encoding="utf-8")
    made = text
    for name, rows in (
        ("models", list(_models())),
        ("logs", list(_logs())),
        ("sums", list(_sums())),
    ):
        start, end = f"% table {name}\n", f"% end {name}\n"
        before, _, rest = made.partition(start)
        _, _, after = rest.partition(end)
        made = before + start + "\n" + "\n".join(rows) + "\n\n" + end + after
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
        text = made
    assert text == made


def _models() -> Any:
    yield (
        "| model | layers | KV heads × length | window | file "
        "| f16: 4k, 32k, 128k | q8_0: 4k, 32k, 128k |"
    )
    yield "|---|---|---|---|---|---|---|"
    for model in MODELS:
        a = model.info["general.architecture"]
        figure = {key.removeprefix(f"{a}."): value for key, value in model.info.items()}
        heads = figure.get("attention.head_count_kv", 0)
        usual = int(str(figure["embedding_length"])) // int(str(figure["attention.head_count"]))
        length = figure.get("attention.key_length", usual)
        window = figure.get("attention.sliding_window") or "none"
        yield (
            f"| [{model.name}]({model.source}) | {figure['block_count']} | "
            f"{f'{heads} × {length}' if heads else 'no cache'} | {window} | {model.file_gb:g} GB | "
            f"{', '.join(f'{mib:.9g}' for mib in model.f16)} | "
            f"{', '.join(f'{mib:.9g}' for mib in model.q8_0)} |"
        )


def _logs() -> Any:
    yield "| model | what | context | in the log | predicted |"
    yield "|---|---|---|---|---|"
    for what, rows in (("KV cache", KV_CACHES), ("buffers", BUFFERS)):
        for row in rows:
            found = predicted(row.info, row.context, row.cache_type, version=row.version)
            size = (found.kv_cache if what == "KV cache" else found.graph) / MB
            yield (
                f"| [{row.name}]({row.source}) | {what}, {row.cache_type} | {row.context} | "
                f"{row.mib:g} MB | {size:g} MB |"
            )


def _sums() -> Any:
    yield "| model | context | reported | by | predicted | difference |"
    yield "|---|---|---|---|---|---|"
    for row in SUMS:
        name = f"[{row.name}]({row.source})" if row.source else row.name
        context = f"{row.parallel} × {row.context}" if row.parallel > 1 else row.context
        found = total_of(row) / GB
        yield (
            f"| {name} | {context} | {row.gib:.1f} GB | {row.by} | {found:.1f} GB | "
            f"{100 * (found / row.gib - 1):+.0f} % |"
        )


# --- a real server: Ollama 0.33.0, models of zeros in real shapes, on a simulated GPU ---

SHOWN = Path(__file__).parent / "answers"

MEASURED = [
    # model, tokens, requests at once, cache, MiB of weights, KV cache and compute buffers
    ("q3", 4096, 1, "f16", 1936.9, 144, 84.5),
    ("q3", 32768, 1, "f16", 1936.9, 1152, 225.0),
    ("l1", 4096, 1, "f16", 797.9, 128, 68.0),
    ("l1", 16384, 1, "f16", 797.9, 512, 160.0),
    ("l1", 32768, 1, "f16", 797.9, 1024, 192.0),
    ("l1", 131072, 1, "f16", 797.9, 4096, 768.1),
    ("l1", 4096, 4, "f16", 797.9, 512, 136.0),
    ("l1", 16384, 1, "q8_0", 797.9, 272, 160.1),
    ("g3", 4096, 1, "f16", 1053.1, 92, 90.5),
    ("g3", 16384, 1, "f16", 1053.1, 208, 206.1),
    ("g3", 4096, 4, "f16", 1053.1, 448, 182.1),
    ("q3s", 8192, 1, "f16", 1035.4, 384, 170.0),
]


def shown(name: str) -> ModelFacts:
    """What the real server answers of a model, as the catalog reads it."""
    answers = json.loads((SHOWN / f"{name}.json").read_text())
    with OllamaServer(None, {name: "1GB"}) as server:
        server.answers["/api/tags"] = json.dumps({"models": [answers["tag"]]}).encode()
        server.answers["/api/show"] = json.dumps(answers["show"]).encode()
        (found,) = ask_models(
            parse_address(server.host), (name,), time.monotonic() + 10, lambda _: None
        )
    return found


@pytest.mark.parametrize(
    ("name", "context", "parallel", "cache_type", "weights", "kv_cache", "graph"), MEASURED
)
def test_measured_on_a_real_server(
    name: str,
    context: int,
    parallel: int,
    cache_type: str,
    weights: float,
    kv_cache: float,
    graph: float,
) -> None:
    """Every part within a tenth of a MiB; so the sum is far within -1 to +5 %."""
    server = Server(24 * GB, "0.33.0", context, parallel, cache_type)
    model = shown(name)
    found = predict(model, server)
    assert found.weights / MB == pytest.approx(weights, abs=0.06)
    assert found.kv_cache / MB == kv_cache
    assert found.graph / MB == pytest.approx(graph, abs=0.11)
    measured = weights + kv_cache + graph
    assert 0.99 * measured <= found.buffers / MB <= 1.05 * measured
    # Older servers reserve more, and so do we; without a list of tensors the file counts.
    older = server._replace(version="0.32.1")
    assert predict(model, older).graph >= found.graph
    assert predict(model._replace(tensors=None), server).weights == model.file_bytes
    lines = list(arithmetic(model, server))
    assert [line.split()[0] for line in lines] == ["weights", "KV", "buffers", "process"]


def test_14b_at_the_servers_own_context() -> None:
    """On 24 GB the server chooses 32,768 tokens: 14.7 GB, which 12 GB do not hold."""
    found = predict(shown("q14"), Server(24 * GB, "0.33.0"))
    assert (found.context, found.kv_cache) == (32768, 6144 * MB)
    assert format_gb(found.buffers) == "14.69 GB"
    short = predict(shown("q14"), Server(24 * GB, "0.33.0", 8192))
    assert format_gb(short.buffers) == "10.15 GB"


def test_recurrent_layers_of_each_layer() -> None:
    """A list of truth values: a quarter of the layers keeps a cache, 12 GiB and not 48."""
    metadata = json.loads((SHOWN / "model_info_recurrent_layers.json").read_text())
    assert kv(metadata, 262144) == 12 * GB


def test_mixture_of_experts() -> None:
    """As many experts as compute at once, each with a copy of its input."""
    metadata = info(
        "qwen3moe", layers=4, embedding=2048, trained=40960, heads=32, kv=4, key=128, value=128,
        feed_forward_length=6144, expert_count=128, expert_used_count=8,
        expert_feed_forward_length=768,
    )  # fmt: skip
    wide = 3 * 8 * 768 + (4 + 8) * 2048
    assert predicted(metadata).graph == 4 * 512 * wide + 2 * 512 * 4096


@pytest.mark.parametrize(
    "tensors",
    [
        None,
        [],
        [{"name": "a", "type": "Q9_Z", "shape": [256]}],
        [{"name": "a", "type": "F32", "shape": []}],
        [{"name": "a", "type": "F32", "shape": [-1]}],
        [{"name": "a", "type": "F32", "shape": [2**31, 2**31]}],
        ["a"],
    ],
)
def test_tensors_that_make_no_sense(tensors: object) -> None:
    """Then the size of the file counts, as before servers listed tensors."""
    assert tensors_of(tensors) is None


# --- how Ollama is set up ---


@pytest.mark.parametrize(
    ("total", "expected"),
    [(47 * GB, 262144), (47 * GB - 1, 32768), (23 * GB, 32768), (23 * GB - 1, 4096), (0, 4096)],
)
def test_context_by_total_vram(total: int, expected: int) -> None:
    assert context_of(None, Server(total)) == expected


def test_context_of_the_model_itself() -> None:
    """`num_ctx` in its own settings, else the server's, and never more than it was trained for."""
    server = Server(24 * GB, context=8192)
    assert context_of(2048, server) == 2048
    assert context_of(None, server) == 8192
    assert context_of(65536, server, trained=40960) == 40960


def test_parallel_requests_have_caches_of_their_own() -> None:
    """Also the windows: each request has one."""
    for name in ("llama3.1:8b", "gemma3:12b"):
        one, four = (predicted(BY_NAME[name].info, parallel=n, version="0.29.0") for n in (1, 4))
        assert four.kv_cache == 4 * one.kv_cache


def test_contexts_are_rounded_up() -> None:
    """To 256 cells, as llama.cpp does."""
    metadata = BY_NAME["llama3.1:8b"].info
    assert predicted(metadata, 5000).kv_cache == predicted(metadata, 5120).kv_cache


def test_smallest_type_of_cache() -> None:
    f16, q4_0 = (predicted(BY_NAME["llama3.1:8b"].info, 4096, t).kv_cache for t in ("f16", "q4_0"))
    assert q4_0 * 32 == f16 * 9


@pytest.mark.parametrize(
    ("version", "new"),
    [("0.30.0", True), ("0.33.0-rc2", True), ("1.0.0", True), ("0.29.9", False), ("0.5.7", False),
     ("0.0.0", True), (None, True), ("nightly", True)],
)  # fmt: skip
def test_versions(version: str | None, new: bool) -> None:
    """From 0.30 on Ollama runs llama-server; builds without a version are newer."""
    assert Server(0, version).runs_llama_server is new


def test_old_servers_compute_attention_in_full() -> None:
    """Before 0.30 the buffers grow with the context, unless the cache is quantized."""
    metadata = BY_NAME["qwen3:32b"].info
    old = predicted(metadata, 32768, version="0.20.0").graph
    assert old > 4 * GB
    assert predicted(metadata, 32768, "q8_0", version="0.20.0").graph < old / 8


# --- shapes ---

PLAIN = info("llama", layers=4, embedding=64, trained=8192, heads=4)


def kv(metadata: dict[str, object], context: int = 4096, **more: Any) -> int:
    return predicted(metadata, context, **more).kv_cache


def test_missing_keys() -> None:
    """As many KV heads as heads, and keys as long as the embedding divided by the heads."""
    assert kv(PLAIN) == 4 * 4096 * (64 + 64) * 2


def test_heads_by_layer() -> None:
    """A list has a figure for each layer; a layer with none keeps nothing."""
    metadata = {**PLAIN, "llama.attention.head_count_kv": (4, 2, 0, 1)}
    assert kv(metadata) == 7 * 4096 * (16 + 16) * 2


def test_windows_by_layer() -> None:
    """A list of truth values tells which layers have a window."""
    metadata = {
        **PLAIN,
        "llama.attention.sliding_window": 256,
        "llama.attention.sliding_window_pattern": [True, True, True, False],
    }
    assert kv(metadata) == (3 * 768 + 4096) * (64 + 64) * 2


def test_windows_with_heads_of_their_own() -> None:
    """As gemma4 has them, with layers that share the cache of others."""
    metadata = info(
        "gemma4", layers=6, embedding=64, trained=8192, heads=4, kv=1, key=32, value=32, window=256
    )
    metadata["gemma4.attention.key_length_swa"] = 16
    metadata["gemma4.attention.value_length_swa"] = 16
    metadata["gemma4.attention.sliding_window_pattern"] = [True, True, False] * 2
    metadata["gemma4.attention.shared_kv_layers"] = 3
    assert kv(metadata) == (2 * 768 * (16 + 16) + 4096 * (32 + 32)) * 2


def test_windows_that_are_ignored() -> None:
    """phi3's files name a window, and the whole context is kept."""
    metadata = info("phi3", layers=4, embedding=64, trained=8192, heads=4, window=512)
    assert kv(metadata) == kv(PLAIN)


def test_latent_attention() -> None:
    """DeepSeek's compressed rows: one for keys, none for values."""
    metadata = info(
        "deepseek2", layers=4, embedding=64, trained=8192, heads=4, kv=1, key=576, value=512
    )
    metadata["deepseek2.attention.key_length_mla"] = 192
    assert kv(metadata) == 4 * 4096 * 576 * 2


def test_attention_in_every_fourth_layer() -> None:
    """Qwen3-Next and its kind: a cache in one layer of four, a state in the others."""
    metadata = info("qwen3next", layers=8, embedding=64, trained=8192, heads=4, kv=2, key=16,
                    value=16)  # fmt: skip
    plain = kv(metadata)
    assert plain == 2 * 4096 * (32 + 32) * 2
    metadata.update(
        {
            "qwen3next.ssm.inner_size": 128,
            "qwen3next.ssm.state_size": 16,
            "qwen3next.ssm.conv_kernel": 4,
            "qwen3next.ssm.group_count": 2,
        }
    )
    assert kv(metadata) - plain == 6 * (3 * (128 + 2 * 2 * 16) + 16 * 128) * 4


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert", "gemma-embedding"])
def test_embedding_models_have_no_cache(architecture: str) -> None:
    metadata = info(architecture, layers=4, embedding=64, trained=512, heads=4)
    assert kv(metadata) == 0


def test_numbers_as_go_writes_them() -> None:
    """A whole number may come as a float."""
    assert shape_of({**PLAIN, "llama.context_length": 1.048576e6}).trained_context == 1048576


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", None, "names no architecture"),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.block_count", 0, "llama.block_count is 0"),
        ("llama.block_count", 10**9, "llama.block_count is 1000000000"),
        ("llama.block_count", True, "llama.block_count is True"),
        ("llama.embedding_length", "5120", "llama.embedding_length is '5120'"),
        ("llama.attention.head_count_kv", -1, "llama.attention.head_count_kv is -1"),
        ("llama.attention.head_count_kv", [8], "has 1 entries for 4 layers"),
        ("llama.attention.head_count_kv", [8, 8, "x", 8], "llama.attention.head_count_kv is 'x'"),
        ("llama.attention.key_length", 1.5, "llama.attention.key_length is 1.5"),
        ("llama.context_length", float("nan"), "llama.context_length is nan"),
        ("llama.attention.sliding_window_pattern", ["a"], "is no list of truth values"),
    ],
)
def test_nonsense_has_a_reason(key: str, value: object, reason: str) -> None:
    with pytest.raises(ShapeUnknownError, match=reason.replace("(", r"\(")):
        predicted({**PLAIN, key: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["block_count", "embedding_length", "context_length", "attention.head_count",
     "attention.head_count_kv", "attention.key_length", "attention.value_length",
     "attention.sliding_window", "attention.sliding_window_pattern", "attention.key_length_mla",
     "attention.shared_kv_layers", "full_attention_interval", "ssm.inner_size", "ssm.state_size",
     "pooling_type", "vocab_size", "wkv.head_size", "attention.key_length_swa"]
)  # fmt: skip
ARCHITECTURES = st.sampled_from(
    ["llama", "gemma2", "gemma3", "gpt-oss", "qwen3next", "bert", "mamba", "phi3", "deepseek2"]
)


@given(
    ARCHITECTURES | st.text(max_size=5),
    st.dictionaries(KEYS, JSON | st.integers(0, 10**7)),
    st.integers(1, 2**24),
    st.integers(1, 256),
    st.sampled_from(["f16", "q8_0", "q4_0"]),
)
def test_any_answer_is_a_prediction_or_a_reason(
    architecture: str, figures: dict[str, object], context: int, parallel: int, cache_type: str
) -> None:
    """Whatever the metadata, there are sensible bytes or one line that tells why not."""
    metadata: dict[str, object] = {"general.architecture": architecture}
    metadata.update({f"{architecture}.{key}": value for key, value in figures.items()})
    reason = ""
    try:
        found = predicted(metadata, context, cache_type, parallel=parallel)
    except ShapeUnknownError as error:
        reason = str(error)
    if reason:
        assert reason.isprintable()
        assert len(reason) < 200
        return
    assert all(type(part) is int and part >= 0 for part in found[:-1])
    assert found.vram < 2**50
    assert found.vram == found.buffers + OVERHEAD


@given(
    st.sampled_from(MODELS),
    st.integers(256, 131072),
    st.integers(256, 131072),
    st.integers(1, 8),
)
def test_longer_contexts_never_need_less(model: Real, one: int, other: int, parallel: int) -> None:
    """Nor do more requests at once."""
    short, long = sorted((one, other))
    assert predicted(model.info, short).vram <= predicted(model.info, long).vram
    assert predicted(model.info, one).vram <= predicted(model.info, one, parallel=parallel).vram


def test_more_than_any_gpu_has() -> None:
    metadata = info("llama", layers=1024, embedding=2**20, trained=2**27, heads=1)
    with pytest.raises(ShapeUnknownError, match="more VRAM than any GPU has"):
        predicted(metadata, 2**24, parallel=256)


# --- by name ---


@pytest.mark.parametrize(
    ("name", "mb"),
    [
        ("llama2:7b", 8192), ("mistral:7b-instruct-v0.3-q4_0", 8192), ("gemma2:9b", 8192),
        ("qwen2.5:14b", 12288), ("qwen2.5:14b-instruct", 12288), ("starcoder2:15b", 12288),
        ("yi:34b", 18432), ("llama3.3:70b", 18432), ("qwen3:30b-a3b", 18432),
        ("mixtral:8x7b", 18432), ("qwen3:0.6b", 1454), ("smollm:135m", 1121),
        ("hf.co/bartowski/Qwen2.5-14B-Instruct-GGUF:Q4_K_M", 12288), ("mine:latest", 12288),
        ("nomic-embed-text", 2048), ("all-minilm:latest", 2048), ("qwen3-embedding:8b", 8192),
        ("nosuch:1b", 1741), ("llama3.2:3b", 3174), ("gemma3:4b", 3891), ("x:6.9b", 5970),
    ],
)  # fmt: skip
def test_by_name(name: str, mb: int) -> None:
    """The founding write-up's table from 7B on, 0.7 GB a billion and 1 GB below; 14B where the
    name tells no size."""
    assert round(by_name(name) / MB) == mb


def test_by_name_knows_the_file() -> None:
    """Where the file alone is larger, it counts; and what the server calls the size."""
    assert by_name("llama3.3:70b", file_bytes=43 * GB) == 45 * GB
    assert by_name("mine", "7.6B") == 8192 * MB
