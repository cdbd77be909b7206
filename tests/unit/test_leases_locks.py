"""Locks as Windows has them, on a stand-in for msvcrt: exclusive ones only, on ranges of bytes.

The tests of the ledger run on POSIX locks, but for one here. Nothing has been run on Windows.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pytest_gpushare.leases import ledger as ledgers
from pytest_gpushare.leases import locks as posix_locks
from pytest_gpushare.leases.ledger import Ledger
from pytest_gpushare.leases.records import SIZE, LeaseRecord


class FakeMsvcrt(ModuleType):
    """Locks of ranges from the position of the descriptor, as `_locking` of the C library.

    As documented: a range may lie beyond the end of the file; one that overlaps a locked one is
    refused with EACCES, whoever locked it; ranges are not merged, so each is given up as it was
    locked; a descriptor that is closed loses its locks. Reads and writes are not looked at, as
    the ranges lie beyond the record.
    """

    LK_UNLCK, LK_LOCK, LK_NBLCK = 0, 1, 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: list[tuple[int, int, int]] = []
        """Descriptor, first byte, byte after the last."""

    def locking(self, descriptor: int, mode: int, size: int) -> None:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        own = (descriptor, at, at + size)
        if mode == self.LK_UNLCK:
            if own not in self.held:
                raise OSError(errno.EACCES, "no such lock")
            self.held.remove(own)
            return
        assert mode == self.LK_NBLCK, "anything else waits for ten seconds"
        inode = os.fstat(descriptor).st_ino
        for other, first, end in self.held:
            if os.fstat(other).st_ino == inode and first < at + size and at < end:
                raise OSError(errno.EACCES, "Permission denied")
        self.held.append(own)

    def closed(self, descriptor: int) -> None:
        self.held = [lock for lock in self.held if lock[0] != descriptor]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as it is loaded on Windows."""
    fake = FakeMsvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("locks_on_windows", posix_locks.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module, fake


@pytest.fixture
def descriptors(tmp_path: Path) -> Iterator[list[int]]:
    """Three processes that have opened one record."""
    path = tmp_path / "record"
    path.write_bytes(b" " * SIZE)
    found = [os.open(path, os.O_RDONLY) for _ in range(3)]
    yield found
    for descriptor in found:
        os.close(descriptor)


def as_process(monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    monkeypatch.setattr(os, "getpid", lambda: pid)


def test_several_processes_share_a_record(
    windows: Any, descriptors: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a byte of its own beyond the record; one keeps the exclusive lock out."""
    locks, fake = windows
    one, two, other = descriptors
    for descriptor, pid in ((one, 400), (two, 400 + 4 * 256)):
        as_process(monkeypatch, pid)
        assert locks.try_shared(descriptor)
    # Their processes stand for the same byte: the second took the next one.
    assert sorted(lock[1:] for lock in fake.held) == [
        (2**20 + 100, 2**20 + 101),
        (2**20 + 101, 2**20 + 102),
    ]
    assert all(first >= SIZE for _, first, _ in fake.held)
    assert not locks.try_exclusive(other)
    fake.held.pop(0)
    assert not locks.try_exclusive(other)
    fake.held.clear()
    assert locks.try_exclusive(other)


def test_exclusive_lock_keeps_all_out_until_it_is_given_up(
    windows: Any, descriptors: list[int]
) -> None:
    locks, _ = windows
    one, two, _ = descriptors
    assert locks.try_exclusive(one)
    assert not locks.try_exclusive(two)
    assert not locks.try_shared(two)
    assert locks.lock_within(0.02, two, shared=True) is False
    locks.unlock(one)
    assert locks.try_shared(two)


def test_ledger_on_such_locks(
    windows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions read each other's records, and what is left of dead ones is removed, though a
    file that is open cannot be."""
    locks, fake = windows
    close, unlink = locks.close, Ledger._unlink

    def closing(descriptor: int) -> None:
        fake.closed(descriptor)
        close(descriptor)

    def unlink_closed(ledger: Ledger, name: str) -> None:
        opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        if ledger.directory / name in opened:
            raise PermissionError(errno.EACCES, "it is open")
        unlink(ledger, name)

    monkeypatch.setattr(locks, "close", closing)
    monkeypatch.setattr(ledgers, "locks", locks)
    monkeypatch.setattr(Ledger, "_unlink", unlink_closed)
    one, two, three = (Ledger(tmp_path / "leases") for _ in range(3))
    for ledger, pid in ((one, 11), (two, 12), (three, 13)):
        with ledger.gate():
            ledger.publish(LeaseRecord(pid))
            ledger.publish(LeaseRecord(pid, root="/srv"))
    assert sorted(_read(one)) == [(12, "/srv"), (13, "/srv")]
    three._drop()
    assert _read(one) == [(12, "/srv")]
    two.leave()
    assert _read(one) == []
    assert len(list((tmp_path / "leases").glob("s-*"))) == 1
    for ledger in (one, two, three):
        ledger.close()
    assert list((tmp_path / "leases").glob("s-*")) == []


def _read(ledger: Ledger) -> list[tuple[int, str]]:
    with ledger.gate():
        records = [session.record for session in ledger.others()]
    return [(record.pid, record.root) for record in records]


def test_other_errors_are_not_taken_for_a_lock(windows: Any, descriptors: list[int]) -> None:
    locks, fake = windows

    def broken(*_: object) -> None:
        raise OSError(errno.EBADF, "bad")

    fake.locking = broken
    with pytest.raises(OSError, match="bad"):
        locks.try_exclusive(descriptors[0])
