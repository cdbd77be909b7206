"""What tests need of JAX, on simulated VRAM: arrays from a pool that only grows."""

from __future__ import annotations

import weakref

from ._src import xla_bridge
from ._src.xla_bridge import Device, XlaRuntimeError


class Array:
    """So many bytes of the first device."""

    def __init__(self, nbytes: int) -> None:
        (device, *_) = devices()
        device.take(nbytes)
        self.nbytes = nbytes
        self.delete = weakref.finalize(self, device.give, nbytes)
        self.delete.atexit = False


def ones(nbytes: int) -> Array:
    """As `jax.numpy.ones(nbytes, dtype="uint8")`."""
    return Array(nbytes)


def devices() -> list[Device]:
    return xla_bridge.backend()


local_devices = devices


def clear_caches() -> None:
    xla_bridge.caches_cleared += 1


__all__ = ["XlaRuntimeError", "clear_caches", "devices", "local_devices", "ones"]
