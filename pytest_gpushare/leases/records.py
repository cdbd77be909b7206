"""The record of a session in the ledger: what stands in it, and how it is read safely."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pytest_gpushare.text import one_line
from pytest_gpushare.units import MOST_VRAM

SIZE = 4096
"""Bytes of a record: one block, written in place, so that a full disk cannot cut it off."""

VERSION = 1

_MOST_TEXT = 200
_MOST_DEVICES = 64
_MOST_WORKERS = 512
_MOST_MODELS = 16
_MOST_TURNS = 8
_MOST_PID = 2**31


Seniority = tuple[float, str]
"""Since when a session leases, and the name of its record: the smaller, the older."""


class UnreadableError(ValueError):
    """A record that cannot be understood; its text says why."""


class DeviceLease(NamedTuple):
    """What a session claims of one device, in bytes."""

    lease: int = 0
    want: int = 0
    """The least that it waits for; counts together with a ticket."""
    reserved: int = 0
    """What it keeps for Ollama there."""
    spare: int = 0
    """What of the lease it gives back to one that waits, as its tests end; the rest it keeps."""
    idle: int = 0
    """What of the rest it gives up for an older session: of workers that it can do without."""
    most: int = 0
    """The lease with which it can run its largest test that has not begun; 0: it needs no more."""


class SessionWorker(NamedTuple):
    """A worker of a running session."""

    id: str
    pid: int
    role: str
    device: str | None
    """UUID."""
    slot: int
    """Bytes of VRAM; 0 for a CPU worker."""
    is_bounded: bool = True
    """Whether its tests may hold no more than the slot: not where they have needs of their own."""


class ModelTurn(NamedTuple):
    """A model of a server that tests of the session use, or wait for."""

    server: str
    model: str
    """Its file and context: what makes it one process of the server."""
    places: int = 0
    """How many tests of the session may use it at once."""
    is_open: bool = False
    """Whether the session has had it loaded, and has tests of it left."""
    ticket: int = 0
    """The place in the queue for it; 0: the session does not wait."""


class LeaseRecord(NamedTuple):
    """What a session publishes of itself."""

    pid: int
    space: str = ""
    """The boot and the namespace in which the PIDs hold; empty where the system has none."""
    root: str = ""
    user: str = ""
    """For systems on which files have no owner."""
    began: float = 0.0
    """Seconds since the epoch."""
    since: float = 0.0
    """The same, when it began to lease by the test; 0: it leases for as long as it lives."""
    devices: Mapping[str, DeviceLease] = {}
    """By UUID."""
    ticket: int = 0
    """The place in the queue of those who wait; 0: this session does not wait."""
    renewed: float = 0.0
    """When the ticket was last renewed, on the monotonic clock of the boot."""
    workers: tuple[SessionWorker, ...] = ()
    models: tuple[str, ...] = ()
    """Models of Ollama's that the session uses."""
    turns: tuple[ModelTurn, ...] = ()
    done: int = 0
    """Tests that have ended."""
    total: int = 0
    """Tests in all; 0 while that is unknown."""
    by_needs: bool = False
    """Whether tests are admitted by needs of their own."""

    def seniority(self, name: str) -> Seniority:
        """This session among the others; `name` is that of the record."""
        return round(self.since or self.began, 3), name

    def lease(self, uuid: str) -> DeviceLease:
        """What it claims of a device."""
        return self.devices.get(uuid, _NOTHING)

    def with_more(self, sizes: Mapping[str, int]) -> LeaseRecord:
        """The record with so much more leased, by UUID."""
        more = {
            uuid: share._replace(lease=share.lease + size)
            for uuid, size in sizes.items()
            for share in (self.lease(uuid),)
        }
        return self._replace(devices={**self.devices, **more})

    @property
    def is_ending(self) -> bool:
        """Whether its tests are over, so that it gives everything back in a moment."""
        return self.total > 0 and (self.done >= self.total or not self.workers)

    @property
    def leased(self) -> int:
        """Bytes that it has leased on all devices."""
        return sum(share.lease for share in self.devices.values())


_NOTHING = DeviceLease()
_FIELDS = len(DeviceLease._fields)


def to_bytes(record: LeaseRecord) -> bytes:
    """The record as it is written: `SIZE` bytes. What does not fit is left out, workers first."""
    workers = sorted(record.workers, key=lambda worker: worker.role != "gpu")
    while workers and len(_text(record, workers)) > SIZE:
        del workers[-max(1, len(workers) // 8) :]
    bare = record._replace(models=())
    for smaller in (record, bare, bare._replace(root="", user="")):
        text = _text(smaller, workers)
        if len(text) <= SIZE:
            return text.ljust(SIZE)
    raise UnreadableError(f"{len(record.devices)} devices are more than a record holds")


def _text(record: LeaseRecord, workers: Iterable[SessionWorker]) -> bytes:
    uuids = list(record.devices)
    places = {uuid: at for at, uuid in enumerate(uuids)}
    document = {
        "v": VERSION,
        "pid": record.pid,
        "space": record.space,
        "user": record.user,
        "root": _cut(record.root),
        "began": round(record.began, 3),
        "since": round(record.since, 3),
        "devices": {uuid: _cut_zeros(share) for uuid, share in record.devices.items()},
        "ticket": record.ticket,
        "renewed": round(record.renewed, 3),
        "workers": [
            [w.id, w.pid, w.role, places.get(w.device or "", w.device), w.slot] for w in workers
        ],
        "models": list(record.models),
        "turns": [list(turn) for turn in record.turns[:_MOST_TURNS]],
        "done": record.done,
        "total": record.total,
        "needs": record.by_needs,
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _cut_zeros(share: DeviceLease) -> list[int]:
    """The figures, without zeros at the end: few sessions have all of them."""
    while share and not share[-1]:
        share = share[:-1]  # type: ignore[assignment]
    return list(share)


def _cut(root: str) -> str:
    """The end of a path, in at most so many bytes."""
    raw = root.encode("utf-8", "replace")
    return raw[-_MOST_TEXT:].decode("utf-8", "ignore")


def from_bytes(content: bytes) -> LeaseRecord:
    """The record that was read, every text of it made printable.

    Raises `UnreadableError` for what is none.
    """
    try:
        found = json.loads(content[:SIZE])
    except (ValueError, RecursionError):
        raise UnreadableError("it is damaged") from None
    if not isinstance(found, dict) or type(found.get("v")) is not int:
        raise UnreadableError("it is damaged")
    if found["v"] > VERSION:
        raise UnreadableError("a newer version of pytest-gpushare wrote it")
    try:
        return _record(found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        raise UnreadableError("it is damaged") from None


def _record(found: Mapping[str, Any]) -> LeaseRecord:
    devices = {
        one_line(uuid, 96): DeviceLease(*(_integer(size, MOST_VRAM) for size in share[:_FIELDS]))
        for uuid, share in list(found["devices"].items())[:_MOST_DEVICES]
    }
    uuids = list(devices)
    by_needs = found["needs"] is True
    return LeaseRecord(
        pid=_integer(found["pid"], _MOST_PID),
        space=one_line(str(found["space"]), 120),
        root=one_line(str(found["root"]), _MOST_TEXT),
        user=one_line(str(found["user"]), 40),
        began=_real(found["began"]),
        since=_real(found["since"]),
        devices=devices,
        ticket=_integer(found["ticket"], 2**53),
        renewed=_real(found["renewed"]),
        workers=tuple(
            _worker(worker, uuids, is_bounded=not by_needs)
            for worker in found["workers"][:_MOST_WORKERS]
        ),
        models=tuple(one_line(str(name), _MOST_TEXT) for name in found["models"][:_MOST_MODELS]),
        turns=tuple(_turn(*turn) for turn in found.get("turns", ())[:_MOST_TURNS]),
        done=_integer(found["done"], 2**53),
        total=_integer(found["total"], 2**53),
        by_needs=by_needs,
    )


def _worker(found: Any, uuids: list[str], *, is_bounded: bool) -> SessionWorker:
    name, pid, role, device, slot = found
    if device is not None:
        device = uuids[device] if type(device) is int else one_line(str(device), 96)
    return SessionWorker(
        one_line(str(name), 80),
        _integer(pid, _MOST_PID),
        one_line(str(role), 20),
        device,
        _integer(slot, MOST_VRAM),
        is_bounded,
    )


def _turn(server: Any, model: Any, places: Any, is_open: Any, ticket: Any) -> ModelTurn:
    return ModelTurn(
        one_line(str(server), 100),
        one_line(str(model), 120),
        _integer(places, 2**16),
        is_open is True,
        _integer(ticket, 2**53),
    )


def _integer(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise ValueError(value)
    return value


def _real(value: Any) -> float:
    number = float(value)
    if not 0 <= number < 1e15:
        raise ValueError(value)
    return number
