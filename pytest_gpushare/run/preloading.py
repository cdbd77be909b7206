"""Probing where models have to be loaded first: probe, load, probe again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pytest_gpushare.errors import PreloadError, SettingsError
from pytest_gpushare.probe.facts import LoadedModel
from pytest_gpushare.probe.together import Probes, probe
from pytest_gpushare.run.kept_loaded import KeptLoaded, usual_keep_alive
from pytest_gpushare.run.live import LiveVram
from pytest_gpushare.run.preload import Preloaded, preload
from pytest_gpushare.settings.values import Settings


class Loading(NamedTuple):
    """What became of the models that the run relies on."""

    kept: KeptLoaded | None = None
    """The service that keeps those which we loaded; None where there are none."""
    told: tuple[str, ...] = ()
    """A sentence on each model that was loaded."""
    problems: tuple[str, ...] = ()

    def undo(self) -> None:
        """Give the models their usual keep-alive."""
        if self.kept is not None:
            self.kept.stop()


def check(settings: Settings) -> None:
    """Raises `SettingsError` where there is nothing that could be loaded."""
    if not settings.ollama_models:
        raise SettingsError(
            "gpu_share_ollama_preload = true: there is nothing to load: name the models in "
            "gpu_share_ollama_models"
        )
    if not settings.enable_ollama_detection:
        raise SettingsError(
            "gpu_share_ollama_preload = true, but gpu_share_enable_ollama_detection = false: "
            "no request is made to Ollama: switch one of them off or on"
        )


def load_first(
    settings: Settings, probes: Probes, environment: Mapping[str, str]
) -> tuple[Probes, Loading]:
    """Load what is missing, and probe anew, so that the plan knows it as resident.

    Raises `PreloadError` where a model is missing that must not be. `probes` are closed.
    """
    ours: list[LoadedModel] = []
    server = probes.ollama.server
    usual = usual_keep_alive(environment)
    progress = _Progress()
    try:
        done = preload(
            settings.ollama_models, probes.ollama, _free_vram(probes), progress.show, ours
        )
    except BaseException:
        # Ctrl-C above all: what was loaded until then is not to stay for an hour.
        if server is not None and ours:
            KeptLoaded(server, ours, usual).stop()
        raise
    finally:
        progress.clear()
    kept = KeptLoaded(server, ours, usual) if server is not None and ours else None
    problems = tuple(
        f"{problem.model} was not preloaded: {problem.text}" for problem in done.problems
    )
    loading = Loading(kept, done.told, problems)
    if problems and settings.ollama_preload_failed == "fail":
        loading.undo()
        raise PreloadError(_failure(done))
    if not ours:
        return probes, loading
    probes.close()
    try:
        return probe(settings, (), environment), loading
    except BaseException:
        loading.undo()
        raise


def _failure(done: Preloaded) -> str:
    each = "; ".join(f"{model}: {text}" for model, text in done.problems)
    return (
        f"gpu-share: not preloaded: {each}; gpu_share_ollama_preload_failed is fail: free VRAM, "
        "name other models, or set it to warn"
    )


def _free_vram(probes: Probes) -> Callable[[], int | None]:
    """Tells the bytes that are free on the roomiest device; None where NVML does not."""
    if probes.nvml is None or not probes.gpus.all_devices:
        return lambda: None
    live = LiveVram(probes.nvml)
    return lambda: max((m.free for m in live.memory(0.0).devices.values()), default=None)


class _Progress:
    """A line that is written over; a log, which would keep every one of them, gets none."""

    def __init__(self) -> None:
        stream = sys.stderr
        self._stream = stream if stream is not None and stream.isatty() else None
        self._width = 0

    def show(self, text: str) -> None:
        """What is going on."""
        if self._stream is not None:
            line = f"gpu-share: {text}"
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._stream.flush()
            self._width = len(line)

    def clear(self) -> None:
        """Leave the line empty."""
        if self._stream is not None and self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._stream.flush()
