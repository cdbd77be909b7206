"""Who holds the VRAM of a device at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Held(NamedTuple):
    """The VRAM of one device, by holder; bytes."""

    total: int
    used: int
    free: int
    ollama: int
    """By Ollama's processes, their contexts included; without a word of NVML's on processes,
    what `/api/ps` tells."""
    workers: Mapping[str, int] | None
    """By worker, with all that it started; None where the driver does not tell whose VRAM is
    whose."""
    seen_of_ollama: int | None = None
    """What NVML shows of Ollama's processes; None where it shows none of them."""

    @property
    def tests(self) -> int | None:
        """By all workers together; None where the driver does not tell."""
        return None if self.workers is None else sum(self.workers.values())

    @property
    def others(self) -> int | None:
        """By everybody else; None where the driver does not tell."""
        if self.tests is None:
            return None
        return max(0, self.used - self.ollama - self.tests)

    @property
    def beside_ollama(self) -> int:
        """By everybody but Ollama."""
        return max(0, self.used - self.ollama)
