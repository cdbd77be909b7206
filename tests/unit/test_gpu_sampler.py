"""One reader of NVML, however many ask; a reader that hangs or fails stops nobody."""

from __future__ import annotations

import threading

import pytest

from pytest_gpushare.gpu import sampler as live
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.sampler import LiveVram


class Card:
    """A reader whose answers a test sets."""

    def __init__(self) -> None:
        self.read = 0
        self.fails = False
        self.hangs = threading.Event()
        self.hangs.set()

    def memory(self) -> dict[str, Memory]:
        self.read += 1
        self.hangs.wait(10)
        if self.fails:
            raise OSError("lost")
        return {"GPU-0": Memory(24, self.read, 24 - self.read)}

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        return {"GPU-0": (GpuProcess(7, 3),)}


def test_a_reading_is_kept_for_as_long_as_it_is_fresh() -> None:
    now = [0.0]
    card = Card()
    vram = LiveVram(card, clock=lambda: now[0])
    assert vram.memory(0.05).devices == {"GPU-0": Memory(24, 1, 23)}
    now[0] = 0.04
    assert vram.memory(0.05).at == 0.0
    now[0] = 0.06
    assert vram.memory(0.05).devices["GPU-0"].used == 2
    assert vram.processes().devices == {"GPU-0": (GpuProcess(7, 3),)}
    vram.close()


def test_many_who_ask_at_once_cost_one_reading() -> None:
    card = Card()
    card.hangs.clear()
    vram = LiveVram(card)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(vram.memory(5).devices["GPU-0"].used))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    card.hangs.set()
    for thread in threads:
        thread.join(30)
    assert (found, card.read) == ([1] * 8, 1)
    vram.close()


def test_a_reader_that_fails_says_nothing_and_is_asked_again() -> None:
    card = Card()
    card.fails = True
    vram = LiveVram(card)
    assert vram.memory(0).devices == {}
    card.fails = False
    assert vram.memory(0).devices["GPU-0"].used == 2
    vram.close()


def test_a_reader_that_hangs_is_waited_for_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "READ_TIMEOUT", 0.05)
    card = Card()
    vram = LiveVram(card)
    first = vram.memory(0)
    card.hangs.clear()
    assert vram.memory(0) == first
    card.hangs.set()
    vram.close()
    # Closed: the last reading is all that there is.
    assert vram.memory(0).devices.keys() == {"GPU-0"}
