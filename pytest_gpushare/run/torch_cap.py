"""torch's share of its device, set anew for a test with a need of its own.

The environment caps torch at the slot for the whole life of a worker. Once CUDA is up there,
torch takes another share at any time; CUDA is never brought up for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from pytest_gpushare.run.caps import torch_fraction

_CLOSE = 1e-4
"""Fractions travel as floats through C++."""


class TorchCap:
    """What torch may take, in a process whose torch the plugin has capped."""

    def __init__(
        self, environment: Mapping[str, str], modules: Mapping[str, Any] = sys.modules
    ) -> None:
        self._modules = modules
        self._usual = torch_fraction(environment)
        self._wanted: int | None = None
        """Bytes for the running test; None: as the environment says."""
        self._set: dict[int, float] = {}
        """Device -> the share that was set last."""

    @property
    def size(self) -> int | None:
        """Bytes at which torch is capped for the running test; None: as usual."""
        return self._wanted if self._usual is not None else None

    def set(self, size: int | None) -> None:
        """Cap torch at so many bytes; None: at its usual share again."""
        if size == self._wanted:
            return
        self._wanted = size
        self._apply()

    def watch(self) -> Callable[[], None]:
        """Set the share of the test in which CUDA comes up, too; the result undoes it."""
        from pytest_gpushare.run.post_import import after_import

        if self._usual is None:
            return lambda: None
        return after_import({"torch": lambda torch: torch.cuda._lazy_call(self._apply)})

    def _apply(self) -> None:
        torch = self._modules.get("torch")
        if self._usual is None or torch is None:
            return
        try:
            cuda = torch.cuda
            if cuda.is_initialized():
                for device in range(cuda.device_count()):
                    self._apply_to(cuda, device, self._usual)
        except Exception:
            # The usual cap holds then; the test runs all the same.
            return

    def _apply_to(self, cuda: Any, device: int, usual: float) -> None:
        tell = getattr(cuda, "get_per_process_memory_fraction", None)
        if tell is not None:
            found, expected = tell(device), self._set.get(device)
            known = (usual, 1.0) if expected is None else (expected,)
            if all(abs(found - fraction) > _CLOSE for fraction in known):
                # Somebody else has set it since: theirs stands from now on.
                self._usual = None
                return
        total = cuda.get_device_properties(device).total_memory
        fraction = usual if self._wanted is None else min(1.0, self._wanted / total)
        cuda.set_per_process_memory_fraction(fraction, device)
        self._set[device] = fraction
