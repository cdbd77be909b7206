"""What is learned of tests: what sets a figure, what raises it, and what is thrown away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.events import Record
from pytest_gpushare.session import needs_store as profile
from pytest_gpushare.session.needs_store import Learned, NeedsRecorder, recall_needs
from pytest_gpushare.units import GB, MB

CARD = "NVIDIA H100"


class Cache:
    """pytest's cache as far as it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mkdir(self, name: str) -> Path:
        found = self.path / "d" / name
        found.mkdir(parents=True, exist_ok=True)
        return found


def worker(device: str | None = "GPU-1", *, is_undercounted: bool = False) -> Any:
    return SimpleNamespace(device=device, context=600 * MB, is_undercounted=is_undercounted)


class Run:
    """One run after the other on the same cache."""

    def __init__(self, path: Path) -> None:
        self.config: Any = SimpleNamespace(cache=Cache(path))
        self.file = path / "d" / "gpushare" / "needs.json"
        self.began()

    def began(self) -> None:
        self.record, self.notes = Record(), list[str]()
        card = SimpleNamespace(uuid="GPU-1", name=CARD)
        plan: Any = SimpleNamespace(slots=[SimpleNamespace(device=card)])
        self.tests: Any = []
        self.workers: Any = {"gw0": worker(), "gw9": worker(None)}
        self.profile = NeedsRecorder(
            self.config, plan, self.workers, self, self.record, self.notes.append
        )
        self.profile.start()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tests)

    def test(self, peak: int, worker: str = "gw0", **more: Any) -> None:
        told = {"nodeid": "t", "start": 1.0, "end": 3.5, "outcome": "passed", "attempts": 1}
        self.profile.measured(worker, {**told, "peak": peak, "exact": True, **more})

    def ended(self) -> Learned | None:
        self.profile.stop()
        self.began()
        return recall_needs(self.config, CARD).get("t")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_need_is_the_peak_with_context_and_margin() -> None:
    assert Learned(1 * GB).need(600 * MB) == (1 * GB + 600 * MB) * 115 // 100
    # What allocates nothing has no context either.
    assert Learned(0).need(600 * MB) == 0
    assert Learned(None, 1.0).need(600 * MB) is None


def test_the_last_peak_wins(run: Run) -> None:
    run.test(4 * GB)
    kept = run.ended()
    assert kept is not None
    assert (kept.peak, kept.duration) == (4 * GB, 2.5)
    assert kept.date.startswith("20")
    run.test(1 * GB)
    (told,) = run.record.events("need-changed")
    text = f"t took 1.0 GB of VRAM, 4.0 GB when it last ran ({kept.date})"
    assert told.text == text
    kept = run.ended()
    assert kept is not None
    assert kept.peak == 1 * GB


def test_small_differences_are_not_told(run: Run) -> None:
    run.test(4 * GB)
    run.ended()
    run.test(4 * GB + 100 * MB)
    assert run.record.events() == []


def test_lower_bounds_raise_and_never_lower(run: Run) -> None:
    """A blurred peak, or NVML's samples."""
    run.test(4 * GB)
    run.ended()
    run.test(1 * GB, exact=False)
    kept = run.ended()
    assert kept is not None
    assert kept.peak == 4 * GB
    run.profile.at_least(CARD, "t", 6 * GB)
    kept = run.ended()
    assert kept is not None
    assert (kept.peak, kept.duration) == (6 * GB, 2.5)


@pytest.mark.parametrize(
    ("need", "named"), [(None, False), (4400 * MB, False), (5 * GB, False), (2 * GB, True)]
)
def test_more_than_its_need(run: Run, need: int | None, named: bool) -> None:
    """Beyond what one run differs from the next by; the context counts."""
    run.test(4 * GB, need=need)
    events = run.record.events("need-exceeded")
    assert bool(events) == named
    if named:
        assert events[0].text == "t took 4.59 GB of VRAM, its need was 2.0 GB"


@pytest.mark.parametrize(
    ("worker", "more"),
    [("gw0", {"outcome": "failed"}), ("gw0", {"outcome": "skipped"}), ("gw9", {})],
)
def test_what_says_nothing_of_the_need(run: Run, worker: str, more: dict[str, Any]) -> None:
    """A test that ended early, or a worker without a device."""
    run.test(4 * GB, worker, **more)
    assert run.ended() is None
    assert not run.file.exists()


def test_a_second_attempt_has_no_duration(run: Run) -> None:
    """It counts both attempts and the wait between them."""
    run.test(4 * GB, attempts=2)
    assert run.ended() == Learned(4 * GB, None, recall_needs(run.config, CARD)["t"].date)


def seen(outcome: str = "passed", worker: str = "gw0", size: int | None = None) -> Any:
    """A test as the journal knows it."""
    peak = None if size is None else SimpleNamespace(size=size, source="nvml")
    return SimpleNamespace(
        nodeid="t", worker=worker, outcome=outcome, start=1.0, end=1.5, peak=peak
    )


def test_what_no_framework_told(run: Run) -> None:
    """How long it took, from pytest's reports; NVML's samples set no peak but raise one."""
    run.tests = [seen(size=4 * GB)]
    kept = run.ended()
    assert kept is not None
    assert (kept.peak, kept.duration) == (None, 0.5)
    run.test(1 * GB)
    run.ended()
    run.tests = [seen(size=4 * GB + 600 * MB)]
    kept = run.ended()
    assert kept is not None
    assert (kept.peak, kept.duration) == (4 * GB, 0.5)
    run.tests = [seen(outcome="failed")]
    assert run.ended() == kept
    run.tests = [seen(worker="gw9")]
    run.ended()
    assert recall_needs(run.config, "")["t"].duration == 0.5


def test_nothing_is_learned_beside_a_library_that_no_framework_counts(run: Run) -> None:
    """A need that leaves out its VRAM would be too small."""
    for is_undercounted, peak in ((False, 1 * GB), (True, None)):
        run.test(1 * GB)
        run.tests = [seen()]
        run.workers["gw0"] = worker(is_undercounted=is_undercounted)
        kept = run.ended()
        assert kept is not None
        assert (kept.peak, kept.duration) == (peak, 2.5)


def test_durations_of_tests_without_a_gpu(run: Run) -> None:
    run.profile.took("cpu", 0.5)
    run.profile.stop()
    assert recall_needs(run.config, "")["cpu"].duration == 0.5


GOOD = [4 * GB, 2.5, "2026-11-24"]
BAD = [
    [-1, 2.5, "2026-11-24"],
    [True, 2.5, "2026-11-24"],
    [1.5, 2.5, "2026-11-24"],
    [2**60, 2.5, "2026-11-24"],
    [1, -2.5, "2026-11-24"],
    [1, float("nan"), "2026-11-24"],
    [1, float("inf"), "2026-11-24"],
    [1, "x", "2026-11-24"],
    [1, 2.5, "yesterday"],
    [1, 2.5, None],
    [1, 2.5],
    {},
    None,
]


@pytest.mark.parametrize("bad", BAD)
def test_nonsense_in_the_file_is_left_out(run: Run, bad: object) -> None:
    run.test(1)
    run.profile.stop()
    tests = {"good": GOOD, "bad": bad, "x" * 2000: GOOD}
    run.file.write_text(json.dumps({"version": 1, "devices": {CARD: tests, "other": 7}}))
    assert recall_needs(run.config, CARD) == {"good": Learned(4 * GB, 2.5, "2026-11-24")}
    assert recall_needs(run.config, "other") == {}
    # The next run keeps what is good, beside what it finds itself.
    run.began()
    run.test(3 * GB)
    run.ended()
    assert recall_needs(run.config, CARD).keys() == {"good", "t"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"version": 2}', '{"version": 1}', "[" * 100_000, "\xff"]
)
def test_a_file_that_is_none_of_ours(run: Run, text: str) -> None:
    run.test(1)
    run.profile.stop()
    run.file.write_bytes(text.encode("latin-1"))
    assert recall_needs(run.config, CARD) == {}


def test_the_file_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests that ran longest ago go first; one larger than the limit is not read."""
    monkeypatch.setattr(profile, "MOST_TESTS", 3)
    run.test(1)
    run.profile.stop()
    old = {f"old{n}": [1, 1.0, f"2020-01-0{n}"] for n in (1, 2, 3)}
    run.file.write_text(json.dumps({"version": 1, "devices": {CARD: old}}))
    run.began()
    run.test(5)
    run.ended()
    assert recall_needs(run.config, CARD).keys() == {"t", "old3", "old2"}
    monkeypatch.setattr(profile, "_MOST_BYTES", 10)
    assert recall_needs(run.config, CARD) == {}


def test_no_cache_no_file(run: Run) -> None:
    """Under -p no:cacheprovider."""
    run.config.cache = None
    run.began()
    run.test(1)
    run.profile.stop()
    assert recall_needs(run.config, CARD) == {}
    assert not run.file.exists()


def test_a_cache_that_cannot_be_written_is_a_note(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run.test(1)
    monkeypatch.setattr(Path, "replace", full)
    run.profile.stop()
    assert "No space left on device" in run.notes[0]
    assert not run.file.exists()
