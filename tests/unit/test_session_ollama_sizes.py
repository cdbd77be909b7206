"""Sizes that were seen: kept where they tell something, believed where they make sense."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_gpushare.gpu.devices import GpuFacts, GpuProcess
from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, OllamaFacts
from pytest_gpushare.ollama.prediction import (
    OVERHEAD,
    KnownSizes,
    measured_overhead,
    overhead_key,
    sighting,
    used_by,
)
from pytest_gpushare.session.needs_store import ModelSizes, recall_ollama
from pytest_gpushare.units import GB, MB

from .real_models import BY_NAME
from .test_planning_sizing import DEFAULTS, device
from .test_session_needs_store import Cache

MODEL = LoadedModel("m:7b", 5 * GB, 5 * GB, "d" * 64, 4096)
KEY = f"{'d' * 64} 4096 x 1 f16"


def test_what_is_seen() -> None:
    """What the server says and a CUDA context; what NVML says, where it says more."""

    def seen(used: int | None) -> tuple[str, int]:
        found = sighting(MODEL, used, DEFAULTS, ())
        assert found is not None
        assert (found[1].name, found[1].context) == ("m:7b", 4096)
        return found[0], found[1].vram

    assert seen(None) == (KEY, 5 * GB + OVERHEAD)
    assert seen(6 * GB) == (KEY, 6 * GB)
    assert seen(5 * GB) == seen(GB) == (KEY, 5 * GB + OVERHEAD)


PLAIN = ModelFacts("m:7b", "d" * 64, GB, info=BY_NAME["qwen2.5:7b"].info)


@pytest.mark.parametrize(
    ("used", "facts", "expected"),
    [
        (5 * GB + 700 * MB, (PLAIN,), 700 * MB),
        (5 * GB, (PLAIN,), None),
        (4 * GB, (PLAIN,), None),
        (None, (PLAIN,), None),
        (10 * GB, (PLAIN,), None),
        (6 * GB, (), None),
        (6 * GB, (PLAIN._replace(info=BY_NAME["gemma3:12b"].info),), None),
    ],
)
def test_what_a_process_takes_beyond_its_buffers(
    used: int | None, facts: tuple[ModelFacts, ...], expected: int | None
) -> None:
    """Measured where the server reports the whole of the model, which it does not with windows."""
    assert measured_overhead(MODEL, used, facts) == expected


@pytest.mark.parametrize(
    "model",
    [
        LoadedModel("m:7b", 5 * GB, 4 * GB, "d" * 64, 4096),
        LoadedModel("m:7b", 5 * GB, None, "d" * 64, 4096),
        LoadedModel("m:7b", 0, 0, "d" * 64, 4096),
        LoadedModel("m:7b", 5 * GB, 5 * GB, "", 4096),
        LoadedModel("m:7b", 5 * GB, 5 * GB, "d" * 64, None),
    ],
)
def test_what_tells_nothing(model: LoadedModel) -> None:
    """Partly on the CPU, of size 0, without a digest, or of unknown context."""
    assert sighting(model, None, DEFAULTS, ()) is None


def test_size_of_the_file() -> None:
    """A server that could not read its runner's log tells the file's size: no cache is in it."""
    told = ModelFacts("m:7b", "d" * 64, 5 * GB)
    assert sighting(MODEL, None, DEFAULTS, (told,)) is None


def test_used_by_the_only_model() -> None:
    """NVML tells processes, not models: one model alone can be told."""
    runner, silent = (GpuProcess(7, used, neighbour="Ollama") for used in (3 * GB, None))
    both = device(12, processes=(runner,)), device(12, index=1, processes=(runner,))
    assert used_by([MODEL], both) == 6 * GB
    assert used_by([MODEL, MODEL], both) is None
    assert used_by([MODEL], [device(12, processes=(silent,))]) is None
    assert used_by([MODEL], [device(12, processes=(GpuProcess(8, GB),))]) is None


def config(path: Path, directory: str = "cache", *, clear: bool = False) -> Any:
    found = SimpleNamespace(
        rootpath=path,
        getini=lambda _: directory,
        known_args_namespace=SimpleNamespace(cacheclear=clear),
        cache=Cache(path / directory),
    )
    if clear:
        # pytest clears its cache when it opens it: the plan is made before.
        del found.cache
    return found


def keep(
    where: Any, *models: LoadedModel, used: int | None = None, facts: tuple[ModelFacts, ...] = ()
) -> None:
    devices = (device(12),)
    sizes = ModelSizes(
        DEFAULTS,
        GpuFacts(devices, devices),
        OllamaFacts(models=models, relied_on=facts, version="0.33.0"),
    )
    for model in models:
        sizes.saw(model, used)
    sizes.keep(where)


def test_from_run_to_run(tmp_path: Path) -> None:
    """Written through pytest's cache, read from its file before there is a cache."""
    here = config(tmp_path)
    assert recall_ollama(here) == KnownSizes()
    keep(here, MODEL)
    assert {key: seen.vram for key, seen in recall_ollama(here).models.items()} == {
        KEY: 5 * GB + OVERHEAD
    }
    keep(here, MODEL, used=6 * GB, facts=(PLAIN,))
    assert recall_ollama(here).models[KEY].vram == 6 * GB
    assert recall_ollama(here).overheads == {overhead_key(device(12).name, "0.33.0"): GB}
    keep(here, MODEL)
    assert recall_ollama(here).models[KEY].vram == 6 * GB
    absolute = config(tmp_path, str(tmp_path / "cache"))
    assert recall_ollama(absolute) == recall_ollama(here)
    assert recall_ollama(config(tmp_path, clear=True)) == KnownSizes()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Of more models than anybody has the oldest go; a new size takes the place of an old one."""
    here = config(tmp_path)
    for number in range(70):
        digest = f"{number:064d}"
        keep(here, LoadedModel("m", GB, GB, digest, 4096))
    keep(here, LoadedModel("m", 2 * GB, 2 * GB, digest, 4096))
    found = recall_ollama(here).models
    assert len(found) == 64
    assert found[f"{digest} 4096 x 1 f16"].vram == 2 * GB + OVERHEAD


def test_without_a_cache(tmp_path: Path) -> None:
    """`-p no:cacheprovider`: nothing is known and nothing is kept."""

    def unknown(name: str) -> str:
        raise ValueError(f"unknown configuration value: {name!r}")

    none = SimpleNamespace(
        rootpath=tmp_path, getini=unknown, known_args_namespace=SimpleNamespace()
    )
    assert recall_ollama(none) == KnownSizes()  # type: ignore[arg-type]
    keep(none, MODEL)
    assert list(tmp_path.iterdir()) == []


ODD = [
    b"[" * 50_000,
    b"null",
    b'{"version": 2, "models": {"a": -1, "b": ["m", 1e99, 1, "2026-01-01"], "c": ["m", 5, 1, 7]}}',
    b'{"version": 2, "models": {"d": ["m", 5, 1, "2026-01-01"]}, "processes": {"e": -1, "f": 7}}',
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=40) | st.sampled_from(ODD))
def test_any_file(tmp_path: Path, content: bytes) -> None:
    """Whatever stands in the file, only sensible sizes come out of it."""
    path = tmp_path / "cache" / "v" / "gpushare" / "ollama"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    found = recall_ollama(config(tmp_path))
    assert all(0 < seen.vram < 2**50 for seen in found.models.values())
    assert set(found.models) <= {"d"}
    assert dict(found.overheads) in ({}, {"f": 7})
