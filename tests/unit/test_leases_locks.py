"""Locks as Windows has them, on a stand-in for msvcrt: exclusive ones only, on ranges of bytes.

The tests of the ledger run on POSIX locks. Nothing here has been run on Windows.
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

from pytest_gpushare.leases import locks as posix_locks
from pytest_gpushare.leases.records import SIZE


class FakeMsvcrt(ModuleType):
    """Locks of ranges from the position of the descriptor, as `_locking` of the C library."""

    LK_UNLCK, LK_LOCK, LK_NBLCK = 0, 1, 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: dict[int, tuple[int, int, int]] = {}
        """Number of the lock -> descriptor, first byte, byte after the last."""

    def locking(self, descriptor: int, mode: int, size: int) -> None:
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        own = (descriptor, at, at + size)
        if mode == self.LK_UNLCK:
            found = [number for number, lock in self.held.items() if lock == own]
            if not found:
                raise OSError(errno.EACCES, "no such lock")
            del self.held[found[0]]
            return
        assert mode == self.LK_NBLCK, "anything else waits for ten seconds"
        inode = os.fstat(descriptor).st_ino
        for other, first, end in self.held.values():
            if os.fstat(other).st_ino == inode and first < at + size and at < end:
                raise OSError(errno.EACCES, "Permission denied")
        self.held[len(self.held)] = own


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
    assert sorted(lock[1:] for lock in fake.held.values()) == [
        (2**20 + 100, 2**20 + 101),
        (2**20 + 101, 2**20 + 102),
    ]
    assert all(first >= SIZE for _, first, _ in fake.held.values())
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


def test_other_errors_are_not_taken_for_a_lock(windows: Any, descriptors: list[int]) -> None:
    locks, fake = windows

    def broken(*_: object) -> None:
        raise OSError(errno.EBADF, "bad")

    fake.locking = broken
    with pytest.raises(OSError, match="bad"):
        locks.try_exclusive(descriptors[0])
