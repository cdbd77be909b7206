"""Loading Ollama's models before the plan is made, which then knows them as resident."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import PreloadError, SettingsError
from pytest_gpushare.gpu.readings import Live, LiveVram
from pytest_gpushare.leases.ledger import directory_of
from pytest_gpushare.leases.lessee import Lessee, models_in_use
from pytest_gpushare.ollama.keep_alive import KeepAlive, PreloadedModel
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.ollama.preload import Preloaded, ollama_pids, preload, vram_of
from pytest_gpushare.planning.startup import Probes, probe
from pytest_gpushare.service import AtSigterm
from pytest_gpushare.waiting_line import WaitingLine


class Loading(NamedTuple):
    """What became of the models that the run relies on."""

    kept: AtSigterm[KeepAlive] | None = None
    """The running service that keeps those which we loaded; None where there are none."""
    sentences: tuple[str, ...] = ()
    """A sentence on each model that was loaded."""
    problems: tuple[str, ...] = ()

    def look_by(self, live: Live | None, lessee: Lessee | None) -> None:
        """From now on see by these which processes Ollama has, and what other sessions use."""
        if self.kept is not None:
            self.kept.service.pids = ollama_pids(live)
            if lessee is not None:
                self.kept.service.used_by_others = lessee.models_of_others

    def undo(self) -> None:
        """Give the models the keep-alive that the server itself gives."""
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
    settings: Settings,
    probes: Probes,
    environment: Mapping[str, str],
    sizes: KnownSizes = NOTHING_KNOWN,
    line: WaitingLine | None = None,
) -> tuple[Probes, Loading]:
    """Load what is missing, and probe again, so that the plan knows it as resident.

    `line` shows what is being loaded; None: the user's terminal.

    Raises `PreloadError` where a model is missing that must not be. `probes` are closed.
    """
    ours: list[PreloadedModel] = []
    server, line = probes.ollama.server, line or WaitingLine()
    # From the first load on: another load, or a wait for other sessions, may take minutes.
    kept = None if server is None else AtSigterm(KeepAlive(server, ours))
    if kept is not None:
        kept.start()
    try:
        done = preload(
            settings.ollama_models,
            probes.ollama,
            vram_of(
                settings, probes.gpus, probes.ollama, _live(probes), environment, sizes
            )._replace(used_by_others=lambda: models_in_use(directory_of(settings.leases))),
            line.progress,
            ours,
        )
        if done.problems and settings.ollama_preload_failed == "fail":
            raise PreloadError(_failure(done))
        if done.ours and kept is not None:
            probes.close()
            probes = probe(settings, (), environment)
            kept.service.pids = ollama_pids(_live(probes))
    except BaseException:
        # Ctrl-C above all: what was loaded until then stays as long as the server keeps it.
        if kept is not None:
            kept.stop()
        raise
    finally:
        line.clear()
    problems = tuple(
        f"{problem.model} was not preloaded: {problem.text}" for problem in done.problems
    )
    if not done.ours and kept is not None:
        kept.stop()
        kept = None
    return probes, Loading(kept, done.events, problems)


def _failure(done: Preloaded) -> str:
    each = "; ".join(f"{model}: {text}" for model, text in done.problems)
    return (
        f"gpu-share: not preloaded: {each}; gpu_share_ollama_preload_failed is fail: free VRAM, "
        "name other models, or set it to warn"
    )


def _live(probes: Probes) -> LiveVram | None:
    """Readings of the devices; None under a what-if, or where there is no device."""
    if probes.devices is None or not probes.gpus.all_devices:
        return None
    return LiveVram(probes.devices)
