"""What reads the devices of this host, and knows the processes of the servers that use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpushare.gpu.vendors import Probe


def host_probe() -> Probe:
    """The probe for planning, the run, leases, `watch` and `doctor`; not open yet.

    Another server's function that names its processes is asked here, too.
    """
    # Imported here: a what-if opens no probe.
    from pytest_gpushare.gpu.vendors import open_later
    from pytest_gpushare.ollama.reservation import neighbour_of

    return open_later(neighbour_of)
