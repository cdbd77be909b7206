"""What earlier runs teach this one of its tests: needs, durations, and that there are needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_gpushare.run.profile import Learned, recall

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.run.started import Started

CACHE_KEY = "gpushare/has_needs"
"""Whether tests of this suite have needs of their own, in pytest's cache."""


class Lessons:
    """Node id -> need and duration, on the devices of this run."""

    def __init__(self, started: Started, config: pytest.Config) -> None:
        names = dict.fromkeys(slot.device.name for slot in started.plan.slots)
        self._by_context: list[tuple[int, Mapping[str, Learned]]] = [
            (started.context_of(name), recall(config, name)) for name in names
        ]
        # Under no device: how long tests took on CPU workers.
        self._by_context.append((0, recall(config, "")))
        # Slots are as large as needs where the plan does not pack: nothing would be gained.
        self._packs = "packed" in started.settings.presets

    def __call__(self, nodeid: str) -> tuple[int | None, float | None]:
        """Bytes, of several models of device the most, and seconds."""
        needs, durations = [], []
        for context, tests in self._by_context:
            learned = tests.get(nodeid)
            if learned is None:
                continue
            need = learned.need(context) if self._packs else None
            needs += [] if need is None else [need]
            durations += [] if learned.duration is None else [learned.duration]
        return max(needs, default=None), max(durations, default=None)


def may_have_needs(started: Started, config: pytest.Config) -> bool:
    """Whether tests may have needs of their own, which no slot must cap.

    Markers are known only once tests are collected, long after workers have got their caps:
    what an earlier run saw has to do.
    """
    settings = started.settings
    means = {name for alias in settings.markers for name, _ in alias.meanings}
    if settings.vram or "vram" in means or "packed" in settings.presets:
        return True
    cache = getattr(config, "cache", None)
    return cache is not None and cache.get(CACHE_KEY, None) is True


def remember_needs(config: pytest.Config) -> None:
    """Tell the next run that tests have needs of their own."""
    cache = getattr(config, "cache", None)
    if cache is not None and cache.get(CACHE_KEY, None) is not True:
        cache.set(CACHE_KEY, True)
