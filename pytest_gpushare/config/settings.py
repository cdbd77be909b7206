"""The resolved settings: frozen values in bytes and seconds, without I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.text import printable

if TYPE_CHECKING:
    from pytest_gpushare.config.kinds import Alias, VramRule


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for, after precedence; sizes in bytes, times in seconds."""

    ollama_vram_reservation: Fraction | None
    """VRAM kept for Ollama on each device that it may use, in bytes; None: as much as
    `ollama_models` need."""
    safety_buffer: Fraction
    """VRAM left free on each device, in bytes."""
    max_workers_per_gb: Fraction
    """GPU workers per GB of a device's budget; 0: no limit."""
    min_vram_per_worker: Fraction
    """The smallest slot, in bytes; exact, so perhaps a fraction of a byte."""
    max_workers_per_gpu: int
    """The most GPU workers on one device; 0: no limit."""
    ram_per_worker: Fraction
    """Host RAM per worker in bytes; 0: no limit."""
    presets: tuple[str, ...]
    """The presets in force, later ones win."""
    enable_ollama_detection: bool
    """Whether Ollama is asked at all."""
    fallback_to_cpu_when_constrained: bool
    """CPU workers where no GPU worker fits; else `NoRoomError`."""
    ollama_host: str
    """Where Ollama listens, as the user wrote it; empty: the environment decides."""
    ollama_unreachable: str
    """`reserve`, `release` or `fail`: what becomes of the reservation without an answer."""
    ollama_models: tuple[str, ...]
    """The models that the run relies on, as the user wrote them."""
    ollama_preload: bool
    """Whether these are loaded before the workers start."""
    ollama_preload_failed: str
    """`warn` or `fail`: what happens where one cannot be loaded."""
    ollama_context: int | None
    """Tokens of context that the server gives a model which names none; None: by its VRAM."""
    ollama_parallel: int
    """Requests that the server answers at once for each model."""
    ollama_kv_cache_type: str
    """`f16`, `q8_0` or `q4_0`: the type of the server's KV caches."""
    ollama_gpu: tuple[str, ...]
    """Indices or UUIDs of the devices that Ollama uses, or ("auto",) or ("none",)."""
    ollama_timeout: Fraction
    """Seconds for all questions to Ollama at the start together."""
    marker: str
    """The marker of GPU tests."""
    markers: tuple[Alias, ...]
    """What other markers mean."""
    vram: tuple[VramRule, ...]
    """Needs by node id; the first that matches holds."""
    cpu_workers: int | None
    """CPU workers beside the GPU workers; None: the CPUs that GPU workers leave."""
    without_gpu: str
    """`run`, `skip` or `fail`: what a GPU test does when no GPU can be had."""
    empty_caches: str
    """`when-needed`, `always` or `never`."""
    pressure_timeout: Fraction
    """Seconds that GPU tests wait for VRAM which others took."""
    cap_vram: bool
    """Whether the frameworks of GPU workers are capped at their slots."""
    visible_devices: str
    """`own` or `all`: what a GPU worker sees; its own device comes first."""
    device_names: str
    """`uuid` or `index`: how CUDA_VISIBLE_DEVICES is written."""
    config: str
    """The JSON file that was read; empty: none."""
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Key -> where its value came from, as a user would say it."""


_FORMATS = (".json", ".html")


def report_files(given: Sequence[str] | None, directory: Path) -> tuple[Path, ...]:
    """The files, absolute, each once; relative ones are relative to `directory`.

    Raises `SettingsError` for a name that says no format.
    """
    found: dict[Path, None] = {}
    for text in given or ():
        shown = printable(text)[-120:]
        if Path(text).suffix.lower() not in _FORMATS:
            raise SettingsError(
                f"--gpu-share-report {shown}: no format is known by this name: allowed is a "
                f"file that ends in {' or '.join(_FORMATS)}"
            )
        try:
            path = directory / Path(text).expanduser()
        except RuntimeError:
            raise SettingsError(
                f"--gpu-share-report {shown}: no such home directory: check the path"
            ) from None
        found[path] = None
    return tuple(found)
