"""What reads the devices of this host, and knows the processes of the servers that use them.

The one module that imports a vendor's: others ask for a reader here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpushare.gpu.readings import DeviceReader, Probe


def host_probe() -> Probe:
    """The probe for planning, the run, leases, `watch` and `doctor`; not open yet.

    Another server's function that names its processes is asked here, too; another vendor's
    devices are read by another class with the methods of `Probe`.
    """
    # Imported here: a what-if opens no probe.
    from pytest_gpushare.gpu.nvml import Nvml
    from pytest_gpushare.ollama.reservation import neighbour_of

    return Nvml(neighbour_of)


def device_reader(uuid: str) -> DeviceReader:
    """What a worker reads of its own device; opened by the first reading."""
    from pytest_gpushare.gpu.nvml import OneDevice

    return OneDevice(uuid)


def own_vram(uuid: str) -> int | None:
    """Bytes of this process on the device of that UUID; None where the driver gives none in
    time."""
    from pytest_gpushare.gpu import nvml

    return nvml.own_vram(uuid)
