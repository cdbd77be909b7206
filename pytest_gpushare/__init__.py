"""pytest-gpushare: xdist workers sized by VRAM, so that GPU tests and Ollama share a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpushare.place import Place, current

    __version__: str

__all__ = ["Place", "__version__", "current"]


def __getattr__(name: str) -> Any:
    # Loaded when somebody asks: together they cost more than the whole idle plugin.
    if name == "__version__":
        from importlib.metadata import version

        return version("pytest-gpushare")
    if name in ("Place", "current"):
        from pytest_gpushare import place

        return getattr(place, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
