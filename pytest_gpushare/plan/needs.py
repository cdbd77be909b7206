"""What a test needs of the GPU: from its markers, rules, what was learned, or its slot."""

from __future__ import annotations

from typing import NamedTuple


class Need(NamedTuple):
    """The VRAM that a worker's whole process holds while a test runs, its context included."""

    vram: int | None = None
    """Bytes on each of its devices; None: its worker's slot."""
    devices: int = 1
    exclusive: bool = False
    """No other GPU test runs on its devices meanwhile."""
    required: bool = False
    """Without a GPU it fails, whatever `without_gpu` says."""
    source: str = "slot"
    """`marker`, `rule`, `learned` or `slot`: where `vram` is from."""
