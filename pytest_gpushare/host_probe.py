"""What reads the devices of this host, and names the processes of the servers that use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpushare.gpu.vendors import Probe


def host_probe() -> Probe:
    """The probe for planning, the run, leases, `watch` and `doctor`; not open yet."""
    # Imported here: a what-if opens no probe.
    from pytest_gpushare.gpu.vendors import open_later
    from pytest_gpushare.neighbours import owner_of

    return open_later(owner_of)
