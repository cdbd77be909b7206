"""What workers tell of their tests, and the run's list that is made of it."""

from __future__ import annotations

import execnet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.config.settings import parse_rules
from pytest_gpushare.dispatch.suite import KindsOfWorkers, Suite, group_of, plain_id, weigh
from pytest_gpushare.scheduler.needs import (
    CollectedTests,
    Declared,
    read,
    written,
)
from pytest_gpushare.units import GB
from pytest_gpushare.wire import spread, squeezed

from .test_planning_sizing import DEFAULTS

NOTHING = Declared()
MARKED = Declared(route="gpu", vram=6 * GB)


def collected(*said: Declared, skips: tuple[bool, ...] | None = None) -> CollectedTests:
    """A worker's message about so many tests."""
    return CollectedTests(7, said, ("",) * len(said), skips or (False,) * len(said))


@given(st.lists(st.integers(0, 3) | st.text(max_size=2)))
def test_runs_lose_nothing(values: list[int | str]) -> None:
    """What is squeezed comes back, and long runs cost nothing."""
    assert spread(*squeezed(values)) == values
    assert squeezed(["a"] * 1000) == (["a"], [0, 1000])


def test_message_travels() -> None:
    """The message consists of what execnet carries, and means the same afterwards."""
    before = CollectedTests(
        7, (NOTHING, MARKED, MARKED), ("", "m.py", "m.py"), (False, True, False)
    )
    after = read(execnet.loads(execnet.dumps(written(before))))
    assert after == CollectedTests(
        7, list(before.declared), list(before.groups), list(before.skips)
    )


def test_too_many_tests_are_not_believed() -> None:
    """A length beyond reason does not fill the memory."""
    with pytest.raises(ValueError, match="too many"):
        spread(["x"], [0, 10**12])


def test_same_collections_share_their_numbers() -> None:
    """Workers that collected the same need no map; a different one has one."""
    suite = Suite()
    first, same = suite.add(["a", "b"]), suite.add(["a", "b"])
    assert first is same
    assert (first.indices, first.place(1)) == (None, 1)
    other = suite.add(["b", "c", "a"])
    assert suite.nodeids == ["a", "b", "c"]
    assert [other.place(number) for number in range(3)] == [2, 0, 1]
    assert suite.number("c") == 2


def test_a_test_that_is_collected_twice() -> None:
    """Each occurrence is a test of its own."""
    suite = Suite()
    assert suite.add(["a", "b", "a"]).numbers == [0, 1, 2]
    assert suite.add(["a", "a", "b"]).numbers == [0, 2, 1]


def test_what_a_late_worker_alone_knows_is_not_run() -> None:
    """After the start the list is closed."""
    suite = Suite()
    suite.add(["a"])
    suite.is_closed = True
    late = suite.add(["new", "a"])
    assert suite.nodeids == ["a"]
    assert late.indices == {0: 1}


def test_weighing() -> None:
    """Markers go before rules; a skip for want of a GPU makes a GPU test; both skip: none."""
    suite, kinds = Suite(), KindsOfWorkers()
    ids = ["t.py::a", "t.py::b", "t.py::c", "t.py::d", "big/t.py::e"]
    said = (MARKED, NOTHING, NOTHING, Declared(route="cpu"), NOTHING)
    gpu = collected(*said, skips=(False, False, True, False, False))
    cpu = collected(*said, skips=(False, True, True, True, False))
    kinds.add(True, suite.add(ids), gpu)
    kinds.add(False, suite.add(ids), cpu)
    settings = DEFAULTS._replace(vram=parse_rules("big = 8GB\nt.py::a = 1GB"))
    weighed = weigh(suite, kinds, settings, "load", lambda _: (None, 2.5))
    assert [job.marked for job in weighed.jobs] == [True, True, False, False, True]
    assert weighed.by_skip == [1]
    needs = [job.need.vram if job.need else None for job in weighed.jobs]
    assert needs == [6 * GB, None, None, 0, 8 * GB]
    assert {job.duration for job in weighed.jobs} == {2.5}
    assert weighed.has_needs


def test_a_marker_alone_is_no_need() -> None:
    """Where all workers have a GPU, `gpu` alone asks for nothing that xdist cannot do."""
    suite, kinds = Suite(), KindsOfWorkers()
    kinds.add(True, suite.add(["a", "b"]), collected(Declared(route="gpu", required=True), NOTHING))
    assert not weigh(suite, kinds, DEFAULTS, "load", lambda _: (None, None)).has_needs


@pytest.mark.parametrize(
    ("nodeid", "dist", "group", "plain"),
    [
        ("a.py::T::t[x::y]", "loadfile", "a.py", "a.py::T::t[x::y]"),
        ("a.py::T::t", "loadscope", "a.py::T", "a.py::T::t"),
        ("a.py::t@g", "loadgroup", "g", "a.py::t"),
        ("a.py::t[a@b]", "loadgroup", "sent", "a.py::t[a@b]"),
        ("a.py::t@g", "load", "sent", "a.py::t@g"),
        ("a.py::t", "worksteal", "sent", "a.py::t"),
    ],
)
def test_groups(nodeid: str, dist: str, group: str, plain: str) -> None:
    """The key of a group is xdist's; else it is what the worker says."""
    assert group_of(nodeid, "sent", dist) == group
    assert plain_id(nodeid, dist) == plain
