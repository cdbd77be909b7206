"""pytest-gpushare: xdist workers sized by VRAM, so that GPU tests and Ollama share a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpushare.gpu.devices import ComputeMode, Device, GpuProcess
    from pytest_gpushare.place import Place, current
    from pytest_gpushare.planning.plan import DevicePlan, Limit, Plan, Request, Slot

    __version__: str

__all__ = [
    "ComputeMode",
    "Device",
    "DevicePlan",
    "GpuProcess",
    "Limit",
    "Place",
    "Plan",
    "Request",
    "Slot",
    "__version__",
    "current",
]

_MODULES = {
    "ComputeMode": "gpu.devices",
    "Device": "gpu.devices",
    "DevicePlan": "planning.plan",
    "GpuProcess": "gpu.devices",
    "Limit": "planning.plan",
    "Place": "place",
    "Plan": "planning.plan",
    "Request": "planning.plan",
    "Slot": "planning.plan",
    "current": "place",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: together these modules cost more than the whole idle plugin.
    if name == "__version__":
        from importlib.metadata import version

        return version("pytest-gpushare")
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"pytest_gpushare.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _moved(module: str, name: str) -> Any:
    """A type of this package under the path of a deprecated module, with a warning."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    import warnings

    warnings.warn(
        f"{module}.{name} has moved: import it from pytest_gpushare",
        DeprecationWarning,
        stacklevel=3,
    )
    return __getattr__(name)
