"""What the other sessions of a host leave to this one, and what this one publishes for them."""

from __future__ import annotations

from pytest_gpushare.leases.claims import DeviceClaims, Share
from pytest_gpushare.leases.records import DeviceLease, Seniority
from pytest_gpushare.scheduler.sharing import OwnShare
from pytest_gpushare.scheduler.types import DeviceCapacity, DeviceReading, Others


def share_of(own: OwnShare, seniority: Seniority) -> Share:
    """What this session has of a device, as the others see it."""
    return Share(seniority, own.kept, own.committed - own.kept, own.idle, own.most)


def others_on(
    device: DeviceCapacity,
    reading: DeviceReading,
    claims: DeviceClaims,
    own: OwnShare,
    share: Share,
    ticket: int,
) -> Others:
    """What the other sessions make of a device, from their records and a reading of it.

    `ticket` is this session's place in the queue, 0 for none.
    """
    resident = device.resident if reading.resident is None else reading.resident
    # Sessions may keep different amounts for Ollama: the largest counts, once.
    more = max(0, max(own.reservation, claims.reserved) - resident)
    more -= max(0, own.reservation - resident)
    if reading.free is None:
        left = device.budget - own.committed - claims.leased - more
        capacity = device.budget
        claims = claims._replace(counts_twice=False)
    else:
        left = reading.free - own.reserved - own.outstanding - claims.leased - more
        capacity = reading.free - own.reserved - more + own.present + claims.held
        if claims.counts_twice:
            # What the others hold of it is not known.
            capacity = max(capacity, device.budget - more)
    left = max(0, left)
    ahead = claims.ahead(left, ticket, share, capacity, own.reservation)
    return Others(
        claimed=claims.leased + more + ahead,
        lent=claims.leased + claims.held + ahead + max(0, more),
        keepable=claims.keepable(capacity, share),
        owed=claims.owed(left, share, own.want),
        lacks=claims.lacks(left, share, own.want),
        are_waiting=bool(claims.waiting),
    )


def lease_on(device: DeviceCapacity, own: OwnShare, *, is_shared: bool) -> DeviceLease:
    """What this session publishes for a device: all that it may use while it is alone there."""
    lease = own.committed if is_shared else max(own.committed, device.budget)
    return DeviceLease(
        max(0, lease),
        want=max(0, own.want) if is_shared else 0,
        reserved=own.published,
        spare=max(0, lease - own.kept),
        idle=max(0, own.idle),
        most=max(0, own.most),
    )
