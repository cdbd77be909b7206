"""The presets: named sets of values, written as a user would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PRESETS: Mapping[str, Mapping[str, str]] = {
    "conservative": {
        "ollama_vram_reservation_mb": "12288",
        "max_workers_per_gb": "0.25",
        "min_vram_per_worker_gb": "3.0",
        "max_workers_per_gpu": "2",
    },
    "aggressive": {
        "ollama_vram_reservation_mb": "11264",
        "max_workers_per_gb": "0.33",
        "min_vram_per_worker_gb": "2.5",
        "max_workers_per_gpu": "0",
    },
    "ultra-conservative": {
        "ollama_vram_reservation_mb": "14336",
        "max_workers_per_gb": "0.2",
        "min_vram_per_worker_gb": "4.0",
        "max_workers_per_gpu": "2",
    },
    "no-ollama": {
        "ollama_vram_reservation_mb": "0",
        "enable_ollama_detection": "false",
        "max_workers_per_gb": "0",
        "max_workers_per_gpu": "0",
    },
    "packed": {
        "min_vram_per_worker_gb": "1.0",
        "max_workers_per_gb": "0",
        "max_workers_per_gpu": "0",
    },
}


def merged(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What the named presets set together: key -> (value, name of the preset that set it)."""
    return {key: (value, name) for name in names for key, value in PRESETS[name].items()}
