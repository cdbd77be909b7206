"""Leases: VRAM that a session claims, so that several sessions of one host share a device.

`acquire` is for scripts and tests of other projects; runs under the plugin lease by themselves.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.units import GB, format_gb, parse_size

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.gpu.devices import Device
    from pytest_gpushare.leases.lessee import Lessee, View

__all__ = ["Lease", "LeaseUnavailable", "acquire"]

SAFETY_BUFFER = GB
"""Bytes that a lease leaves free on its device."""


DEFAULT_WAIT = 300.0
"""Seconds without progress of the others for which VRAM that they lease is waited for."""


class LeaseUnavailable(GpuShareError):
    """The VRAM is not to be had; the text says who holds it."""


class Lease(NamedTuple):
    """VRAM that is leased."""

    device: str
    """UUID."""
    size: int
    """Bytes."""
    descriptor: int | None = None
    """A process that inherits this open file keeps the lease; None where it is part of a run's."""
    environment: Mapping[str, str] = {}
    """The variable by which a process sees the device; empty where this one sees it already."""


class AcquireTerms(NamedTuple):
    """How long to wait, and the ledger to use, as settings say it."""

    wait: float | None
    directory: str

    @classmethod
    def of(cls, settings: Settings) -> AcquireTerms:
        """Those of a run."""
        return cls(None if settings.wait is None else float(settings.wait), settings.leases)


_terms: AcquireTerms | None = None

Raise = Callable[[int, float | None], contextlib.AbstractContextManager[None]]
"""Has the running test use so many bytes within a block, after waiting at most so many seconds."""

_raise: Raise | None = None
_most: Callable[[int], int] | None = None


def set_terms(terms: AcquireTerms) -> Callable[[], None]:
    """Have `acquire` follow the settings of a run in this process until the result is called."""
    global _terms
    before, _terms = _terms, terms
    return lambda: _set(before)


def _set(terms: AcquireTerms | None) -> None:
    global _terms
    _terms = terms


def set_need_hooks(raised: Raise | None, most: Callable[[int], int] | None = None) -> None:
    """Have `acquire` raise the need of the test that runs, where tests are admitted by needs.

    `most` raises it as far as that goes at once; see `most_for_test`.
    """
    global _raise, _most
    _raise, _most = raised, most


def most_for_test(size: int) -> int:
    """Bytes that the running test may use: `size`, or what other sessions leave of it."""
    return size if _most is None else _most(size)


def _terms_now() -> AcquireTerms:
    """Those of the run, else of a run that was started in the working directory."""
    if _terms is not None:
        return _terms
    from pytest_gpushare.config.sources import gather_near, load

    return AcquireTerms.of(load(gather_near(Path.cwd())))


@contextlib.contextmanager
def acquire(
    device: str | int, size: str | int, wait: float | None = None, *, directory: str = ""
) -> Iterator[Lease]:
    """Lease VRAM for as long as the block runs.

    `device` is an index or a UUID, `size` is in bytes or a text such as `8GB`. `wait` is in
    seconds, `directory` is that of the ledger; without them the settings `gpu_share_wait` and
    `gpu_share_leases` of the run hold, or those that a run in the working directory would read.
    In a GPU worker of a run the need of the running test is raised to it, on the worker's own
    device; where tests have no needs, what goes beyond the slot is leased. Raises
    `LeaseUnavailable`.
    """
    from pytest_gpushare.place import current

    __tracebackhide__ = True
    wanted = size if isinstance(size, int) else int(parse_size(size, "MB"))
    place = current()
    is_own = place.role == "gpu" and (device in (place.device, place.index) or device == 0)
    own = place.vram if is_own else 0
    if wait is None or not directory:
        terms = _terms_now()
        wait = terms.wait if wait is None else wait
        directory = directory or terms.directory
    if is_own and _raise is not None:
        with _raise(wanted, wait):
            yield Lease(str(place.device), wanted)
        return
    if own >= wanted:
        yield Lease(str(place.device), wanted)
        return
    with _opened(device, directory) as (found, lessee):
        shown = {found.variable: found.selector}
        if lessee is None:
            yield Lease(found.uuid, wanted, None, shown)
            return
        _claim(lessee, found, wanted - own, wait)
        yield Lease(found.uuid, wanted, lessee.ledger.descriptor, shown)


@contextlib.contextmanager
def _opened(device: str | int, directory: str) -> Iterator[tuple[Device, Lessee | None]]:
    """The device, and this process's part in the ledger; None where leases are off."""
    from pytest_gpushare.gpu.host import pid_space
    from pytest_gpushare.gpu.readings import LiveVram
    from pytest_gpushare.host_probe import host_probe
    from pytest_gpushare.leases.ledger import AUTO, OFF, Ledger, directory_of
    from pytest_gpushare.leases.lessee import Lessee, LiveReadings
    from pytest_gpushare.leases.records import LeaseRecord
    from pytest_gpushare.timed import call_within

    with contextlib.ExitStack() as at_end:
        probe = host_probe()
        at_end.callback(call_within, 1.0, probe.close)
        probe.open()
        facts = probe.read({})
        names = {name: d for d in facts.all_devices for name in (d.index, d.uuid)}
        found = names.get(str(device))
        if found is None:
            known = ", ".join(d.index for d in facts.all_devices)
            why = f"there is {known}" if known else facts.absence
            raise LeaseUnavailable(f"no device {str(device)[:100]}: {why}")
        if directory == OFF:
            yield found, None
            return
        live = LiveVram(probe)
        at_end.callback(live.close)
        with _as_unavailable():
            ledger = Ledger(directory_of(directory or AUTO))
        record = LeaseRecord(os.getpid(), pid_space() or "", str(Path.cwd()), began=time.time())
        lessee = Lessee(ledger, record, {found.uuid: found.total}, LiveReadings(live))
        at_end.callback(lessee.close)
        yield found, lessee


@contextlib.contextmanager
def _as_unavailable() -> Iterator[None]:
    from pytest_gpushare.leases.ledger import LedgerError

    try:
        yield
    except LedgerError as error:
        raise LeaseUnavailable(f"no VRAM is leased: {error}") from None


def _claim(lessee: Lessee, device: Device, size: int, wait: float | None) -> None:
    from pytest_gpushare.leases.claims import Naming
    from pytest_gpushare.leases.lessee import Wish
    from pytest_gpushare.leases.records import DeviceLease
    from pytest_gpushare.waiting_line import WaitingLine

    if size > device.total:
        raise LeaseUnavailable(
            f"{format_gb(size)} of VRAM is more than {device.label} has: {format_gb(device.total)}"
        )

    def decide(view: View) -> Wish:
        room, held = _room(view, device)
        fits = size <= room - view.claims[device.uuid].ahead(room, view.ticket)
        lease = DeviceLease(size, 0) if fits else DeviceLease(0, size)
        return Wish({device.uuid: lease}, is_explained=size <= room + held)

    def holders(view: View) -> str:
        return Naming().holders(view.claims[device.uuid], time.time()) or "other programs hold it"

    line = WaitingLine()

    def report(view: View, waited: float) -> None:
        line.show(
            f"gpu-share: waiting for {format_gb(size)} of VRAM, {waited:.0f} s: {holders(view)}"
        )

    try:
        with _as_unavailable():
            outcome = lessee.claim(decide, wait, report)
    finally:
        line.clear()
    if not outcome.is_granted:
        raise LeaseUnavailable(
            f"{format_gb(size)} of VRAM is not available on {device.label} after "
            f"{outcome.waited:.0f} s: {holders(outcome.view)}"
        )


def _room(view: View, device: Device) -> tuple[int, int]:
    """Bytes that can be leased, and those that the other sessions' leases withhold."""
    claims = view.claims[device.uuid]
    memory = view.memory.get(device.uuid)
    free = device.free if memory is None else memory.free
    processes = view.processes.get(device.uuid, device.processes) or ()
    resident = sum(process.used or 0 for process in processes if process.neighbour)
    outstanding = max(0, claims.reserved - resident)
    room = max(0, free - outstanding - SAFETY_BUFFER - claims.leased)
    return room, claims.leased + claims.held
