"""How much is kept for Ollama on each device, and from what."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess
from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, OllamaFacts
from pytest_gpushare.ollama.prediction import (
    MARGIN,
    OVERHEAD,
    KnownSizes,
    Server,
    Sighting,
    by_name,
    overhead_key,
    predict,
)
from pytest_gpushare.ollama.reservation import Source, seen_larger, unexpected
from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.units import GB, MB, format_gb

from .real_models import BY_NAME
from .test_planning_sizing import DEFAULTS, device, plan

AUTO: dict[str, Any] = {
    "ollama_vram_reservation": None,
    "ollama_models": ("qwen2.5:14b",),
    "ollama_context": 4096,
}
FACTS = ModelFacts("qwen2.5:14b", "d" * 64, 9 * 10**9, "14.8B", None, BY_NAME["qwen2.5:14b"].info)
NEED = predict(FACTS, Server(24 * GB, "0.33.0", 4096))


def answering(*models: LoadedModel, told: ModelFacts = FACTS, **more: Any) -> OllamaFacts:
    return OllamaFacts(
        asked=True, answered=True, reachable=True, version="0.33.0", models=models,
        relied_on=(told,), **more,
    )  # fmt: skip


def kept(result: Plan) -> list[int]:
    return [planned.reservation for planned in result.devices]


def sources(result: Plan) -> list[tuple[str, Source]]:
    assert result.demand is not None
    return [(need.name, need.source) for need in result.demand.needs]


def test_as_much_as_the_model_needs() -> None:
    """And what Ollama wants to stay free."""
    result = plan(device(22), ollama=answering(), **AUTO)
    assert kept(result) == [NEED.vram + MARGIN]
    assert sources(result) == [("qwen2.5:14b", Source.PREDICTED)]


def test_several_devices_to_choose_from() -> None:
    """80 % of what is free must do, on whichever device it will be."""
    pair = device(22), device(22, index=1)
    result = plan(*pair, ollama=answering(), **{**AUTO, "ollama_context": None})
    # 48 GB in all: the longest context, cut to what the model was trained for.
    assert result.demand is not None
    need = result.demand.needs[0].vram
    assert result.demand.needs[0].prediction.context == 32768  # type: ignore[union-attr]
    assert kept(result) == [need * 5 // 4] * 2
    assert need * 5 // 4 > need + MARGIN
    tied = plan(*pair, ollama=answering(), **{**AUTO, "ollama_gpu": ("1",)})
    assert kept(tied) == [0, NEED.vram + MARGIN]


def test_small_models_on_several_devices() -> None:
    """Where 1024 MB are more than a quarter of the need, they count."""
    small = FACTS._replace(file_bytes=GB, info=BY_NAME["nomic-embed-text"].info)
    result = plan(device(22), device(22, index=1), ollama=answering(told=small), **AUTO)
    assert result.demand is not None
    assert kept(result) == [result.demand.needs[0].vram + MARGIN] * 2


def test_what_is_loaded_counts_with_what_it_holds() -> None:
    """Nothing more is kept for it than the room to be loaded again."""
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 10 * GB, FACTS.digest, 4096)
    result = plan(device(12), ollama=answering(loaded), **AUTO)
    assert kept(result) == [10 * GB + MARGIN]
    assert result.devices[0].outstanding == MARGIN
    assert sources(result) == [("qwen2.5:14b", Source.LOADED)]


def test_what_spilled_wants_all_of_it() -> None:
    """When it is loaded again it should find room for what is on the CPU now."""
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 4 * GB, FACTS.digest, 4096)
    result = plan(device(12), ollama=answering(loaded), **AUTO)
    # Its size has the token embeddings in it, so that the prediction counts.
    assert result.devices[0].outstanding == NEED.buffers - 4 * GB + MARGIN
    in_ram = loaded._replace(size_vram=0)
    result = plan(device(12), ollama=answering(in_ram), **AUTO)
    assert result.devices[0].outstanding == NEED.vram + MARGIN


def test_what_spilled_without_metadata() -> None:
    """Nothing but its size says what it needs; the process comes on top where it has none yet."""
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 0, FACTS.digest, 4096)
    result = plan(device(12), ollama=answering(loaded, told=FACTS._replace(info=None)), **AUTO)
    assert result.devices[0].outstanding == 10 * GB + OVERHEAD + MARGIN


def test_overhead_that_was_measured() -> None:
    """Under the model of the device and the server's version, and under no other."""
    name = device(22).name
    for version, expected in (("0.33.0", NEED.buffers + 700 * MB), ("0.34.0", NEED.vram)):
        sizes = KnownSizes(overheads={overhead_key(name, version): 700 * MB})
        result = plan(device(22), ollama=answering(), sizes=sizes, **AUTO)
        assert kept(result) == [expected + MARGIN]


def test_window_is_never_below_the_prediction() -> None:
    """The server leaves out one of two caches: what it said in an earlier run is too little."""
    facts = FACTS._replace(info=BY_NAME["gemma3:12b"].info)
    need = predict(facts, Server(24 * GB, "0.33.0", 4096))
    assert need.has_window
    for seen, expected in ((need.vram - GB, need.vram), (need.vram + GB, need.vram + GB)):
        key = Server(0).key(FACTS.digest, 4096)
        sizes = KnownSizes({key: Sighting("m", seen, 4096)})
        result = plan(device(22), ollama=answering(told=facts), sizes=sizes, **AUTO)
        assert kept(result) == [expected + MARGIN]


def test_ways_to_a_smaller_need() -> None:
    """14B at 32,768 tokens: the cache is a good part of it; at 4096 it is not."""
    long = plan(device(22), ollama=answering(), **{**AUTO, "ollama_context": None})
    assert long.demand is not None
    assert long.demand.needs[0].smaller == (
        "10.98 GB at 8192 tokens (PARAMETER num_ctx in the model, or OLLAMA_CONTEXT_LENGTH of the "
        "server)",
        "12.67 GB with OLLAMA_KV_CACHE_TYPE=q8_0",
    )
    short = plan(device(22), ollama=answering(), **AUTO)
    assert short.demand is not None
    assert short.demand.needs[0].smaller == ()


TODAY = time.strftime("%Y-%m-%d", time.gmtime())
SEEN_14B = Sighting("qwen2.5:14b", 15 * GB, 32768, TODAY)


@pytest.mark.parametrize(
    ("reservation", "sighting", "ollama", "text"),
    [
        (12 * GB, SEEN_14B, answering(), "reservation_mb = 16500 would hold it"),
        (8 * GB, SEEN_14B._replace(vram=24 * GB), answering(), "use a smaller context"),
        (16 * GB, SEEN_14B, answering(), None),
        (12 * GB, SEEN_14B._replace(date="2026-01-01"), answering(), None),
        (12 * GB, SEEN_14B, answering(LoadedModel("qwen2.5:14b", GB, GB)), None),
        (None, SEEN_14B, answering(), None),
        (12 * GB, SEEN_14B, OllamaFacts(), None),
    ],
)
def test_seen_larger_than_reserved(
    reservation: int | None, sighting: Sighting, ollama: OllamaFacts, text: str | None
) -> None:
    """One sentence where a recent run saw more than is reserved, and it is not loaded now."""
    settings = DEFAULTS._replace(ollama_vram_reservation=reservation)
    gpus = GpuFacts((device(22),), (device(22),))
    found = seen_larger(settings, gpus, ollama, KnownSizes({"k": sighting}))
    assert len(found) == (text is not None)
    for sentence in found:
        assert text is not None
        assert text in sentence
        assert f"qwen2.5:14b held {format_gb(sighting.vram)} of VRAM" in sentence


def test_more_than_the_devices_have() -> None:
    """A server that claims more VRAM than there is holds nothing that can be trusted."""
    claims = LoadedModel("m", 2**49, 2**49)
    result = plan(device(12), ollama=OllamaFacts(asked=True, answered=True, models=(claims,)))
    assert result.devices[0].resident == 0


def test_unknown_part_on_the_gpu() -> None:
    """The reservation stands where neither the server nor NVML says what a model holds."""
    silent = LoadedModel("m", 2 * GB, None)
    ollama = OllamaFacts(asked=True, answered=True, models=(silent,))
    assert plan(device(12), ollama=ollama).devices[0].resident == 0
    runner = GpuProcess(7, 3 * GB, neighbour="Ollama")
    assert plan(device(12, processes=(runner,)), ollama=ollama).devices[0].resident == 3 * GB


def test_models_that_nobody_named() -> None:
    """What is loaded beside them is resident, and takes nothing from what they need."""
    other = LoadedModel("other:latest", 2 * GB, 2 * GB, "e" * 64, 4096)
    result = plan(device(20), ollama=answering(other), **AUTO)
    assert result.devices[0].outstanding == NEED.vram + MARGIN
    assert kept(result) == [2 * GB + NEED.vram + MARGIN]


@pytest.mark.parametrize("written", ["Qwen2.5:14B", "library/qwen2.5:14b", "alias"])
def test_names_of_the_same_model(written: str) -> None:
    """By name as Ollama completes it, or by digest."""
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 10 * GB, FACTS.digest, 4096)
    told = FACTS._replace(name=written)
    settings = {**AUTO, "ollama_models": (written,)}
    result = plan(device(12), ollama=answering(loaded, told=told), **settings)
    assert sources(result) == [("qwen2.5:14b", Source.LOADED)]


def test_two_names_of_one_file() -> None:
    """One process, loaded or not; with another context of its own it would be another load."""
    names = {**AUTO, "ollama_models": ("qwen2.5:14b", "alias")}
    here = FACTS._replace(blob="b" * 64)
    alias = here._replace(name="alias", digest="a" * 64)
    idle = answering()._replace(relied_on=(here, alias))
    assert sources(plan(device(22), ollama=idle, **names)) == [("qwen2.5:14b", Source.PREDICTED)]
    loaded = idle._replace(models=(LoadedModel("qwen2.5:14b", 9 * GB, 9 * GB, "d" * 64, 4096),))
    assert sources(plan(device(12), ollama=loaded, **names)) == [("qwen2.5:14b", Source.LOADED)]
    longer = idle._replace(relied_on=(here, alias._replace(num_ctx=8192)))
    assert len(sources(plan(device(22), ollama=longer, **names))) == 2


def test_nvml_tells_more_than_the_server() -> None:
    """A process holds its context, too: it is resident, and not kept twice."""
    runner = GpuProcess(7, 11 * GB, neighbour="Ollama")
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 10 * GB, FACTS.digest, 4096)
    result = plan(device(12, processes=(runner,)), ollama=answering(loaded), **AUTO)
    assert kept(result) == [11 * GB + MARGIN]
    assert result.devices[0].outstanding == MARGIN


def test_what_was_seen_wins() -> None:
    """A size from an earlier run, at the same context and settings, and only then."""
    server = Server(0, kv_cache_type="f16")
    seen = KnownSizes({server.key(FACTS.digest, 4096): Sighting("m", 11 * GB, 4096)})
    result = plan(device(22), ollama=answering(), sizes=seen, **AUTO)
    assert kept(result) == [11 * GB + MARGIN]
    assert result.demand is not None
    assert result.demand.needs[0].difference == 11 * GB - NEED.vram
    for other in (
        {"ollama_context": 8192},
        {"ollama_parallel": 2},
        {"ollama_kv_cache_type": "q8_0"},
    ):
        result = plan(device(22), ollama=answering(), sizes=seen, **{**AUTO, **other})
        assert sources(result) == [("qwen2.5:14b", Source.PREDICTED)]


def test_difference_of_a_loaded_model() -> None:
    """Compared at the context that it has, without a CUDA context, which the server leaves out."""
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 10 * GB, FACTS.digest, 4096)
    settings = {**AUTO, "ollama_context": 32768}
    result = plan(device(12), ollama=answering(loaded), **settings)
    assert result.demand is not None
    assert result.demand.needs[0].difference == 10 * GB - (NEED.vram - OVERHEAD)


def test_cloud_models_need_nothing() -> None:
    result = plan(
        device(22), ollama=answering(told=ModelFacts("qwen2.5:14b", is_remote=True)), **AUTO
    )
    assert (kept(result), sources(result)) == ([MARGIN], [("qwen2.5:14b", Source.CLOUD)])


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (FACTS._replace(info=None, problem="/api/show gives no JSON"), "/api/show gives no JSON"),
        (FACTS._replace(file_bytes=None), "/api/tags gives no size"),
        (FACTS._replace(info={}), "the metadata names no architecture"),
    ],
)
def test_by_name_for_want_of_better(told: ModelFacts, reason: str) -> None:
    result = plan(device(22), ollama=answering(told=told), **AUTO)
    assert result.demand is not None
    (need,) = result.demand.needs
    assert (need.vram, need.source, need.reason) == (12288 * MB, Source.NAME, reason)
    assert kept(result) == [12288 * MB + MARGIN]


@pytest.mark.parametrize("asked", [True, False])
def test_without_an_answer(asked: bool) -> None:
    """The founding write-up's table, whose figures are whole reservations."""
    settings = {**AUTO, "ollama_models": ("qwen2.5:14b", "nomic-embed-text:137m")}
    result = plan(device(22), device(22, index=1), ollama=OllamaFacts(asked=asked), **settings)
    assert kept(result) == [12288 * MB + by_name("nomic-embed-text:137m")] * 2


def test_elsewhere() -> None:
    """A server on another machine: room for all of its named models, unless the GPU is `none`."""
    loaded = LoadedModel("qwen2.5:14b", 10 * GB, 10 * GB, FACTS.digest, 4096)
    remote = answering(loaded, on_this_host=False)
    assert kept(plan(device(22), ollama=remote, **AUTO)) == [10 * GB + MARGIN]
    assert plan(device(22), ollama=remote, **AUTO).devices[0].resident == 0
    assert kept(plan(device(22), ollama=remote, **{**AUTO, "ollama_gpu": ("none",)})) == [0]


SILENT = OllamaFacts(asked=True, problem="nothing listens there")
NONSENSE = OllamaFacts(asked=True, reachable=True, problem="reachable but answers nonsense")
RUNNER = GpuProcess(7, None, neighbour="Ollama")


@pytest.mark.parametrize(
    ("ollama", "setting", "processes", "released"),
    [
        (SILENT, "release", (), True),
        (SILENT, "reserve", (), False),
        (SILENT, "release", (RUNNER,), False),
        (NONSENSE, "release", (), False),
        (answering(), "release", (), False),
        (OllamaFacts(), "release", (), False),
    ],
)
def test_released_only_where_no_server_is(
    ollama: OllamaFacts, setting: str, processes: tuple[GpuProcess, ...], released: bool
) -> None:
    result = plan(device(22, processes=processes), ollama=ollama, ollama_unreachable=setting)
    assert result.is_released is released
    assert kept(result) == [0 if released else 12 * GB]


# --- which device ---


def test_process_list_beside_the_setting() -> None:
    """Where its process is, room is kept, whatever the setting says; and the user is told."""
    devices = (
        device(23),
        device(12, index=1, processes=(GpuProcess(7, 9 * GB, neighbour="Ollama"),)),
    )
    assert kept(plan(*devices, ollama_gpu=("0",))) == [12 * GB, 12 * GB]
    facts = GpuFacts(devices, devices)
    assert unexpected(("0",), facts) == (devices[1],)
    assert unexpected(("GPU-0001", "0"), facts) == unexpected(("auto",), facts) == ()


@pytest.mark.parametrize("told", [True, False])
def test_split_over_devices(told: bool) -> None:
    """A model on two devices is resident on each, whether or not NVML tells how much."""
    runner = GpuProcess(7, 8 * GB if told else None, neighbour="Ollama")
    pair = device(15, processes=(runner,)), device(15, index=1, processes=(runner,))
    loaded = LoadedModel("m", 16 * GB, 16 * GB)
    ollama = OllamaFacts(asked=True, answered=True, models=(loaded,))
    result = plan(*pair, ollama=ollama)
    assert [planned.resident for planned in result.devices] == [8 * GB, 8 * GB]


def test_split_by_what_is_used() -> None:
    """Without sizes the fuller device is taken to hold more."""
    runner = GpuProcess(7, None, neighbour="Ollama")
    pair = device(12, processes=(runner,)), device(18, index=1, processes=(runner,))
    ollama = OllamaFacts(asked=True, answered=True, models=(LoadedModel("m", 9 * GB, 9 * GB),))
    result = plan(*pair, ollama=ollama)
    assert [planned.resident for planned in result.devices] == [6 * GB, 3 * GB]


@given(st.integers(0, 24), st.integers(0, 24), st.integers(0, 60), st.booleans(), st.booleans())
def test_split_never_counts_a_byte_twice(
    one: int, other: int, held: int, first: bool, second: bool
) -> None:
    """Nor more than is in use."""
    runner = (GpuProcess(7, None, neighbour="Ollama"),)
    pair: tuple[Device, ...] = (
        device(24 - one, processes=runner if first else ()),
        device(24 - other, index=1, processes=runner if second else ()),
    )
    loaded = LoadedModel("m", held * GB, held * GB)
    ollama = OllamaFacts(asked=True, answered=True, models=(loaded,))
    result = plan(*pair, ollama=ollama, ollama_vram_reservation=2**40)
    resident = [planned.resident for planned in result.devices]
    assert sum(resident) <= held * GB
    assert all(r <= p.device.used for r, p in zip(resident, result.devices, strict=True))
