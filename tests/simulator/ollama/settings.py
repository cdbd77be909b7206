"""How a simulated Ollama is set up: what the real one takes from its environment."""

from __future__ import annotations

from dataclasses import dataclass

from ..sizes import Size
from .placement import MARGIN


@dataclass(frozen=True)
class Settings:
    """How the server is set up.

    keep_alive: how long an idle model stays: seconds, or text such as "5m".
    context_length: tokens of context where a request names none; 0: by the total VRAM.
    context: bytes that a runner takes on each device beside the model.
    parallel: requests at once per model; the KV cache is that many times as large.
    max_loaded: models per GPU.
    max_queue: requests that may wait for a load.
    cpu_bytes: bytes that `/api/ps` reports as `size_vram` of a model without a layer on the GPU.
    margin: bytes that must stay free on a device at load.
    visible: CUDA_VISIBLE_DEVICES of the server; None: every device.
    load_delay, generate_delay: seconds that loading, and answering a prompt, takes.
    pull_delay: seconds that a pull takes.
    unload_delay: seconds from the moment when a model leaves /api/ps to the moment when
        its runner ends.
    """

    keep_alive: float | str = "5m"
    context_length: int = 4096
    context: Size = 0
    parallel: int = 1
    max_loaded: int = 3
    max_queue: int = 512
    cpu_bytes: Size = 0
    margin: Size = MARGIN
    visible: str | None = None
    load_delay: float = 0.0
    generate_delay: float = 0.0
    unload_delay: float = 0.0
    pull_delay: float = 0.0
