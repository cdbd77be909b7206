"""The GPU that is checked, as NVML tells it, and how the plugin is found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "pytest_gpushare.plugin"
SIMULATED = "GPUSHARE_SIM_STATE is set: NVML would be the simulated one, not a real GPU's"
MB = 1024**2

PACKAGES = (
    *("pytest", "pytest-xdist", "pytest-gpushare", "nvidia-ml-py"),
    *("torch", "jax", "cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "tensorflow"),
)


@dataclass(frozen=True)
class Card:
    """One device that this environment may use; sizes in bytes."""

    uuid: str
    name: str
    total: int
    free: int
    driver: str
    cuda: str
    """The newest CUDA that the driver serves, such as `13.0`."""
    shared: bool
    """Whether several processes may use it at once (compute mode DEFAULT)."""
    others: tuple[str, ...]
    """UUIDs of the further devices that may be used."""


class NoCardError(Exception):
    """Why nothing can be checked here."""


def find_card() -> Card:
    """The first visible device; NoCardError tells why there is none."""
    if os.environ.get("GPUSHARE_SIM_STATE"):
        raise NoCardError(SIMULATED)
    try:
        import pynvml

        from pytest_gpushare.gpu.devices import ComputeMode
        from pytest_gpushare.gpu.nvml import Nvml
    except ImportError as error:
        raise NoCardError(f"{error.name} cannot be imported") from None
    nvml = Nvml()
    nvml.open()
    try:
        facts = nvml.read(os.environ)
        if not facts.devices:
            raise NoCardError(f"no GPU: {facts.absence}")
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    finally:
        nvml.close()
    first, *others = facts.devices
    return Card(
        first.uuid,
        first.name,
        first.total,
        first.free,
        facts.driver or "unknown",
        f"{number // 1000}.{number % 1000 // 10}",
        first.compute_mode is ComputeMode.DEFAULT,
        tuple(device.uuid for device in others),
    )


def versions() -> dict[str, str]:
    """Package -> version, of those that matter and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def plugin_arguments() -> list[str]:
    """What pytest must be told where the package is not installed but only on the path."""
    names = {entry.value for entry in entry_points(group="pytest11")}
    return [] if PLUGIN in names else ["-p", PLUGIN]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a checked one, without what would change its caps."""
    dropped = ("PYTEST", "XLA_", "TF_", "CUPY_GPU", "PYTORCH_", "CUDA_DEVICE_ORDER", "OLLAMA")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(dropped)}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    if plugin_arguments():
        kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return {**kept, "PYTHONIOENCODING": "utf-8", **changes}
