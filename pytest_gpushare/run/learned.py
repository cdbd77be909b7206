"""What Ollama's models really took, seen while they were loaded, and used by the next runs.

Kept in pytest's cache under the model's digest, its context, and how the server is set up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpushare.plan.demand import CUDA_CONTEXT, Server
from pytest_gpushare.probe.facts import Device, LoadedModel, ModelFacts
from pytest_gpushare.settings.values import Settings

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.run.started import Started

CACHE_KEY = "gpushare/ollama"
"""Key of `Server.key` -> bytes of VRAM, in pytest's cache."""

_MOST_ENTRIES = 64
_MOST_BYTES = 256 * 1024
_MOST_VRAM = 2**50


def recall(config: pytest.Config) -> dict[str, int]:
    """The sizes that earlier runs saw, in bytes; what makes no sense is left out.

    The plan is made before pytest opens its cache, so the file is read where the cache keeps it.
    """
    try:
        directory = os.path.expandvars(str(config.getini("cache_dir")))
        if getattr(config.known_args_namespace, "cacheclear", False):
            return {}
        # pathlib would have it otherwise where the directory is absolute, as pytest does.
        path = Path(config.rootpath, Path(directory).expanduser(), "v", *CACHE_KEY.split("/"))
        with path.open("rb") as file:
            return _sensible(json.loads(file.read(_MOST_BYTES)))
    except (OSError, ValueError, RecursionError, RuntimeError):
        # Also where the cache is switched off: its setting is unknown then.
        return {}


def keep(config: pytest.Config, started: Started) -> None:
    """Keep what this run saw for later ones; the newest counts, as a new Ollama may differ."""
    at_start = used_by(started.ollama.models, started.gpus.all_devices)
    found = (
        sighting(
            model,
            at_start if used is None and model in started.ollama.models else used,
            started.settings,
            started.ollama.relied_on,
        )
        for model, used in list(started.sightings.values())
    )
    _add(config, dict(pair for pair in found if pair is not None))


def _add(config: pytest.Config, seen: Mapping[str, int]) -> None:
    cache = getattr(config, "cache", None)
    if cache is None or not seen:
        return
    before = _sensible(cache.get(CACHE_KEY, {}))
    after = {**{key: size for key, size in before.items() if key not in seen}, **seen}
    after = dict(list(after.items())[-_MOST_ENTRIES:])
    if after != before:
        cache.set(CACHE_KEY, after)


def sighting(
    model: LoadedModel, used: int | None, settings: Settings, relied_on: Sequence[ModelFacts]
) -> tuple[str, int] | None:
    """(key, bytes) of a loaded model; None where what is seen does not tell what it needs.

    `used` are the bytes of its process as NVML tells them; without them what the server says
    and a CUDA context. A model that is partly on the CPU would need more than is seen, and a
    server that could not read its runner's log tells the size of the file.
    """
    file_sizes = {m.file_bytes for m in relied_on if m.digest == model.digest}
    if not model.digest or not model.context or not 0 < model.size <= model.size_vram:
        return None
    if model.size in file_sizes:
        return None
    vram = used if used is not None and used >= model.size_vram else model.size_vram + CUDA_CONTEXT
    server = Server(
        0, parallel=settings.ollama_parallel, kv_cache_type=settings.ollama_kv_cache_type
    )
    return server.key(model.digest, model.context), vram


def used_by(models: Sequence[LoadedModel], devices: Sequence[Device]) -> int | None:
    """Bytes that NVML tells for the process of the only loaded model; None where it does not."""
    sizes = [p.used for d in devices for p in d.processes or () if p.is_ollama]
    if len(models) != 1 or not sizes or None in sizes:
        return None
    return sum(size for size in sizes if size is not None)


def _sensible(found: object) -> dict[str, int]:
    if not isinstance(found, dict):
        return {}
    return {
        key: size
        for key, size in found.items()
        if isinstance(key, str) and type(size) is int and 0 < size < _MOST_VRAM
    }
