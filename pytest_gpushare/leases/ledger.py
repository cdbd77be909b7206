"""The ledger: a directory in which every session of this host keeps one locked record.

A record counts while a process of its session holds the lock on it, so the kernel removes the
claims of a session that is killed. Whoever reads, decides and writes holds the lock on the
file `gate` meanwhile. Nothing in the directory is trusted: links are not followed, only regular
files are read, and a record belongs to the owner of its file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pytest_gpushare.gpu.host import file_system
from pytest_gpushare.leases import locks
from pytest_gpushare.leases.records import (
    SIZE,
    LeaseRecord,
    UnreadableError,
    from_bytes,
    to_bytes,
)
from pytest_gpushare.text import one_line

VARIABLE = "PYTEST_GPUSHARE_LEASES"
"""The environment variable with the directory that `auto` means."""

GATE_LIMIT = 2.0
"""Seconds that anybody waits for the gate while nobody passes it."""

GATE_MOST = 20.0
"""Seconds that anybody waits for it on a machine so busy that others pass it slowly."""

GATE_REST = 60.0
"""Seconds for which the gate is left alone after it was waited for in vain."""

MOST_ENTRIES = 1024
"""Entries of the directory that are read."""

MEETING_PLACE = Path("/tmp/pytest-gpushare-leases")
"""Not the directory for temporary files: that may be each user's, or each session's."""

_GATE = "gate"
_PREFIX, _SUFFIX = "s-", ".json"
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre"),
    *("fuse.sshfs", "fuse.glusterfs"),
)

_HAS_DIR_FD = os.open in os.supports_dir_fd


class LedgerError(Exception):
    """The ledger cannot be used; its text is one line for the user."""


class GateHeldError(LedgerError):
    """Another process, or thread, holds the gate for too long: what was published still counts."""


class LiveSession(NamedTuple):
    """A session whose record is locked."""

    name: str
    """The name of the record's file."""
    uid: int | None
    """The owner of the file; None where files have no owner."""
    record: LeaseRecord = LeaseRecord(0)
    """One that could not be understood claims nothing, and stands for no process."""
    problem: str = ""
    """Why it could not be understood; empty where it could."""

    @property
    def owner(self) -> str:
        """The name of the user, else `uid 1001`."""
        if self.uid is None:
            return self.record.user or "?"
        try:
            import pwd

            return one_line(pwd.getpwuid(self.uid).pw_name, 40)
        except (ImportError, KeyError):
            return f"uid {self.uid}"

    @property
    def is_mine(self) -> bool:
        """Whether it is a session of the user who reads it."""
        return self.uid is None or self.uid == _own_uid()


def _own_uid() -> int | None:
    return os.getuid() if hasattr(os, "getuid") else None


def default_directory() -> Path:
    """Where all users and containers of a host meet, unless the environment names a directory."""
    given = os.environ.get(VARIABLE, "").strip()
    if given:
        return Path(given).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("PROGRAMDATA") or "C:/ProgramData", "pytest-gpushare", "leases")
    return MEETING_PLACE


OFF = "off"
AUTO = "auto"


def directory_of(setting: str) -> Path:
    """The directory that the setting names; the default one also where nothing is leased."""
    if setting in ("", AUTO, OFF):
        return default_directory()
    return Path(setting).expanduser().absolute()


class Ledger:
    """The view of one session: its own record, and those of the others. Threads may share it."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        is_reader: bool = False,
    ) -> None:
        """Open the directory, and create it where it is missing, unless it is only to be read.

        Raises `LedgerError`.
        """
        self.directory = directory
        self._clock = clock
        self._thread_lock = threading.RLock()
        self._shut_until = float("-inf")
        self._own: int | None = None
        self._own_name = ""
        self._parsed: dict[str, tuple[bytes, LiveSession]] = {}
        """Records as they were read last: most have not changed since."""
        self._directory = _open_directory(directory, create=not is_reader)
        _ALL.add(self)

    @property
    def record_path(self) -> Path | None:
        """The file of this session's record; None where it has none."""
        return self.directory / self._own_name if self._own is not None else None

    @property
    def descriptor(self) -> int | None:
        """The open file of the record: a process that inherits it keeps the record alive."""
        return self._own

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Hold the gate. Raises `LedgerError`, also where it cannot be had in time."""
        if not self._thread_lock.acquire(timeout=GATE_MOST):
            raise GateHeldError(f"another thread holds the gate of {self.directory}")
        try:
            descriptor = self._enter_gate()
            try:
                yield
            finally:
                locks.close(descriptor)
        finally:
            self._thread_lock.release()

    def others(self) -> list[LiveSession]:
        """The sessions that are alive, but this one; to be called while the gate is held.

        Removes what dead sessions of this user left.
        """
        return list(self._live(may_remove=True))

    def look(self) -> list[LiveSession]:
        """The sessions that are alive, without the gate: for whoever only shows them."""
        return list(self._live(may_remove=False))

    def peek(self, names: Iterable[str]) -> dict[str, LiveSession | None]:
        """These records now, without the gate; None for those that are not alive any more."""
        found: dict[str, LiveSession | None] = dict.fromkeys(names)
        for name in found:
            with contextlib.suppress(OSError):
                found[name] = self._read(name, may_remove=False)
        return found

    def publish(self, record: LeaseRecord) -> None:
        """Write this session's record; to be called while the gate is held.

        A record that somebody removed is created again. Raises `LedgerError`.
        """
        try:
            content = to_bytes(record)
            if self._own is not None and os.fstat(self._own).st_nlink == 0:
                self._drop()
            if self._own is None:
                self._create(content)
            else:
                os.lseek(self._own, 0, os.SEEK_SET)
                os.write(self._own, content)
        except UnreadableError as error:
            raise LedgerError(str(error)) from None
        except OSError as error:
            raise LedgerError(f"{self.directory} cannot be written: {_words(error)}") from None

    def is_lost(self) -> bool:
        """Whether somebody has removed this session's record."""
        with self._thread_lock, contextlib.suppress(OSError):
            return self._own is not None and os.fstat(self._own).st_nlink == 0
        return False

    def leave(self) -> None:
        """Remove this session's record; harmless when called twice."""
        with self._thread_lock:
            if self._own is not None:
                with contextlib.suppress(OSError):
                    is_there = os.fstat(self._own).st_nlink
                    # Windows removes no file that is open.
                    self._drop()
                    if is_there:
                        self._unlink(self._own_name)
                self._drop()

    def close(self) -> None:
        """Leave, and close the directory."""
        self.leave()
        with self._thread_lock:
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._drop()
        descriptor, self._directory = self._directory, None
        if descriptor is not None:
            locks.close(descriptor)

    def _drop(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            locks.close(own)

    def _create(self, content: bytes) -> None:
        name = f"{_PREFIX}{os.getpid()}-{os.urandom(6).hex()}{_SUFFIX}"
        descriptor = self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _make_readable(descriptor)
            if not locks.lock_within(GATE_LIMIT, descriptor, shared=True):
                raise OSError(errno.EAGAIN, "its record is locked by another process")
            if os.write(descriptor, content) != SIZE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            locks.close(descriptor)
            with contextlib.suppress(OSError):
                self._unlink(name)
            raise
        self._own, self._own_name = descriptor, name

    # --- the gate ---

    def _enter_gate(self) -> int:
        began = self._clock()
        if began < self._shut_until:
            raise GateHeldError(self._held())
        try:
            while True:
                descriptor = self._open_gate()
                try:
                    if not self._lock(descriptor, began):
                        self._shut_until = self._clock() + GATE_REST
                        raise GateHeldError(self._held())
                    # One that somebody removed meanwhile would let two in.
                    if self._is_the_gate(descriptor):
                        return descriptor
                except BaseException:
                    locks.close(descriptor)
                    raise
                locks.close(descriptor)
        except OSError as error:
            where = self.directory / _GATE
            raise LedgerError(f"{where} cannot be locked: {_words(error)}") from None

    def _lock(self, descriptor: int, began: float) -> bool:
        """Lock the gate; who passes it changes a record, so it is waited for while that happens."""
        if locks.lock_within(GATE_LIMIT / 2, descriptor):
            return True
        while self._clock() - began < GATE_MOST:
            before = self._changes()
            if locks.lock_within(GATE_LIMIT / 2, descriptor):
                return True
            if self._changes() == before:
                break
        return False

    def _changes(self) -> set[tuple[str, int]]:
        """What differs once a record was written or removed."""
        found = set()
        for name in self._names():
            with contextlib.suppress(OSError):
                found.add((name, self._stat(name).st_mtime_ns))
        return found

    def _held(self) -> str:
        return f"{self.directory / _GATE} was held by another process for {GATE_LIMIT:g} s"

    def _open_gate(self) -> int:
        # Read-only first: with fs.protected_regular nobody may open another user's file with
        # O_CREAT in a directory such as /tmp.
        try:
            descriptor = self._open(_GATE, os.O_RDONLY)
        except FileNotFoundError:
            try:
                descriptor = self._open(_GATE, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                _make_readable(descriptor)
            except FileExistsError:
                descriptor = self._open(_GATE, os.O_RDONLY)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            locks.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file")
        return descriptor

    def _is_the_gate(self, descriptor: int) -> bool:
        try:
            there = self._stat(_GATE)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), there)

    # --- the others ---

    def _live(self, *, may_remove: bool) -> Iterator[LiveSession]:
        names = self._names()
        for gone in set(self._parsed).difference(names):
            # Another thread may have removed it.
            self._parsed.pop(gone, None)
        for name in names:
            if name == self._own_name and self._own is not None:
                continue
            # A file that vanishes, or may not be read, is no session.
            with contextlib.suppress(OSError):
                session = self._read(name, may_remove=may_remove)
                if session is not None:
                    yield session

    def _names(self) -> list[str]:
        try:
            path = self._path(".") if self._directory is None else self._directory
            with os.scandir(path) as entries:
                first = zip(range(MOST_ENTRIES), entries, strict=False)
                return [entry.name for _, entry in first if _is_record(entry.name)]
        except OSError:
            return []

    def _read(self, name: str, *, may_remove: bool) -> LiveSession | None:
        descriptor = self._open(name, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return None
            uid = status.st_uid if hasattr(os, "getuid") else None
            is_dead = locks.try_exclusive(descriptor)
            if is_dead:
                locks.unlock(descriptor)
            content = os.read(descriptor, SIZE)
        finally:
            locks.close(descriptor)
        if is_dead:
            # Windows removes no file that is open.
            if may_remove and uid == _own_uid():
                self._unlink(name)
            return None
        known = self._parsed.get(name)
        if known is None or known[0] != content:
            known = self._parsed[name] = content, _session(name, uid, content)
        return known[1]

    # --- relative to the directory that was opened, where the system opens directories ---

    def _path(self, name: str) -> str:
        """What names a file of the directory together with `dir_fd=self._directory`."""
        if self._directory is not None:
            return name
        if _HAS_DIR_FD:
            raise OSError(errno.EBADF, "the ledger is closed")
        return os.fspath(self.directory / name)

    def _open(self, name: str, flags: int) -> int:
        path = self._path(name)
        return os.open(path, flags | locks.OPEN_FLAGS, 0o644, dir_fd=self._directory)

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(self._path(name), dir_fd=self._directory, follow_symlinks=False)

    def _unlink(self, name: str) -> None:
        os.unlink(self._path(name), dir_fd=self._directory)


def sessions_in(directory: Path) -> list[LiveSession]:
    """The sessions that are alive, for one that takes no part; none where it cannot look."""
    try:
        ledger = Ledger(directory, is_reader=True)
    except LedgerError:
        return []
    try:
        return ledger.look()
    finally:
        ledger.close()


_ALL: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_in_child() -> None:
    """In a child that was forked: its copies of the descriptors would keep the locks."""
    for ledger in list(_ALL):
        ledger._close_descriptors()
        ledger._thread_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _open_directory(directory: Path, *, create: bool) -> int | None:
    """The descriptor of the directory; None on systems that open no directories."""
    try:
        if create:
            _create_directory(directory)
        if not _HAS_DIR_FD:
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            return None
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | locks.OPEN_FLAGS)
    except OSError as error:
        raise LedgerError(f"{directory} cannot be opened: {_words(error)}") from None
    kind = file_system(os.fstat(descriptor).st_dev)
    if kind in _NETWORK:
        locks.close(descriptor)
        raise LedgerError(f"{directory} is on a network file system ({kind})")
    return descriptor


def _create_directory(directory: Path) -> None:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir()
    except FileExistsError:
        # Its creator may have been killed before it set the mode.
        status = directory.lstat()
        is_bare = stat.S_ISDIR(status.st_mode) and not status.st_mode & stat.S_ISVTX
        if not is_bare or status.st_uid != _own_uid() or directory != MEETING_PLACE:
            return
    if hasattr(os, "getuid"):
        # Everybody may add a record, and nobody may remove another's.
        directory.chmod(0o1777)


def _make_readable(descriptor: int) -> None:
    """Whatever the umask is: the others must be able to read it, and not to write."""
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, 0o644)


def _session(name: str, uid: int | None, content: bytes) -> LiveSession:
    try:
        return LiveSession(name, uid, from_bytes(content))
    except UnreadableError as error:
        return LiveSession(name, uid, problem=str(error))


def _is_record(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX) and len(name) < 100


def _words(error: OSError) -> str:
    return one_line(error.strerror or str(error), 200)
