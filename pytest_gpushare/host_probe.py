"""The probe of this host's devices, which knows the processes of the servers beside the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpushare.gpu.readings import Probe


def host_probe() -> Probe:
    """The probe for planning, the run, leases, `watch` and `doctor`; not open yet.

    Another server's function that names its processes is asked here, too; another vendor's
    devices are read by another class with the methods of `Probe`.
    """
    # Imported here: a what-if opens no probe.
    from pytest_gpushare.gpu.nvml import Nvml
    from pytest_gpushare.ollama.reservation import neighbour_of

    return Nvml(neighbour_of)
