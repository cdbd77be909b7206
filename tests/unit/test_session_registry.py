"""The files of running sessions: they never lie, and nobody else can plant them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from simulator.child import child_process

from pytest_gpushare.gpu.host import identity, is_same_process
from pytest_gpushare.session.registry import HELLO, SessionRecord, folder, sessions
from pytest_gpushare.wire import Links

pytestmark = pytest.mark.skipif(identity(os.getpid()) is None, reason="no /proc here")

HERE = Path("/project")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with child_process([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def present(links: Links) -> SessionRecord:
    service = SessionRecord(links, HERE)
    service.start()
    wait_for(lambda: bool(sessions()))
    return service


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def write(document: object, name: str = "1.json") -> Path:
    folder().mkdir(mode=0o700, exist_ok=True)
    path = folder() / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def valid(**changes: Any) -> dict[str, Any]:
    pid = os.getpid()
    return {
        "schema": 1,
        "pid": pid,
        "identity": identity(pid),
        "root": "/p",
        "began": 1.0,
        "workers": [],
        **changes,
    }


def test_from_start_to_stop(child: subprocess.Popen[bytes]) -> None:
    """A worker appears when it has said hello, and goes when it dies."""
    run = Links()
    service = present(run)
    who = {"pid": child.pid, "role": "gpu", "device": "GPU-0", "vram": 5}
    run.receive("gw10", (HELLO, who))
    run.receive("gw9", (HELLO, {**who, "pid": os.getpid()}))
    wait_for(lambda: len(sessions()[0].workers) == 2)
    (session,) = sessions()
    assert (session.pid, session.root) == (os.getpid(), str(HERE))
    assert [worker.id for worker in session.workers] == ["gw9", "gw10"]
    assert (session.workers[1].device, session.workers[1].slot) == ("GPU-0", 5)
    assert session.workers[1].is_bounded
    service.admits_by_needs()
    wait_for(lambda: not sessions()[0].workers[1].is_bounded)
    child.kill()
    child.wait(30)
    assert [worker.id for worker in sessions()[0].workers] == ["gw9"]
    service.stop()
    assert list(folder().iterdir()) == []
    run.receive("gw11", (HELLO, who))
    time.sleep(0.05)
    assert list(folder().iterdir()) == []


def test_number_used_again(child: subprocess.Popen[bytes]) -> None:
    """A process of the same number that started at another time is not the session."""
    own = str(identity(child.pid))
    earlier = f"{own.rpartition('/')[0]}/1"
    path = write(valid(pid=child.pid, identity=earlier))
    assert sessions() == []
    assert not path.exists()


def test_zombie_is_dead() -> None:
    """A process that nobody has waited for holds nothing any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    known = identity(process.pid)
    wait_for(lambda: identity(process.pid) is None)
    assert known is None or is_same_process(process.pid, known) is False
    process.wait(30)


def test_another_boot_and_another_container() -> None:
    """The file of an earlier boot is removed; that of another container is left alone."""
    boot, space, start = str(identity(os.getpid())).split("/")
    gone = write(valid(identity=f"another-boot/{space}/{start}"), "1.json")
    elsewhere = write(valid(identity=f"{boot}/pid:[1]/{start}"), "2.json")
    assert sessions() == []
    assert (gone.exists(), elsewhere.exists()) == (False, True)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{",
        "[" * 5000,
        "null",
        {},
        valid(schema=2),
        valid(pid="1"),
        valid(pid=True),
        valid(identity=None),
        valid(workers=3),
        valid(workers=[{}]),
        valid(workers=["x"]),
        valid(began="soon"),
        json.dumps(valid(root="x" * 70_000)),
    ],
    ids=range(14),
)
def test_broken_files_say_nothing(document: object) -> None:
    """Of another version, cut off, or planted: nothing is shown and nothing fails."""
    write(document)
    write(valid(), "2.json")
    assert [session.root for session in sessions()] == ["/p"]


def test_folder_of_somebody_else(own_folder: Path) -> None:
    """A link, or a folder that others can write to, is neither read nor written."""
    real = own_folder / "real"
    real.mkdir(mode=0o700)
    folder().symlink_to(real)
    service = SessionRecord(Links(), HERE)
    service.start()
    assert (list(real.iterdir()), sessions()) == ([], [])
    folder().unlink()
    folder().mkdir()
    folder().chmod(0o777)
    service = SessionRecord(Links(), HERE)
    service.start()
    service.stop()
    assert (list(folder().iterdir()), sessions()) == ([], [])


def test_temporary_directory_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, own_folder: Path
) -> None:
    """The session goes on unseen."""
    file = own_folder / "file"
    file.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    service = SessionRecord(Links(), HERE)
    service.start()
    service.stop()
    assert sessions() == []
