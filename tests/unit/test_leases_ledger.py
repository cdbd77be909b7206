"""The ledger against other processes, killed and stopped ones, and a hostile directory."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from simulator.child import child_process, wait_for

from pytest_gpushare.leases import ledger as ledgers
from pytest_gpushare.leases import locks
from pytest_gpushare.leases.ledger import Ledger, LedgerError, LiveSession
from pytest_gpushare.leases.records import SIZE, DeviceLease, LeaseRecord

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="for POSIX systems")

RECORD = LeaseRecord(os.getpid(), devices={"GPU-0": DeviceLease(5)})

HOLDER = """
    import os, sys, time
    from pathlib import Path
    from pytest_gpushare.leases.ledger import Ledger
    from pytest_gpushare.leases.records import DeviceLease, LeaseRecord
    ledger = Ledger(Path(sys.argv[1]))
    with ledger.gate():
        ledger.publish(LeaseRecord(os.getpid(), devices={"GPU-0": DeviceLease(7)}))
        if "gate" in sys.argv:
            print("held", flush=True)
            time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "leases"


@pytest.fixture
def run_child() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that holds a record, and wait until it does."""
    with ExitStack() as stack:

        def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
            text = textwrap.dedent(HOLDER) + textwrap.dedent(code)
            process = stack.enter_context(
                child_process(
                    [sys.executable, "-c", text, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            return process

        yield start


HELD = """
print("held", flush=True)
input()
"""


def others(ledger: Ledger) -> list[LiveSession]:
    with ledger.gate():
        return ledger.others()


def publish(ledger: Ledger, record: LeaseRecord = RECORD) -> None:
    with ledger.gate():
        ledger.publish(record)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("s-*"))


def test_sees_others_and_not_itself(directory: Path) -> None:
    one, two = Ledger(directory), Ledger(directory)
    publish(one)
    assert others(one) == []
    (found,) = others(two)
    assert found.record == RECORD
    assert found.is_mine
    one.leave()
    one.leave()
    assert others(two) == []
    assert files(directory) == []


def test_modes_whatever_the_umask(directory: Path) -> None:
    """Everybody can take part, nobody can write what another one wrote."""
    for umask in (0o022, 0o077, 0o000):
        place = directory.with_name(f"leases{umask}")
        before = os.umask(umask)
        try:
            ledger = Ledger(place)
            publish(ledger)
        finally:
            os.umask(before)
        assert stat.S_IMODE(place.stat().st_mode) == 0o1777
        assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o644}
        assert len(files(place)) == 1


def test_killed_holder_is_gone_at_once(
    directory: Path, run_child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    ledger = Ledger(directory)
    child = run_child(HELD, str(directory))
    (found,) = others(ledger)
    assert found.record.pid == child.pid
    child.kill()
    child.wait(30)
    assert others(ledger) == []
    assert files(directory) == []


def test_lives_until_the_last_process_of_the_session_is_gone(
    directory: Path, run_child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """A worker holds the record, too: it may still allocate when its controller was killed."""
    ledger = Ledger(directory)
    child = run_child(HELD, str(directory))
    (name,) = files(directory)
    give_up = locks.keep_alive(directory / name)
    child.kill()
    child.wait(30)
    assert len(others(ledger)) == 1
    give_up()
    give_up()
    assert others(ledger) == []


def test_forked_child_does_not_keep_the_lease(
    directory: Path, run_child: Callable[..., subprocess.Popen[bytes]]
) -> None:
    ledger = Ledger(directory)
    code = """
        import signal
        if os.fork() == 0:
            signal.alarm(30)
            print("held", flush=True)
            time.sleep(30)
        os.wait()
    """
    child = run_child(code, str(directory))
    assert len(others(ledger)) == 1
    child.kill()
    child.wait(30)
    assert others(ledger) == []


def test_stopped_holder_of_the_gate(
    directory: Path,
    run_child: Callable[..., subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is waited for once, then left alone for a while."""
    monkeypatch.setattr(ledgers, "GATE_LIMIT", 0.3)
    child = run_child("", str(directory), "gate")
    os.kill(child.pid, signal.SIGSTOP)
    ledger = Ledger(directory)
    began = time.monotonic()
    with pytest.raises(LedgerError, match=r"held by another process for 0\.3 s"):
        others(ledger)
    assert 0.2 < time.monotonic() - began < 2
    began = time.monotonic()
    with pytest.raises(LedgerError, match="held by another process"):
        others(ledger)
    assert time.monotonic() - began < 0.2
    assert len(ledger.look()) == 1


@pytest.mark.parametrize("is_passed", [True, False])
def test_gate_on_a_busy_machine(
    directory: Path, monkeypatch: pytest.MonkeyPatch, is_passed: bool
) -> None:
    """It is waited for as long as others pass it, which changes their records."""
    with Ledger(directory).gate():
        pass
    attempts: list[float] = []

    def in_vain(seconds: float, _descriptor: int) -> bool:
        attempts.append(seconds)
        if is_passed:
            (directory / f"s-{len(attempts)}.json").touch()
        return len(attempts) > 6

    monkeypatch.setattr(locks, "lock_within", in_vain)
    ledger = Ledger(directory)
    if is_passed:
        with ledger.gate():
            assert len(attempts) == 7
    else:
        with pytest.raises(LedgerError, match="held by another process"), ledger.gate():
            pass
        assert sum(attempts) == ledgers.GATE_LIMIT


def test_gate_that_is_there_is_not_opened_to_be_created(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fs.protected_regular that fails for a gate which another user has made."""
    with Ledger(directory).gate():
        pass
    opened, flags = os.open, list[int]()

    def noting(path: object, flag: int, *more: Any, **names: Any) -> int:
        if path == "gate":
            flags.append(flag)
        return opened(path, flag, *more, **names)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", noting)
    with Ledger(directory).gate():
        pass
    assert flags
    assert not any(flag & os.O_CREAT for flag in flags)


def test_removed_gate_lets_no_two_in(directory: Path) -> None:
    one, two = Ledger(directory), Ledger(directory)
    with one.gate():
        (directory / "gate").unlink()
        with two.gate():
            assert (directory / "gate").exists()
    with one.gate():
        assert locks.try_exclusive(os.open(directory / "gate", os.O_RDONLY)) is False


def test_gate_that_was_replaced_while_it_was_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock that was had is on a file that is not the gate any more: try again."""
    ledger = Ledger(directory)
    lock = locks.lock_within
    removed = []

    def remove_once(seconds: float, descriptor: int, *, shared: bool = False) -> bool:
        if not removed:
            removed.append(1)
            (directory / "gate").unlink()
        return lock(seconds, descriptor, shared=shared)

    monkeypatch.setattr(locks, "lock_within", remove_once)
    with ledger.gate():
        descriptor = os.open(directory / "gate", os.O_RDONLY)
        assert locks.try_exclusive(descriptor) is False
        os.close(descriptor)


def test_removed_record_is_published_again(directory: Path) -> None:
    one, two = Ledger(directory), Ledger(directory)
    publish(one)
    assert not one.is_lost()
    (directory / files(directory)[0]).unlink()
    assert one.is_lost()
    assert others(two) == []
    publish(one)
    assert not one.is_lost()
    assert len(others(two)) == 1


def test_removed_directory(directory: Path) -> None:
    """It was cleaned away in the middle: an error, and no hang."""
    ledger = Ledger(directory)
    publish(ledger)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    with pytest.raises(LedgerError):
        publish(ledger)
    ledger.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * SIZE, random.Random(1).randbytes(SIZE), b"{}", b'{"v":9}'],
    # Workers must agree on names, and pytest 8.0 writes all of the bytes into them.
    ids=["empty", "zeros", "random", "object", "version"],
)
def test_records_that_cannot_be_understood(directory: Path, content: bytes) -> None:
    """Alive, so it is named; it claims nothing."""
    ledger = Ledger(directory)
    path = directory / "s-1-x.json"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    assert locks.try_shared(descriptor)
    (found,) = others(ledger)
    assert found.record == LeaseRecord(0)
    assert found.problem
    os.close(descriptor)
    assert others(ledger) == []
    assert not path.exists()


def test_planted_entries(directory: Path, tmp_path: Path) -> None:
    """No link is followed, and nothing but a regular file is read or removed."""
    ledger = Ledger(directory)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (directory / "s-1-link.json").symlink_to(secret)
    os.mkfifo(directory / "s-2-fifo.json")
    (directory / "s-3-directory.json").mkdir()
    (directory / "something").write_text("")
    publish(ledger)
    assert others(ledger) == []
    assert secret.exists()
    assert len(list(directory.iterdir())) == 6


@pytest.mark.parametrize("kind", ["file", "fifo", "link", "missing parent that is a file"])
def test_no_directory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "leases"
    if kind == "file":
        path.write_text("")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "real").mkdir()
        path.symlink_to(tmp_path / "real")
    else:
        path.write_text("")
        path = path / "below"
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(path)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_gate_that_is_none(directory: Path, tmp_path: Path, kind: str) -> None:
    ledger = Ledger(directory)
    gate = directory / "gate"
    if kind == "link":
        gate.symlink_to(tmp_path / "x")
    elif kind == "fifo":
        os.mkfifo(gate)
    else:
        gate.mkdir()
    with pytest.raises(LedgerError, match="cannot be locked"), ledger.gate():
        pass


def test_full_disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No record remains; one that was published before is written in place."""
    one, two = Ledger(directory), Ledger(directory)
    publish(two)
    write = os.write
    monkeypatch.setattr(ledgers.os, "write", lambda descriptor, text: write(descriptor, text[:99]))
    with pytest.raises(LedgerError, match="No space left"):
        publish(one)
    assert len(files(directory)) == 1


LIMITED = """
    import resource, sys
    from pathlib import Path
    from pytest_gpushare.leases.ledger import Ledger, LedgerError
    from pytest_gpushare.leases.records import LeaseRecord
    ledger = Ledger(Path(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    try:
        with ledger.gate():
            ledger.publish(LeaseRecord(1))
    except LedgerError as error:
        print(error)
    print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


def test_file_that_may_not_grow(directory: Path) -> None:
    """As on a full disk, by the kernel: an error in words, and no record that is cut off."""
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        f"{directory} cannot be written: No space left on device",
        "['gate']",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, so root")
def test_disk_that_is_full(tmp_path: Path) -> None:
    """What was published before is written in place; a newcomer gets an error and no record."""
    place = tmp_path / "small"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True, timeout=60).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        one, two = Ledger(place / "leases"), Ledger(place / "leases")
        publish(one)
        with suppress(OSError), (place / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass
        with pytest.raises(LedgerError, match="cannot be written: No space left"):
            publish(two)
        publish(one, RECORD._replace(done=5))
        (found,) = others(two)
        assert found.record.done == 5
        one.close()
        two.close()
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user who may not write there, so root")
def test_directory_that_may_not_be_written(public: Path) -> None:
    """Another user's, without room for others: an error for them."""
    public.mkdir(mode=0o755)
    code = """
        import os, sys
        from pathlib import Path
        from pytest_gpushare.leases.ledger import Ledger, LedgerError
        os.setgid(65534)
        os.setuid(65534)
        try:
            with Ledger(Path(sys.argv[1])).gate():
                pass
        except LedgerError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(public)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{public / 'gate'} cannot be locked: Permission denied\n", done.stderr


def test_network_file_system(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "file_system", lambda _: "nfs4")
    with pytest.raises(LedgerError, match="network file system"):
        Ledger(directory)


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user can reach; pytest's own is its user's alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path, "leases")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users, so root")
def test_two_users(public: Path) -> None:
    """Each sees the other; neither can write the other's record, nor remove it."""
    directory = public
    ledger = Ledger(directory)
    publish(ledger)
    code = """
        (mine,) = [p for p in Path(sys.argv[1]).glob("s-*") if p.stat().st_uid == 0]
        with ledger.gate():
            seen = ledger.others()
        assert [s.uid for s in seen] == [0], seen
        for attempt in (lambda: mine.open("r+"), mine.unlink):
            try:
                attempt()
            except PermissionError:
                continue
            raise SystemExit("could write")
        print("held", flush=True)
        input()
    """
    user = "import os\nos.setgid(65534)\nos.setuid(65534)\n"
    text = textwrap.dedent(HOLDER).replace("ledger = ", user + "ledger = ")
    command = [sys.executable, "-c", text + textwrap.dedent(code), str(directory)]
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        (found,) = others(ledger)
        assert (found.uid, found.is_mine) == (65534, False)
        child.kill()
        child.wait(30)
    # A dead record of another user is ignored, and left for its owner.
    assert others(ledger) == []


def test_reads_so_many_entries(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MOST_ENTRIES", 5)
    ledger = Ledger(directory)
    for number in range(20):
        (directory / f"s-{number}-x.json").write_bytes(b"")
    others(ledger)
    assert 15 <= len(files(directory)) < 20


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv(ledgers.VARIABLE, raising=False)
    assert ledgers.default_directory() == Path("/tmp/pytest-gpushare-leases")
    monkeypatch.setenv(ledgers.VARIABLE, str(tmp_path))
    assert ledgers.default_directory() == tmp_path


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="makes a PID namespace, so root on Linux"
)
def test_holder_in_another_pid_namespace(directory: Path) -> None:
    """It is seen as one of another namespace, and gone when it is killed."""
    from pytest_gpushare.gpu.host import pid_space

    code = textwrap.dedent(HOLDER).replace(
        "LeaseRecord(os.getpid(), ",
        "LeaseRecord(os.getpid(), "
        "__import__('pytest_gpushare.gpu.host').gpu.host.pid_space() or '', ",
    )
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c",
               code + textwrap.dedent(HELD), str(directory)]  # fmt: skip
    with child_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        if child.stdout.readline() != b"held\n":
            pytest.skip("no PID namespace can be made here")
        ledger = Ledger(directory)
        (found,) = others(ledger)
        assert found.record.space not in ("", pid_space())
        assert found.record.space.split("/")[0] == str(pid_space()).split("/")[0]
        child.kill()
        child.wait(30)
    wait_for(lambda: not others(ledger))


def test_more_devices_than_a_record_holds(directory: Path) -> None:
    devices = {f"GPU-{n:090d}": DeviceLease(1 << 49, 1 << 49, 1 << 49) for n in range(64)}
    ledger = Ledger(directory)
    with (
        pytest.raises(LedgerError, match="64 devices are more than a record holds"),
        ledger.gate(),
    ):
        ledger.publish(RECORD._replace(devices=devices))
