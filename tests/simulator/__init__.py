"""A simulated machine with NVIDIA GPUs, for tests.

`build` makes a ``libnvidia-ml.so.1`` that the real pynvml loads in a subprocess started
with `Machine.env`; `Machine` holds the VRAM that both see; ``gpusim`` is what a test in
such a subprocess uses; `simulator.ollama` is a neighbour that takes VRAM as Ollama does.
"""

from .build import LIBRARY, VARIANTS, CompilerMissingError, build
from .hardware import Device, DeviceState, Mig, OutOfMemoryError
from .machine import STATE_VARIABLE, Machine
from .sizes import to_bytes, to_text

__all__ = [
    "LIBRARY",
    "STATE_VARIABLE",
    "VARIANTS",
    "CompilerMissingError",
    "Device",
    "DeviceState",
    "Machine",
    "Mig",
    "OutOfMemoryError",
    "build",
    "to_bytes",
    "to_text",
]
