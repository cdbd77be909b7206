"""Shared and exclusive locks on open files, by `fcntl` on POSIX and `msvcrt` on Windows.

filelock (looked at: 4.3) has a back-end for each of them, and can lock a file that may only be
read. It takes exclusive locks alone, though, and a record is locked by several processes of one
session at once; its lock for readers and writers is a database, which another user may not
write. msvcrt has no shared locks either: there each process locks a byte of its own beyond the
record, and the exclusive lock is one on all of these bytes. That part was never run on Windows:
its tests have a stand-in that follows the documentation of msvcrt.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

OPEN_FLAGS = (
    getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NOINHERIT", 0)
)
"""No link is followed, no FIFO is waited for, and nothing is inherited."""

HOLD_LIMIT = 2.0
"""Seconds that a worker waits for the lock on its session's record."""

RETRY = 0.0005
"""Seconds after which a lock that was not had is first tried again."""

_LONGEST_RETRY = 0.005

_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""What the systems answer where somebody else holds the lock."""

_FIRST, _PLACES = 1 << 20, 256
"""The bytes that stand for the processes on Windows."""

if sys.platform == "win32":  # pragma: no cover - runs on Windows alone
    import msvcrt

    def try_shared(descriptor: int) -> bool:
        """Lock beside others who lock so. Returns False where one has the exclusive lock."""
        start = os.getpid() // 4 % _PLACES
        return any(
            _lock(descriptor, _FIRST + (start + step) % _PLACES, 1) for step in range(_PLACES)
        )

    def try_exclusive(descriptor: int) -> bool:
        """Lock alone. Returns False where anybody else holds a lock."""
        return _lock(descriptor, _FIRST, _PLACES)

    def unlock(descriptor: int) -> None:
        """Give up an exclusive lock."""
        _at(descriptor, _FIRST, msvcrt.LK_UNLCK, _PLACES)

    def _lock(descriptor: int, offset: int, size: int) -> bool:
        try:
            _at(descriptor, offset, msvcrt.LK_NBLCK, size)
        except OSError as error:
            return _is_held(error)
        return True

    def _at(descriptor: int, offset: int, mode: int, size: int) -> None:
        # It locks from the current position, from which the record is read and written.
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, offset, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, mode, size)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)

else:
    import fcntl

    def try_shared(descriptor: int) -> bool:
        """Lock beside others who lock so. Returns False where one has the exclusive lock."""
        return _lock(descriptor, fcntl.LOCK_SH)

    def try_exclusive(descriptor: int) -> bool:
        """Lock alone. Returns False where anybody else holds a lock."""
        return _lock(descriptor, fcntl.LOCK_EX)

    def unlock(descriptor: int) -> None:
        """Give up a lock."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _lock(descriptor: int, kind: int) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            return _is_held(error)
        return True


def _is_held(error: OSError) -> bool:
    """False, as somebody holds the lock. Raises what else went wrong."""
    if error.errno not in _HELD:
        raise error
    return False


def lock_within(seconds: float, descriptor: int, *, shared: bool = False) -> bool:
    """Lock, waiting at most so many seconds. Returns whether the lock was had.

    By trying again and again: a lock that is waited for in the system cannot be given up.
    """
    attempt = try_shared if shared else try_exclusive
    began = time.monotonic()
    while not attempt(descriptor):
        waited = time.monotonic() - began
        if waited >= seconds:
            return False
        # Who came first does not get it first: the shorter the pauses, the rarer that matters.
        pause = min(RETRY + waited / 20, _LONGEST_RETRY)
        time.sleep(min(pause, seconds - waited))
    return True


def close(descriptor: int) -> None:
    """Close a file, whatever becomes of it; a lock ends when its last descriptor is closed."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


_held: list[int] = []
"""Descriptors of the records that this process keeps alive as a worker."""


def keep_alive(record: Path) -> Callable[[], None]:
    """Hold the lock on a session's record as one of its workers; the result gives it up.

    Raises `OSError` where the record cannot be opened or locked.
    """
    descriptor = os.open(record, os.O_RDONLY | OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not lock_within(
        HOLD_LIMIT, descriptor, shared=True
    ):
        close(descriptor)
        raise OSError(errno.EAGAIN, "the record cannot be locked")
    _held.append(descriptor)

    def give_up() -> None:
        if descriptor in _held:
            _held.remove(descriptor)
            close(descriptor)

    return give_up


def _close_in_child() -> None:
    """In a child that was forked: its copies of the descriptors would keep the locks."""
    while _held:
        close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
