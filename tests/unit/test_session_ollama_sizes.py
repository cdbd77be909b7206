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
from pytest_gpushare.ollama.prediction import CUDA_CONTEXT
from pytest_gpushare.session.needs_store import (
    ModelSizes,
    recall_ollama_sizes,
    sighting,
    used_by,
)
from pytest_gpushare.units import GB

from .test_planning_sizing import DEFAULTS, device

MODEL = LoadedModel("m:7b", 5 * GB, 5 * GB, "d" * 64, 4096)
KEY = f"{'d' * 64} 4096 x 1 f16"


def test_what_is_seen() -> None:
    """What the server says and a CUDA context; what NVML says, where it says more."""
    assert sighting(MODEL, None, DEFAULTS, ()) == (KEY, 5 * GB + CUDA_CONTEXT)
    assert sighting(MODEL, 6 * GB, DEFAULTS, ()) == (KEY, 6 * GB)
    assert sighting(MODEL, GB, DEFAULTS, ()) == (KEY, 5 * GB + CUDA_CONTEXT)


@pytest.mark.parametrize(
    "model",
    [
        LoadedModel("m:7b", 5 * GB, 4 * GB, "d" * 64, 4096),
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
    runner, silent = (GpuProcess(7, used, is_ollama=True) for used in (3 * GB, None))
    both = device(12, processes=(runner,)), device(12, index=1, processes=(runner,))
    assert used_by([MODEL], both) == 6 * GB
    assert used_by([MODEL, MODEL], both) is None
    assert used_by([MODEL], [device(12, processes=(silent,))]) is None
    assert used_by([MODEL], [device(12, processes=(GpuProcess(8, GB),))]) is None


class Cache:
    """pytest's cache, as far as it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mkdir(self, name: str) -> Path:
        found = self.path / "d" / name
        found.mkdir(parents=True, exist_ok=True)
        return found


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


def keep(where: Any, *models: LoadedModel) -> None:
    ModelSizes(DEFAULTS, GpuFacts(), OllamaFacts(models=models)).keep(where)


def test_from_run_to_run(tmp_path: Path) -> None:
    """Written through pytest's cache, read from its file before there is a cache."""
    here = config(tmp_path)
    assert recall_ollama_sizes(here) == {}
    keep(here, MODEL)
    assert recall_ollama_sizes(here) == {KEY: 5 * GB + CUDA_CONTEXT}
    absolute = config(tmp_path, str(tmp_path / "cache"))
    assert recall_ollama_sizes(absolute) == recall_ollama_sizes(here)
    assert recall_ollama_sizes(config(tmp_path, clear=True)) == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Of more models than anybody has the oldest go; a new size takes the place of an old one."""
    here = config(tmp_path)
    for number in range(70):
        digest = f"{number:064d}"
        keep(here, LoadedModel("m", GB, GB, digest, 4096))
    keep(here, LoadedModel("m", 2 * GB, 2 * GB, digest, 4096))
    found = recall_ollama_sizes(here)
    assert len(found) == 64
    assert found[f"{digest} 4096 x 1 f16"] == 2 * GB + CUDA_CONTEXT


def test_without_a_cache(tmp_path: Path) -> None:
    """`-p no:cacheprovider`: nothing is known and nothing is kept."""

    def unknown(name: str) -> str:
        raise ValueError(f"unknown configuration value: {name!r}")

    none = SimpleNamespace(
        rootpath=tmp_path, getini=unknown, known_args_namespace=SimpleNamespace()
    )
    assert recall_ollama_sizes(none) == {}  # type: ignore[arg-type]
    keep(none, MODEL)
    assert list(tmp_path.iterdir()) == []


ODD = [b"[" * 50_000, b"null", b'{"a": -1, "b": 1e99, "c": true, "d": 5}']


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.sampled_from(ODD))
def test_any_file(tmp_path: Path, content: bytes) -> None:
    """Whatever stands in the file, only sensible sizes come out of it."""
    path = tmp_path / "cache" / "v" / "gpushare" / "ollama"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert all(0 < size < 2**50 for size in recall_ollama_sizes(config(tmp_path)).values())
