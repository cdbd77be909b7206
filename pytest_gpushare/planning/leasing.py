"""The plan and the leases of a session, made while no other session can change its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import Device, GpuFacts
from pytest_gpushare.gpu.host import pid_space
from pytest_gpushare.leases.claims import NEWCOMER, Naming
from pytest_gpushare.leases.ledger import OFF, Ledger, LedgerError, directory_of
from pytest_gpushare.leases.lessee import Lessee, LiveReadings, View, Wish
from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
from pytest_gpushare.ollama.models import OLLAMA
from pytest_gpushare.planning.plan import DevicePlan, DeviceShare, LeasedByOthers, Limit, Plan
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.gpu.readings import LiveVram
    from pytest_gpushare.scheduler.types import DeviceCapacity
    from pytest_gpushare.waiting_line import WaitingLine

_SERVERS_EVERY = 2.0
"""Seconds between two rounds of questions to servers while the session waits."""


_ENDING = 3.0
"""Seconds that the session waits for one that ends, where it would then have more workers."""


_AT_ONCE = (
    "gpu-share: sessions whose tests declare their needs, or with gpu_share_preset = packed, run "
    "at the same time"
)


class Terms(NamedTuple):
    """On what terms a session takes part in the ledger."""

    root: Path
    shares_devices: bool = True
    """Whether its plan is to respect leases; False: it is only seen by `watch`."""
    only_asks: bool = False
    """Whether nothing is leased: no test will follow."""
    in_process: bool = False
    """Whether it leases by the test and not by the run."""
    refresh: Callable[[], object] | None = None
    """Asks the servers again while the session waits; None: they are not asked."""
    line: WaitingLine | None = None
    """Says that the session waits, and may end that by `EnoughElsewhereError`; None: the user's
    terminal."""


class Agreed(NamedTuple):
    """What was agreed with the other sessions of the host."""

    gpus: GpuFacts
    """As they were when the plan was made."""
    others: LeasedByOthers
    plan: Plan
    lessee: Lessee | None = None
    """None where the ledger cannot be used."""
    leases: tuple[str, ...] = ()
    """One sentence for each device and session that has leased VRAM there."""
    notes: tuple[str, ...] = ()
    """Problems, one sentence each."""
    alone: Mapping[str, int] = {}
    """UUID -> the budget, in bytes, that the plan would have without the other sessions."""
    waits_for: str = ""
    """Who holds the VRAM that a run would wait for before it starts with this plan, where that
    was only asked; empty: it would start at once."""


MakePlan = Callable[[GpuFacts, LeasedByOthers], Plan]


def agree(
    settings: Settings, gpus: GpuFacts, live: LiveVram | None, make: MakePlan, terms: Terms
) -> Agreed:
    """Make the plan from what other sessions leave, and lease it; wait where that is wanted.

    A fault of the ledger is one note and a plan without leases.
    """
    shares = terms.shares_devices and settings.leases != OFF and bool(gpus.devices)
    nobody = LeasedByOthers()
    try:
        ledger = Ledger(directory_of(settings.leases), is_reader=terms.only_asks)
    except LedgerError as error:
        notes = (_fault(error),) if shares and not terms.only_asks else ()
        return Agreed(gpus, nobody, make(gpus, nobody), notes=notes)
    record = LeaseRecord(
        os.getpid(),
        pid_space() or "",
        str(terms.root),
        _user(),
        time.time(),
        models=settings.ollama_models,
    )
    totals = {device.uuid: device.total for device in gpus.devices} if shares else {}
    lessee = Lessee(ledger, record, totals, None if live is None else LiveReadings(live))
    if not shares:
        return Agreed(gpus, nobody, make(gpus, nobody), None if terms.only_asks else lessee)
    negotiation = _Negotiation(settings, gpus, make, terms)
    try:
        if terms.only_asks:
            return negotiation.only_asked(lessee)
        return negotiation.leased(lessee, in_process=terms.in_process)
    except LedgerError as error:
        lessee.close()
        return Agreed(gpus, nobody, make(gpus, nobody), notes=(_fault(error),))
    except BaseException:
        lessee.close()
        raise


def _fault(error: LedgerError) -> str:
    return (
        f"no VRAM is leased: {error}: other sessions on this host do not see what this one uses "
        "(gpu_share_leases)"
    )


def _user() -> str:
    with contextlib.suppress(Exception):
        return getpass.getuser()
    return ""


class _Negotiation:
    """The plan and the leases of one session, decided inside the gate."""

    def __init__(
        self,
        settings: Settings,
        gpus: GpuFacts,
        make: MakePlan,
        terms: Terms,
    ) -> None:
        self._settings, self._gpus, self._make = settings, gpus, make
        self._refresh, self._refreshed = terms.refresh, 0.0
        self._own: Mapping[str, int] | None = None
        self._naming = Naming()
        # Notes stand in reports, which are passed on to others.
        self._reported = Naming(settings.report_names)
        self._line = terms.line
        self.now, self.others = gpus, LeasedByOthers()
        self.plan: Plan | None = None
        self._without: Plan | None = None
        """The plan without the other sessions; None where there is none."""
        self._ending_until = 0.0
        """Until when a session that ends is waited for; 0: there was none."""
        self._may_wait = settings.wait != 0
        """Whether there is time for one that ends, or that asked before, to take its turn."""

    def only_asked(self, lessee: Lessee) -> Agreed:
        """The plan of a run that is not to start: what it would be now, or after its wait."""
        with lessee.ledger.gate():
            view = lessee.view()
        wish = self.decide(view)
        lessee.close()
        if self._settings.wait == 0 or not wish.is_explained:
            return self._agreed(view, None, ())
        self.plan, self.others = self._without, LeasedByOthers()
        who = "; ".join(self._holders(view, self._naming)) or "sessions that asked before"
        note = f"a run would wait for VRAM first, and then start with this plan: {who}"
        return self._agreed(view, None, (note,))._replace(waits_for=who)

    def leased(self, lessee: Lessee, *, in_process: bool) -> Agreed:
        """The plan and its leases, after the wait for them."""
        try:
            wait = None if self._settings.wait is None else float(self._settings.wait)
            outcome = lessee.claim(self.decide, wait, self._report)
            if not outcome.is_granted and self._may_wait and outcome.waited:
                # What others leave now, though one may end in a moment, or have asked before.
                self._may_wait = False
                outcome = lessee.claim(self.decide, 0.0, self._report)._replace(
                    waited=outcome.waited
                )
        finally:
            if self._line is not None:
                self._line.clear()
        if in_process:
            # The tests lease what they need, one by one.
            lessee.shrink({})
        notes = [_unreadable(session.name, session.problem)
                 for session in outcome.view.sessions if session.problem]  # fmt: skip
        if not outcome.is_granted and outcome.waited >= 1:
            who = "; ".join(self._holders(outcome.view, self._reported)) or "other programs hold it"
            notes.append(f"waited {outcome.waited:.0f} s for VRAM: {who}")
        elif not outcome.is_granted and any(c.holders for c in outcome.view.claims.values()):
            held = "; ".join(self._holders(outcome.view, self._reported))
            notes.append(f"VRAM is leased: {held}")
        return self._agreed(outcome.view, lessee, notes)

    def decide(self, view: View) -> Wish:
        """The plan as of this view, and what it leases."""
        self.now = _updated(self._gpus, view)
        claims = view.claims
        if not any(claim.holders or claim.waiting or claim.reserved for claim in claims.values()):
            self.others, self._without = LeasedByOthers(), None
            self.plan = self._make(self.now, self.others)
            return self._wish(self.plan, False)
        if self._own is None:
            alone = self._make(self.now, LeasedByOthers())
            self._own = {planned.device.uuid: planned.reservation for planned in alone.devices}
        reserved = {uuid: claim.reserved for uuid, claim in claims.items()}
        leased = {uuid: claim.leased for uuid, claim in claims.items()}
        self.others = LeasedByOthers(leased, reserved)
        plan = self._make(self.now, self.others)
        # Who asked earlier comes first: its part of the budget is not to be had either.
        kept = {
            planned.device.uuid: self._kept(view, planned)
            for planned in plan.devices
            if planned.device.uuid in claims
        }
        if any(kept.values()):
            more = {uuid: size + kept.get(uuid, 0) for uuid, size in leased.items()}
            self.others = LeasedByOthers(more, reserved)
            plan = self._make(self.now, self.others)
        own = self._own
        devices = tuple(replace(each, asked=own.get(each.device.uuid, 0)) for each in plan.devices)
        self.plan = plan = replace(plan, devices=devices)
        self._without = self._planned_alone(view)
        if self._awaits_end(view, plan):
            wanted = {slot.device.uuid: DeviceLease(want=plan.needed) for slot in plan.slots}
            return Wish({**self._wish(replace(plan, slots=()), False).devices, **wanted}, True)
        return self._wish(plan, not plan.slots and bool(self._without.slots))

    def _awaits_end(self, view: View, plan: Plan) -> bool:
        """Whether there will be more workers in a moment, as another session is at its end."""
        if not (self._may_wait and plan.slots):
            return False
        ended: Counter[str] = Counter()
        left = dict(self.others.leases)
        for uuid, claim in view.claims.items():
            for holder in claim.holders:
                if holder.session.record.is_ending:
                    ended[uuid] += holder.held or 0
                    left[uuid] -= holder.unclaimed
        if left == self.others.leases and not any(ended.values()):
            return False
        then = self._make(self._without_held(ended), self.others._replace(leases=left))
        if len(then.slots) <= len(plan.slots):
            return False
        now = time.monotonic()
        self._ending_until = self._ending_until or now + _ENDING
        return now < self._ending_until

    def _kept(self, view: View, planned: DevicePlan) -> int:
        """Bytes that this session may not lease: for those who asked before it, and so that each
        older one can run its largest test."""
        claims = view.claims[planned.device.uuid]
        left = planned.device.free - planned.outstanding - planned.safety_buffer
        capacity = left + claims.held
        ahead = claims.ahead(
            planned.budget,
            view.ticket,
            reserved=planned.reservation,
            starts=capacity if self._may_wait else None,
        )
        keepable = claims.keepable(capacity, NEWCOMER)
        return ahead if keepable is None else max(ahead, planned.budget - max(0, keepable))

    def _wish(self, plan: Plan, is_explained: bool) -> Wish:
        slots = slots_by_device(plan)
        # A device that lets no process in is not waited for.
        waits = not plan.slots
        return Wish(
            {
                planned.device.uuid: DeviceLease(
                    slots[planned.device.uuid],
                    plan.needed if waits and planned.limited_by is Limit.BY_NEED else 0,
                    planned.own_reservation,
                )
                for planned in plan.devices
            },
            is_explained,
        )

    def _planned_alone(self, view: View) -> Plan:
        """The plan if the other sessions had leased nothing, and kept nothing for servers.

        Nor had models loaded that their tests use: those are unloaded for one that waits.
        """
        uses_models = any(turn.is_open for s in view.sessions for turn in s.record.turns)
        held = {uuid: claim.held for uuid, claim in view.claims.items()}
        for planned in self.plan.devices if self.plan is not None and uses_models else ():
            if planned.device.uuid in held:
                held[planned.device.uuid] += planned.resident
        return self._make(self._without_held(held), LeasedByOthers())

    def _without_held(self, held: Mapping[str, int]) -> GpuFacts:
        """The devices if so much of what is in use were free, by UUID."""
        devices = tuple(_freed(device, held.get(device.uuid, 0)) for device in self.now.devices)
        return self.now._replace(devices=devices)

    def _report(self, view: View, waited: float) -> None:
        from pytest_gpushare.waiting_line import WaitingLine

        line = self._line = self._line or WaitingLine()
        needed = format_gb(self.plan.needed) if self.plan is not None else "VRAM"
        who = "; ".join(self._holders(view, self._naming)) or "other programs hold the VRAM"
        text = f"gpu-share: waiting for {needed} of VRAM for a GPU worker, {waited:.0f} s: {who}"
        is_fixed = not any(share.spare for share in self._shares(view))
        if is_fixed and any(claim.holders for claim in view.claims.values()):
            line.show(text, _AT_ONCE)
        else:
            line.show(text)
        if self._refresh is not None and waited - self._refreshed >= _SERVERS_EVERY:
            # Models come and go meanwhile: what was held at the start holds no longer.
            self._refreshed = waited
            self._refresh()

    def _shares(self, view: View) -> list[DeviceLease]:
        return [share for s in view.sessions for share in s.record.devices.values()]

    def _holders(self, view: View, naming: Naming) -> list[str]:
        now, found = time.time(), {}
        for claim in view.claims.values():
            for holder in claim.holders:
                found[holder.session.name, holder.lease] = naming.holder(holder, now)
        return list(found.values())

    def _agreed(self, view: View, lessee: Lessee | None, notes: Sequence[str]) -> Agreed:
        assert self.plan is not None
        labels = {device.uuid: device.label for device in self.now.devices}
        leases = tuple(
            f"{labels[uuid]}: {format_gb(holder.lease)} of VRAM is leased by "
            f"{self._naming.session(holder.session)}"
            for uuid, claim in view.claims.items()
            for holder in claim.holders
            if holder.lease
        )
        over = [
            f"{labels[uuid]}: uid {holder.session.uid} claims {format_gb(holder.lease)} of VRAM, "
            f"more than is left there"
            for uuid, claim in view.claims.items()
            for holder in claim.holders
            if uuid in view.memory and holder.unclaimed > view.memory[uuid].free
        ]
        alone = {planned.device.uuid: planned.budget for planned in
                 (self._without or self.plan).devices}  # fmt: skip
        notes = (*notes, *dict.fromkeys(over))
        return Agreed(self.now, self.others, self.plan, lessee, leases, notes, alone)


def _unreadable(name: str, problem: str) -> str:
    return f"session record {name} cannot be read ({problem}) and is ignored"


def _updated(gpus: GpuFacts, view: View) -> GpuFacts:
    """The devices with the VRAM that was read inside the gate."""

    def now(device: Device) -> Device:
        found = view.memory.get(device.uuid)
        if found is None:
            return device
        processes = view.processes.get(device.uuid, device.processes)
        return replace(
            device,
            total=found.total,
            used=min(found.used, found.total),
            free=min(found.free, found.total),
            processes=processes,
        )

    return gpus._replace(
        devices=tuple(map(now, gpus.devices)), all_devices=tuple(map(now, gpus.all_devices))
    )


def _freed(device: Device, size: int) -> Device:
    size = min(size, device.used)
    return replace(device, used=device.used - size, free=min(device.total, device.free + size))


def slots_by_device(plan: Plan) -> Counter[str]:
    """UUID -> the bytes of all slots of a device."""
    sizes: Counter[str] = Counter()
    for slot in plan.slots:
        sizes[slot.device.uuid] += slot.vram
    return sizes


def lease_plan(lessee: Lessee, plan: Plan) -> None:
    """Lease the slots of a plan that a hook changed; it has the last word."""
    slots = slots_by_device(plan)
    lessee.change(
        devices={
            planned.device.uuid: lessee.record.lease(planned.device.uuid)._replace(
                lease=slots[planned.device.uuid], want=0
            )
            for planned in plan.devices
        }
    )


def capacities_of(plan: Plan) -> list[DeviceCapacity]:
    """The devices as the plan leaves them to the tests."""
    # Not needed at the start: the dispatch asks for them.
    from pytest_gpushare.scheduler.types import DeviceCapacity

    return [
        DeviceCapacity(
            planned.device.uuid,
            planned.device.label,
            planned.reach,
            # What others keep counts by their records, where tests lease what they need.
            (planned.own_reservation if planned.alone else planned.reservation)
            - beside.reservation,
            planned.safety_buffer,
            planned.device.free,
            planned.resident - beside.resident,
            beside=beside.reservation,
        )
        for planned in plan.devices
        for beside in (kept_for_other_servers(planned),)
    ]


def shares_of_other_servers(planned: DevicePlan) -> tuple[DeviceShare, ...]:
    """What of a device is kept for other servers than Ollama: while tests run it does not change,
    whereas Ollama's models may be loaded for tests."""
    return tuple(share for share in planned.shares if share.name != OLLAMA)


def kept_for_other_servers(planned: DevicePlan) -> DeviceShare:
    """The sum of these."""
    shares = shares_of_other_servers(planned)
    return DeviceShare(
        "",
        sum(share.reservation for share in shares),
        sum(share.resident for share in shares),
    )
