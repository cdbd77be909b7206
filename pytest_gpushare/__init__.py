"""pytest-gpushare: xdist workers sized by VRAM, so that GPU tests and Ollama share a GPU."""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    # Read when somebody asks: importlib.metadata costs more than the whole idle plugin.
    if name == "__version__":
        from importlib.metadata import version

        return version("pytest-gpushare")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
