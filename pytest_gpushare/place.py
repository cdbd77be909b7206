"""Where the running process was placed: for tests, conftests and what they start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """The place of one pytest process in the plan of its run."""

    role: str
    """`gpu`: sees the device below; `cpu`: sees none; `unplanned`: the plugin did not place it."""
    device: str | None = None
    """UUID of its GPU or MIG instance, as NVML gives it."""
    name: str | None = None
    """Name of the device, such as `NVIDIA GeForce RTX 3090 Ti`."""
    index: str | None = None
    """NVML's index of the device on the host, as nvidia-smi shows it; `0.1` for MIG."""
    vram: int = 0
    """Bytes of VRAM of its slot; the CUDA context counts towards it. 0 without a slot."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """The run's plan: `gpu_workers`, `cpu_workers`, `limited_by`, `slots` (a UUID and bytes each);
    empty where the process is unplanned."""

    @property
    def planned(self) -> bool:
        """Whether the plugin placed this process."""
        return self.role != "unplanned"


UNPLANNED = Place("unplanned")
_place = UNPLANNED


def current() -> Place:
    """The place of this process; one with the role `unplanned` where the plugin is not active.

    For code without fixtures. Valid from the moment at which the initial conftests are loaded;
    a pytest that a test starts as a process of its own has a place of its own.
    """
    return _place


def entered(place: Place) -> Callable[[], None]:
    """Make a place the current one until the result is called."""
    global _place
    before, _place = _place, place
    return lambda: _set(before)


def _set(place: Place) -> None:
    global _place
    _place = place
