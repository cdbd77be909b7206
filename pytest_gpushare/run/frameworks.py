"""Which frameworks are installed, read from metadata: importing one costs seconds and VRAM."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

_DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "JAX": ("jax",),
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"),
    "TensorFlow": ("tensorflow", "tensorflow-cpu", "tf-nightly"),
}


def installed() -> dict[str, str]:
    """Framework -> version, of those that this Python can import."""
    return {
        name: version
        for name, distributions in _DISTRIBUTIONS.items()
        if (version := _first(distributions)) is not None
    }


def _first(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except Exception:
            # Not installed, or its metadata is broken: either way nothing is known of it.
            continue
    return None
