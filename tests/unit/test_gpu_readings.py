"""One reader of NVML, however many ask; a reader that hangs or fails stops nobody."""

from __future__ import annotations

import threading
import time

import pytest
from simulator.child import wait_for

from pytest_gpushare.gpu import readings as live
from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.readings import DevicePeaks, DeviceSamples, LiveVram


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


def test_a_driver_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it answers in time again; meanwhile it is known not to answer."""
    monkeypatch.setattr(live, "READ_TIMEOUT", 0.2)
    card = Card()
    vram = LiveVram(card)
    first = vram.memory(0)
    card.hangs.clear()
    began = time.monotonic()
    for _ in range(20):
        assert vram.memory(0) == first
        assert vram.processes(0).devices == {}
    # Of forty questions none but the first was waited for, on a busy machine, too.
    assert 0.2 <= time.monotonic() - began < 4
    assert not vram.is_answering
    card.hangs.set()
    # The answer to the question that hung is late: it does not show that the next one will be
    # answered in time.
    wait_for(lambda: vram.memory(0) and vram.is_answering)
    assert vram.memory(0).devices["GPU-0"].used > 1
    vram.close()


def test_all_threads_wait_for_the_same_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time-out ends the waiting of every other thread, and none begins it again."""
    monkeypatch.setattr(live, "READ_TIMEOUT", 0.3)
    card = Card()
    vram = LiveVram(card)
    vram.memory(0)
    card.hangs.clear()
    took: list[float] = []

    def ask() -> None:
        time.sleep(0.1 * len(took))
        began = time.monotonic()
        for _ in range(5):
            vram.memory(0)
            vram.processes(0)
        took.append(time.monotonic() - began)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(10)
    assert len(took) == 4
    assert max(took) < 0.5
    card.hangs.set()
    vram.close()


def test_a_driver_that_is_slow_in_each_call_costs_one_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its figures go on to be read, in the background."""
    monkeypatch.setattr(live, "READ_TIMEOUT", 0.1)
    card = Card()
    read = card.memory
    monkeypatch.setattr(card, "memory", lambda: (time.sleep(0.2), read())[1])
    vram = LiveVram(card)
    began = time.monotonic()
    while time.monotonic() - began < 1:
        vram.memory(0)
        time.sleep(0.01)
    assert card.read >= 3
    assert not vram.is_answering
    vram.close()


def reading(workers: dict[str, int] | None, used: int, **more: int) -> DeviceUsage:
    """A device on which other processes hold 20 bytes and Ollama 30."""
    held = sum((workers or {}).values())
    ollama, others = more.get("ollama", 30), more.get("others", 20)
    rise = max(0, used - ollama - others - held)
    return DeviceUsage(1000, used, 1000 - used, {"Ollama": ollama}, workers, rise)


def test_peaks_of_tests_are_never_below_the_rise_that_nobody_explains() -> None:
    """A test that held much between two process lists: what it held is at least reported."""
    samples = DeviceSamples()
    samples.listed(reading({"gw0": 100}, 150))
    samples.add(0.2, reading({"gw0": 100}, 150))
    samples.add(0.4, reading({"gw0": 100}, 650))
    samples.add(0.6, reading({"gw0": 100}, 150))
    samples.listed(reading({"gw0": 120}, 170))
    peaks = samples.peaks
    assert (peaks.used, peaks.workers, peaks.rise, peaks.unattributed) == (650, 120, 600, 480)
    assert not peaks.counted(0, 600).is_rise_exact


def test_what_a_neighbour_or_another_process_took_is_not_laid_to_the_tests() -> None:
    """They are seen in the next process list, which explains the samples before it."""
    samples = DeviceSamples()
    samples.listed(reading({"gw0": 100}, 150))
    samples.add(0.2, reading({"gw0": 100}, 550))
    samples.listed(reading({"gw0": 100}, 550, ollama=330, others=120))
    assert (samples.peaks.workers, samples.peaks.rise) == (100, 100)


def test_without_process_lists_the_whole_rise_is_unattributed() -> None:
    samples = DeviceSamples()
    samples.add(0.2, reading(None, 150))
    samples.listed(None)
    assert (samples.peaks.workers, samples.peaks.unattributed) == (None, 100)
    assert not samples.peaks.counted(0, 100).is_rise_exact


def test_a_peak_that_no_sample_shows_is_at_least_what_a_worker_knows() -> None:
    """By a framework's counters it held 400 where 120 were read."""
    peaks = DevicePeaks(used=170, workers=120, rise=120)
    assert peaks.counted(120, None) == peaks
    known = peaks.counted(400, None)
    assert (known.used, known.workers, known.rise, known.unattributed) == (400, 400, 400, 0)
    assert not known.is_unattributed
    # What others held beside it at that moment is not known.
    beside = DevicePeaks(used=1100, workers=120, rise=120).counted(400, 400)
    assert (beside.used, beside.rise) == (1100, 400)
    assert (beside.is_used_exact, beside.is_rise_exact) == (False, True)
    # Where the driver attributes nothing, one worker's figure says nothing of all.
    assert DevicePeaks(used=170, workers=None, rise=20).counted(400, 400).rise == 20


def test_peaks_are_lower_bounds_unless_the_counters_show_that_little_was_missed() -> None:
    peaks = DevicePeaks(used=400, workers=100, rise=100)
    assert (peaks.is_used_exact, peaks.is_rise_exact) == (False, False)
    for most, is_used_exact, is_rise_exact in (
        (None, False, False),
        (100, True, True),
        (105, True, True),
        # 20 bytes more are 5 % of the device's 400, and 20 % of the tests' 100.
        (120, True, False),
        (121, False, False),
        # The counters' assumed context may be larger than the real one.
        (90, True, True),
    ):
        known = peaks.counted(100, most)
        assert (known.is_used_exact, known.is_rise_exact) == (is_used_exact, is_rise_exact), most
    # What no list attributes is no exact figure of the tests.
    assert not DevicePeaks(used=400, workers=80, rise=100).counted(80, 80).is_rise_exact


def test_what_is_taken_while_no_test_runs_is_not_laid_to_the_tests() -> None:
    """Ollama loads a model before the first worker is there, or after the last one."""
    samples = DeviceSamples()
    samples.add(0.2, reading(None, 450))
    samples.without_tests()
    samples.listed(reading({"gw0": 100}, 550, ollama=330, others=120))
    samples.add(0.4, reading({"gw0": 100}, 550, ollama=330, others=120))
    samples.listed(reading({"gw0": 100}, 550, ollama=330, others=120))
    assert samples.peaks.rise == 100


def test_vram_of_a_process_that_has_just_ended_is_not_laid_to_the_tests() -> None:
    """It is in the list no more, and comes back a moment later."""
    samples = DeviceSamples()
    samples.listed(reading({"gw0": 100}, 550, ollama=330, others=120))
    samples.listed(reading({"gw0": 100}, 550, ollama=330, others=20))
    samples.add(0.2, reading({"gw0": 100}, 550, ollama=330, others=20))
    samples.listed(reading({"gw0": 100}, 450, ollama=330, others=20))
    assert samples.peaks.rise == 100


def test_what_was_there_before_the_run_explains_itself_whenever_memory_is_read() -> None:
    """A worker that gives VRAM back between the list and the memory makes others look smaller."""
    samples = DeviceSamples()
    samples.listed(reading({"gw0": 500}, 520)._replace(explained=120))
    samples.add(0.2, reading({"gw0": 500}, 620)._replace(explained=120))
    samples.listed(reading({"gw0": 500}, 520)._replace(explained=120))
    assert samples.peaks.rise == 500
