"""Which sessions run on this host: a small file of each, for `pytest-gpushare watch`.

A session that is killed leaves its file behind; so a file counts only while the process that
wrote it lives, told from a later one of the same number by its start time, and whoever
finds a file of the dead takes it away.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.gpu.host import identity, is_same_process
from pytest_gpushare.text import read_regular

if TYPE_CHECKING:
    from pytest_gpushare.wire import Links


HELLO = "hello"
"""The kind of message with which a worker says who it is."""

_SCHEMA = 1
_MOST_BYTES = 64 * 1024
_MOST_FILES = 256


class PresentWorker(NamedTuple):
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


class PresentSession(NamedTuple):
    """A running session."""

    pid: int
    root: str
    began: float
    """Seconds since the epoch."""
    workers: tuple[PresentWorker, ...]


def folder() -> Path:
    """Where the files are: one folder for each user, so that nobody else can read or plant them."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir(), f"pytest-gpushare{user}")


class SessionRecord:
    """The file of this session, written anew when a worker comes; a service of the run."""

    def __init__(self, links: Links, root: Path) -> None:
        self._root = root
        self._workers: dict[str, dict[str, Any]] = {}
        self._has_needs = False
        self._changed = threading.Condition()
        self._dirty = self._stopped = False
        self._path: Path | None = None
        links.on(HELLO, self._heard)

    def start(self) -> None:
        """Take away what dead sessions left; say that this one runs."""
        own = identity(os.getpid())
        if own is None or not _make_folder():
            return
        self._path = folder() / f"{os.getpid()}.json"
        self._head = {
            "schema": _SCHEMA,
            "pid": os.getpid(),
            "identity": own,
            "root": str(self._root),
            "began": time.time(),
        }
        threading.Thread(target=self._serve, name="gpu-share-presence", daemon=True).start()

    def admits_by_needs(self) -> None:
        """Tests are admitted by needs of their own from now on."""
        with self._changed:
            self._has_needs = self._dirty = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Take the file away."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            if self._path is not None:
                _remove(self._path)

    def _heard(self, worker: str, who: Any) -> None:
        # Called where execnet receives: the file is written by the thread below.
        with self._changed:
            self._workers[worker] = {
                "id": worker,
                "pid": int(who["pid"]),
                "identity": identity(int(who["pid"])),
                "role": str(who["role"]),
                "device": who["device"],
                "slot": int(who["vram"]),
            }
            self._dirty = True
            self._changed.notify_all()

    def _serve(self) -> None:
        self._sweep()
        while True:
            with self._changed:
                if self._stopped or self._path is None:
                    return
                # Under the lock, so that no file comes back after `stop`.
                _write(self._path, self._document())
                self._dirty = False
                self._changed.wait_for(lambda: self._dirty or self._stopped)

    def _document(self) -> dict[str, Any]:
        workers = list(self._workers.values())
        return {**self._head, "has_needs": self._has_needs, "workers": workers}

    def _sweep(self) -> None:
        with contextlib.suppress(Exception):
            sessions()


def sessions() -> list[PresentSession]:
    """The sessions of this user that run now, the oldest first; files of dead ones are removed."""
    found = []
    if not _is_ours(folder()):
        return []
    with contextlib.suppress(OSError):
        for path in sorted(folder().iterdir())[:_MOST_FILES]:
            document = _read(path) if path.suffix == ".json" else None
            if document is not None and (session := _session(path, document)) is not None:
                found.append(session)
    return sorted(found, key=lambda session: (session.began, session.pid))


def _session(path: Path, document: Mapping[str, Any]) -> PresentSession | None:
    try:
        alive = is_same_process(document["pid"], document["identity"])
        if alive is False:
            _remove(path)
        if not alive:
            return None
        return PresentSession(
            pid=document["pid"],
            root=str(document["root"])[:4096],
            began=float(document["began"]),
            workers=_sorted(
                PresentWorker(
                    id=str(worker["id"])[:80],
                    pid=worker["pid"],
                    role=str(worker["role"])[:20],
                    device=worker["device"],
                    slot=int(worker["slot"]),
                    is_bounded=document.get("has_needs") is not True,
                )
                for worker in document["workers"]
                if worker["identity"] and is_same_process(worker["pid"], worker["identity"])
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        # Another version's, or broken: it says nothing.
        return None


def _sorted(workers: Iterable[PresentWorker]) -> tuple[PresentWorker, ...]:
    """`gw2` before `gw10`."""
    return tuple(sorted(workers, key=lambda worker: (len(worker.id), worker.id)))


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        document = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or type(document.get("pid")) is not int:
        return None
    return document if document.get("schema") == _SCHEMA else None


def _write(path: Path, document: Mapping[str, Any]) -> None:
    # A full or read-only disk: nobody can watch this session, and its tests go on.
    with contextlib.suppress(OSError):
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(document), encoding="utf-8")
        scratch.replace(path)


def _remove(path: Path) -> None:
    for name in (path, path.with_suffix(".part")):
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)


def _make_folder() -> bool:
    with contextlib.suppress(OSError):
        folder().mkdir(mode=0o700, exist_ok=True)
    return _is_ours(folder())


def _is_ours(path: Path) -> bool:
    """Whether it is a folder of this user that nobody else can write to."""
    try:
        status = path.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return False
    return not hasattr(os, "getuid") or (
        status.st_uid == os.getuid() and not status.st_mode & 0o022
    )
