"""The record of a session: it fits into its block, and damaged ones are refused."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pytest_gpushare.leases.records import (
    SIZE,
    DeviceLease,
    LeaseRecord,
    SessionWorker,
    UnreadableError,
    from_bytes,
    to_bytes,
)

RECORD = LeaseRecord(
    pid=1234,
    space="boot/pid:[1]",
    root="/srv/a",
    user="ci",
    began=1764400000.0,
    devices={"GPU-0": DeviceLease(9 << 30, 0, 12 << 30, 1 << 30)},
    ticket=3,
    renewed=77.5,
    workers=(SessionWorker("gw0", 1300, "gpu", "GPU-0", 9 << 30),),
    models=("qwen2.5:14b",),
    done=4,
    total=10,
)


def damaged(**changes: Any) -> bytes:
    document = json.loads(to_bytes(RECORD))
    document.update(changes)
    return json.dumps({k: v for k, v in document.items() if v is not None}).encode()


def test_comes_back_as_it_was_written() -> None:
    content = to_bytes(RECORD)
    assert len(content) == SIZE
    assert from_bytes(content) == RECORD


def test_workers_beyond_the_block_are_left_out() -> None:
    """CPU workers first; what is claimed never is."""
    cpu = [SessionWorker(f"gw{n}", 10_000 + n, "cpu", None, 0) for n in range(300)]
    gpu = [SessionWorker(f"gw{n}", 20_000 + n, "gpu", "GPU-0", 1 << 30) for n in range(8)]
    content = to_bytes(RECORD._replace(workers=(*cpu, *gpu), root="/ä\u4e2d" * 200))
    found = from_bytes(content)
    assert len(content) == SIZE
    assert found.devices == RECORD.devices
    assert sum(worker.role == "gpu" for worker in found.workers) == 8
    assert 0 < len(found.workers) < 308


@pytest.mark.parametrize(("devices", "is_bare"), [(15, False), (32, True)])
def test_models_then_names_are_left_out(devices: int, is_bare: bool) -> None:
    """Where what is claimed leaves no room for them."""
    claimed = {f"GPU-{n:089d}": DeviceLease(1 << 49, n + 1) for n in range(devices)}
    models = tuple(f"{n:0190d}" for n in range(16))
    content = to_bytes(RECORD._replace(devices=claimed, models=models, root="/srv" * 50))
    found = from_bytes(content)
    assert (len(content), found.devices, found.models) == (SIZE, claimed, ())
    assert (found.root == "") == is_bare


def test_more_devices_than_fit() -> None:
    devices = {f"GPU-{n:090d}": DeviceLease(1 << 49, 1 << 49, 1 << 49, 1 << 49) for n in range(64)}
    with pytest.raises(UnreadableError, match="64 devices"):
        to_bytes(RECORD._replace(devices=devices))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 4096,
        b"null",
        b"\xff" * 4096,
        to_bytes(RECORD)[:100],
        damaged(pid="1"),
        damaged(pid=True),
        damaged(pid=-1),
        damaged(devices=[]),
        damaged(devices={"GPU-0": [1 << 51]}),
        damaged(devices={"GPU-0": [-1]}),
        damaged(devices={"GPU-0": [1.5]}),
        damaged(workers=3),
        damaged(workers=[[]]),
        damaged(workers=[["gw0", 1, "gpu", 7, 1]]),
        damaged(began="soon"),
        damaged(renewed=float("nan")),
        damaged(ticket=None),
        damaged(done=10**400),
    ],
    ids=range(20),
)
def test_damaged(content: bytes) -> None:
    with pytest.raises(UnreadableError, match="damaged"):
        from_bytes(content)


def test_newer_version() -> None:
    with pytest.raises(UnreadableError, match="newer version"):
        from_bytes(damaged(v=2))


def test_random_bytes_never_do_harm() -> None:
    """Whatever stands in the file, it is read or refused."""
    draw = random.Random(18)
    whole = bytearray(to_bytes(RECORD))
    for _ in range(3000):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            broken[draw.randrange(400)] = draw.randrange(256)
        try:
            found = from_bytes(bytes(broken))
        except UnreadableError:
            continue
        assert all(0 <= share.lease < 1 << 50 for share in found.devices.values())


def test_foreign_text_is_made_printable() -> None:
    found = from_bytes(damaged(root="/srv/\x1b[31m\n" + "x" * 1000, user="a\tb"))
    assert found.root.isprintable()
    assert len(found.root) <= 200
    assert found.user == "a b"
