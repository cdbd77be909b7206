"""Which frameworks are installed, read from metadata: importing one costs seconds and VRAM."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec

_DISTRIBUTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("torch", ("torch",)),
    "JAX": ("jax", ("jax",)),
    "CuPy": ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")),
    "TensorFlow": ("tensorflow", ("tensorflow", "tensorflow-cpu", "tf-nightly")),
}


def installed() -> dict[str, str]:
    """Framework -> version, of those that this Python can import."""
    return {
        name: version
        for name, (module, distributions) in _DISTRIBUTIONS.items()
        if _is_there(module) and (version := _first(distributions)) is not None
    }


def _is_there(module: str) -> bool:
    # Looking for a module that is not there is far cheaper than looking for its metadata.
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _first(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except Exception:
            # Not installed, or its metadata is broken: either way nothing is known of it.
            continue
    return None
