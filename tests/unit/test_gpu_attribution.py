"""Whose VRAM it is: descendants, Ollama, others, and all that NVML may leave unsaid."""

from __future__ import annotations

import pytest

from pytest_gpushare.gpu.attribution import Owners, Teller
from pytest_gpushare.gpu.devices import GpuProcess
from pytest_gpushare.gpu.sampler import Parts

PARENTS = {11: 10, 12: 11, 21: 20, 10: 1, 20: 1, 30: 1, 40: 41, 41: 40}
WORKERS = {10: "gw0", 20: "gw1"}


def teller(parents: dict[int, int] = PARENTS) -> tuple[Teller, Owners]:
    owners = Owners(parents.get, lambda pid: pid in parents)
    return Teller(owners), owners


def held(*processes: tuple[int, int | None]) -> tuple[GpuProcess, ...]:
    return tuple(GpuProcess(pid, used, is_ollama=pid == 30) for pid, used in processes)


def test_a_worker_counts_with_its_descendants() -> None:
    told, _ = teller()
    parts = told.parts(100, held((10, 5), (12, 7), (21, 2), (30, 40)), WORKERS)
    assert parts == Parts(40, 46, {"gw0": 12, "gw1": 2})


def test_a_child_outlives_its_parent() -> None:
    """A process that lost its parent to init keeps its owner while NVML lists it."""
    parents = dict(PARENTS)
    told, owners = teller(parents)
    told.parts(10, held((12, 7)), WORKERS)
    parents[12] = 1
    assert told.parts(10, held((12, 7)), WORKERS).workers == {"gw0": 7}
    owners.forget_all_but(set())
    assert told.parts(10, held((12, 7)), WORKERS).workers == {}


def test_a_dead_worker_whose_vram_comes_back_late_is_known() -> None:
    parents = dict(PARENTS)
    told, _ = teller(parents)
    told.parts(10, held((10, 7)), WORKERS)
    del parents[10]
    assert told.parts(10, held((10, 7)), {}).workers == {"gw0": 7}


@pytest.mark.parametrize(
    "processes",
    [
        None,
        held((10, None)),
        held((10, 5), (12, None)),
        # A PID that this host does not have: NVML tells those of another one.
        held((10, 5), (99, 3)),
        # Nothing was ever seen here: in some containers the list is always empty.
        (),
    ],
)
def test_what_nvml_does_not_tell_is_unknown(processes: tuple[GpuProcess, ...] | None) -> None:
    told, _ = teller()
    assert told.parts(100, processes, WORKERS) == Parts()


def test_once_seen_an_empty_list_means_nothing() -> None:
    told, _ = teller()
    told.parts(100, held((10, 5)), WORKERS)
    assert told.parts(90, (), WORKERS) == Parts(0, 90, {})


def test_a_circle_of_parents_ends() -> None:
    told, _ = teller()
    assert told.parts(100, held((40, 5)), WORKERS) == Parts(0, 100, {})
