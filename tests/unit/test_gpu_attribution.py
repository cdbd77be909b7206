"""Who holds VRAM: workers with their descendants, neighbours, others, and what nobody explains."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pytest_gpushare.gpu.attribution import Attribution, DeviceUsage, Statement, combined
from pytest_gpushare.gpu.devices import Device, GpuProcess, Memory

PARENTS = {11: 10, 12: 11, 21: 20, 10: 1, 20: 1, 30: 1, 40: 41, 41: 40, 50: 1}
WORKERS = {10: "gw0", 20: "gw1"}


def listed(*processes: tuple[int, int | None]) -> tuple[GpuProcess, ...]:
    """Processes of which PID 30 is Ollama's."""
    return tuple(GpuProcess(pid, used, "Ollama" if pid == 30 else "") for pid, used in processes)


class Machine:
    """One device of 1000 bytes, `used` of them before the run."""

    def __init__(
        self,
        used: int = 0,
        processes: tuple[GpuProcess, ...] | None = (),
        statements: Sequence[Statement] = (),
    ) -> None:
        self.parents = dict(PARENTS)
        device = Device("A", "GPU", "0", 1000, used, 1000 - used, processes)
        self.attribution = Attribution(
            [device],
            statements,
            parent=lambda pid: self.parents.get(pid),
            alive=lambda pid: pid in self.parents,
        )

    def usage(
        self,
        used: int,
        processes: tuple[GpuProcess, ...] | None,
        workers: dict[int, str] = WORKERS,
        statements: Sequence[Statement] = (),
    ) -> DeviceUsage:
        """Who holds what now."""
        splits = {"A": self.attribution.split(processes, workers)}
        memory = {"A": Memory(1000, used, 1000 - used)}
        return self.attribution.usage(memory, splits, statements)["A"]


def test_a_worker_counts_with_its_descendants() -> None:
    here = Machine(46)
    usage = here.usage(100, listed((10, 5), (12, 7), (21, 2), (30, 40)))
    assert usage.workers == {"gw0": 12, "gw1": 2}
    assert usage.descendants == {"gw0": 7, "gw1": 2}
    assert (usage.of("Ollama"), usage.identified) == (40, {"Ollama": 40})
    assert (usage.others, usage.unattributed) == (46, 0)


def test_what_a_fixture_keeps_is_the_worker_itself() -> None:
    """The processes that it has started, and theirs: none was left behind by a test."""
    here = Machine()
    here.attribution.keep("gw0", [11])
    usage = here.usage(100, listed((10, 5), (12, 7), (21, 2)))
    assert usage.workers == {"gw0": 12, "gw1": 2}
    assert usage.descendants == {"gw1": 2}
    here.attribution.keep("gw0", [])
    usage = here.usage(100, listed((10, 5), (12, 7)))
    assert usage.descendants == {"gw0": 7}


def test_a_child_outlives_its_parent() -> None:
    """A process that lost its parent to init keeps its owner while NVML lists it."""
    here = Machine()
    here.usage(10, listed((12, 7)))
    here.parents[12] = 1
    assert here.usage(10, listed((12, 7))).workers == {"gw0": 7}
    here.attribution.forget_all_but(set())
    assert here.usage(10, listed((12, 7))).workers == {}


def test_a_dead_worker_whose_vram_comes_back_late_is_known() -> None:
    here = Machine()
    here.usage(10, listed((10, 7)))
    del here.parents[10]
    assert here.usage(10, listed((10, 7)), {}).workers == {"gw0": 7}


@pytest.mark.parametrize(
    "processes",
    [
        None,
        listed((10, None)),
        listed((10, 5), (12, None)),
        # A PID that this host does not have: NVML lists those of another one.
        listed((10, 5), (99, 3)),
        # Nothing was ever listed here: in some containers the list is always empty.
        (),
    ],
)
def test_what_nvml_does_not_attribute_is_unknown(processes: tuple[GpuProcess, ...] | None) -> None:
    usage = Machine(10).usage(100, processes)
    assert (usage.workers, usage.tests, usage.others, usage.remainder) == (None,) * 4
    # The rise is known all the same, but for what a process of somebody else has taken of it.
    assert usage.unattributed == (87 if processes and processes[-1].pid == 99 else 90)


def test_once_seen_an_empty_list_means_nothing_is_held() -> None:
    here = Machine(50)
    here.usage(100, listed((10, 5)))
    usage = here.usage(90, ())
    assert (usage.workers, usage.others, usage.unattributed) == ({}, 50, 40)


def test_a_cycle_of_parents_ends() -> None:
    usage = Machine(95).usage(100, listed((40, 5)))
    assert (usage.workers, usage.others, usage.unattributed) == ({}, 100, 0)


def test_the_rise_that_nobody_explains_is_unattributed() -> None:
    """Not the VRAM that was in use before the run, nor what another process has taken since."""
    here = Machine(20, listed((50, 15)))
    usage = here.usage(100, listed((50, 25), (10, 30)))
    assert (usage.tests, usage.others, usage.unattributed) == (30, 30, 40)
    assert usage.remainder == 70


@pytest.mark.parametrize("is_listed", [True, False], ids=["wrapper", "hidden"])
def test_a_neighbour_that_nvml_does_not_identify_counts_by_its_own_word(is_listed: bool) -> None:
    """One figure, whether its process has an unknown name or is not listed at all."""
    processes = listed((50, 110)) if is_listed else ()
    said = [Statement("Ollama", 100, ["A"])]
    here = Machine(120, processes, said)
    assert here.attribution.start["A"].of("Ollama") == 100
    usage = here.usage(150, (*processes, *listed((10, 30))), statements=said)
    assert (usage.of("Ollama"), usage.identified) == (100, {})
    assert (usage.tests, usage.others, usage.unattributed) == (30, 20, 0)
    # Never more than is in use.
    assert here.usage(60, listed((10, 30)), statements=said).of("Ollama") == 60


def test_a_statement_is_not_counted_on_top_of_the_process_list() -> None:
    said = [Statement("Ollama", 35)]
    assert Machine().usage(100, listed((30, 40)), statements=said).of("Ollama") == 40


def test_a_neighbour_that_says_it_holds_nothing_is_known_to() -> None:
    usage = Machine().usage(5, None, statements=[Statement("Ollama")])
    assert usage.neighbours == {"Ollama": 0}


def test_devices_together() -> None:
    """Each holder on all of them; where one list attributes nothing, the sum does not either."""
    one = DeviceUsage(100, 70, 30, {"Ollama": 20}, {"gw0": 30, "gw1": 10}, unattributed=5)
    other = DeviceUsage(50, 40, 10, {"Ollama": 10}, {"gw0": 5})
    both = combined([one, other])
    assert (both.total, both.used, both.free, both.of("Ollama")) == (150, 110, 40, 30)
    assert both.workers == {"gw0": 35, "gw1": 10}
    assert (both.remainder, both.others) == (35, 30)
    assert combined([one, other._replace(workers=None)]).tests is None
