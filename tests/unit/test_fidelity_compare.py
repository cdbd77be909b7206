"""The comparison with stock xdist: what it must find, and what it must let pass."""

from __future__ import annotations

from typing import Any

import pytest
from fidelity.compare import beyond_replays, ends_as_replayed, exactly, within
from fidelity.generator import Case, draw
from fidelity.hostile import HOSTILE
from fidelity.random_runs import groups_are_lost
from fidelity.runs import Run, without_pluggy

PHASES = ("setup", "call", "teardown")


def report(nodeid: str, when: str, outcome: str = "passed", **more: Any) -> list[Any]:
    row = {
        "nodeid": nodeid,
        "when": when,
        "outcome": outcome,
        "wasxfail": None,
        "kind": "TestReport",
        "context": None,
        "worker": "gw0",
    }
    return ["controller", "report", {**row, **more}]


def a_run(*names: str, code: int = 0, out: str = "") -> Run:
    """A run in which these tests passed, on one worker, one after the other."""
    controller, worker = [], [["gw0", "collected", list(names)]]
    following = [*names[1:], None]
    for name, after in zip(names, following, strict=True):
        controller += [["controller", "logstart", name]]
        controller += [report(name, when) for when in PHASES]
        worker += [["gw0", "begun", name], ["gw0", "next", name, after], ["gw0", "ended", name]]
    junit = [("", name) for name in names]
    return Run(code, out, "", {"controller": controller, "1": worker}, junit)


def test_equal_runs() -> None:
    assert exactly(a_run("a", "b"), a_run("a", "b")) == []
    assert within(lambda: a_run("a", "b"), a_run("b", "a")) == []


def damaged(how: str) -> Run:
    run = a_run("a", "b", "c")
    controller, worker = run.rows["controller"], run.rows["1"]
    if how == "exit code":
        run.code = 1
    elif how == "lost":
        run = a_run("a", "b")
        run.rows["1"].append(["gw0", "begun", "c"])
    elif how == "never handed out":
        run = a_run("a", "b")
    elif how == "begun twice":
        worker.append(["gw0", "begun", "a"])
    elif how == "reported twice":
        controller.append(report("a", "teardown"))
    elif how == "never begun":
        controller.append(report("d", "call", "failed"))
    elif how == "outcome":
        controller[2][2]["outcome"] = "failed"
    elif how == "error of a teardown":
        controller[3][2]["outcome"] = "failed"
    elif how == "next item":
        worker[2][3] = "a"
    elif how == "no teardown":
        del controller[3]
    elif how == "internal error":
        controller.append(["controller", "internal error", "INTERNALERROR"])
    elif how == "warning":
        controller.append(["controller", "warning", "runtest", "a", "careful"])
    elif how == "test case":
        assert run.junit is not None
        run.junit.pop()
    elif how == "results file":
        run.files["results.txt"] = "116 results"
    return run


DAMAGES = (
    *("exit code", "lost", "never handed out", "begun twice", "reported twice", "never begun"),
    *("outcome", "error of a teardown", "next item", "no teardown", "internal error", "warning"),
    *("test case", "results file"),
)


@pytest.mark.parametrize("how", DAMAGES)
def test_differences_are_found(how: str) -> None:
    """Each makes both comparisons fail."""
    stock = a_run("a", "b", "c")
    assert exactly(stock, damaged(how))
    assert within(lambda: stock, damaged(how))


@pytest.mark.parametrize("how", ["lost", "begun twice", "reported twice", "never begun", "outcome"])
def test_differences_of_runs_cut_short(how: str) -> None:
    """Of a run cut short, less is compared, but nothing is lost and nothing runs twice."""
    assert within(lambda: a_run("a", "b", "c"), damaged(how), cut_short=True)
    assert within(lambda: a_run("a", "b", "c"), a_run("a"), cut_short=True) == []


def test_order() -> None:
    """With one worker the order counts."""
    (found,) = exactly(a_run("a", "b", "c"), a_run("a", "c", "b"))
    assert found.startswith("order differ:")


def test_what_the_distribution_decides() -> None:
    """An error of a teardown passes where stock makes it of the same tests, in that order."""
    ours = damaged("error of a teardown")
    asked: list[list[str]] = []

    def replay(order: list[str]) -> Run:
        asked.append(order)
        return damaged("error of a teardown")

    assert within(lambda: a_run("a", "b", "c"), ours, replay=replay) == []
    assert asked == [["a", "b", "c"]]
    sound = within(lambda: a_run("a", "b", "c"), ours, replay=lambda order: a_run(*order))
    assert len(sound) == 2
    # Whether anything failed, too, but only where the replay says the same.
    ours.code = 1
    assert within(lambda: a_run("a", "b", "c"), ours, replay=replay)
    failed = damaged("error of a teardown")
    failed.code = 1
    assert within(lambda: a_run("a", "b", "c"), ours, replay=lambda _: failed) == []


def ended(*names: str, code: int = 3, error: str = "assert not 'b'", dead: str = "") -> Run:
    """A run that an internal error ended, and a worker with the test *dead*."""
    run = a_run(*names, code=code)
    rows = run.rows["controller"]
    if error:
        rows.append(["controller", "internal error", f"Traceback\n{error}\n"])
    if dead:
        rows.append(report(dead, "???", "failed"))
    return run


def test_what_ends_a_run() -> None:
    """Another end of a run cut short passes only where stock ends so with the same tests."""
    ours = ended("a", "b", dead="b")
    found = within(lambda: a_run("a", "b", "c", code=2), ours, cut_short=True)
    assert [text.partition(" ")[0] for text in found] == ["exit", "reports", "INTERNALERROR"]
    asked: list[list[str]] = []

    def replay(order: list[str]) -> Run:
        asked.append(order)
        return ended(*order, dead="b")

    assert ends_as_replayed(found, ours, replay)
    assert asked == [["a", "b"]]
    assert not ends_as_replayed([*found, "begun 2 times: a"], ours, replay)
    assert not ends_as_replayed([], ours, replay)


@pytest.mark.parametrize(
    "other", [{"code": 2, "dead": "b"}, {"error": "KeyError", "dead": "b"}, {"dead": "a"}, {}]
)
def test_an_end_that_stock_does_not_show(other: dict[str, Any]) -> None:
    """Another exit code, another internal error, or none of the worker that ended."""
    ours = ended("a", "b", dead="b")
    found = within(lambda: a_run("a", "b", "c", code=2), ours, cut_short=True)
    assert not ends_as_replayed(found, ours, lambda order: ended(*order, **other))


def test_two_workers_end_where_failures_of_several_end_the_run() -> None:
    """The exit code is stock's: no replay of one worker's tests has to have it."""
    stock = ended("a", "c", code=2, error="", dead="a")
    ours = ended("a", "b", code=2, error="", dead="a")
    ours.rows["controller"].append(report("b", "???", "failed"))
    found = within(lambda: stock, ours, cut_short=True)
    assert found == ["reports of a worker's end: [1, 1, 1] in stock, 2 here"]
    both = ended("a", "b", code=1, error="", dead="a")
    both.rows["controller"].append(report("b", "???", "failed"))
    assert ends_as_replayed(found, ours, lambda _: both)
    alone = ended("a", "b", code=1, error="", dead="a")
    assert not ends_as_replayed(found, ours, lambda _: alone)
    code = ["exit code: [1] in stock, 2 here", *found]
    assert not ends_as_replayed(code, ours, lambda _: both)


def test_a_worker_dies_between_two_tests() -> None:
    """The test it had been sent next is another one in stock: as many of them pass, no more."""
    stock = ended("a", "b", error="", dead="c")
    assert within(lambda: stock, ended("a", "c", error="", dead="b"), cut_short=True) == []
    more = ended("a", "c", error="", dead="b")
    more.rows["controller"].append(report("d", "???", "failed"))
    never = "reported for a worker's end, but never begun: "
    found = within(lambda: stock, more, cut_short=True)
    assert {f"{never}b", f"{never}d"} <= set(found)
    begun = ended("a", "c", error="", dead="c")
    assert f"{never}b" in within(lambda: begun, ended("a", "c", error="", dead="b"), cut_short=True)


def test_warnings_after_a_crash() -> None:
    """One passes that stock gives where it is given what each worker of ours began."""
    ours = damaged("warning")
    found = within(lambda: a_run("a", "b", "c"), ours)
    assert found == ["a warning here, not in stock: runtest a careful"]
    assert beyond_replays(found, ours, lambda _: damaged("warning")) == []
    assert beyond_replays(found, ours, lambda order: a_run(*order)) == found


def test_outcomes_beside_crashes_and_cut_short() -> None:
    """Another outcome passes where stock shows it, too, with the tests of that worker."""
    ours = damaged("outcome")
    ours.rows["1"][8][3] = "x"  # the next test, which this worker did not begin
    found = within(lambda: a_run("a", "b", "c"), ours, cut_short=True)
    assert [text.partition(":")[0] for text in found] == ["a"]
    asked: list[list[str]] = []

    def replay(order: list[str]) -> Run:
        asked.append(order)
        return damaged("outcome")

    assert beyond_replays([*found, "begun 2 times: a"], ours, replay) == ["begun 2 times: a"]
    assert asked == [["a", "b", "c", "x"]]
    assert beyond_replays(found, ours, lambda order: a_run(*order)) == found
    never = "a: None in stock, [] here"
    assert beyond_replays([never], ours, replay) == [never]


def test_errors_of_teardowns_after_a_crash() -> None:
    """None where stock has none either with what the workers of ours began."""
    ours, failing = a_run("a", "b"), a_run("a", "b")
    failing.rows["controller"].append(report("b", "teardown", "failed"))
    assert failing.errors == 1
    text = "errors of teardowns: [1] in stock, 0 here"
    assert beyond_replays([text], ours, lambda order: a_run(*order)) == []
    assert beyond_replays([text], ours, lambda _: failing) == [text]


SHOWN = """\
____ test_before ____
    assert False
____ test_one ____
hook_name = 'pytest_runtest_setup'
/lib/pluggy/_hooks.py:512:
_ _ _ _ _
self = 1
/lib/_pytest/logging.py:871:
_ _ _ _ _
/lib/pluggy/_manager.py:120: in _hookexec
    return self._inner_hookexec()
           ^^^^^
/lib/_pytest/runner.py:17: in setup
    col.setup()
"""


@pytest.mark.parametrize(
    ("dist", "text", "nodeid", "lost"),
    [
        ("loadgroup", "@pytest.mark.xdist_group('a')", "test_a.py::test_a[x@y]", True),
        ("loadgroup", "@pytest.mark.xdist_group('a')", "test_a.py::test_a[x]@a", False),
        ("loadgroup", "@pytest.mark.skip", "test_a.py::test_a", False),
        ("load", "@pytest.mark.xdist_group('a')", "test_a.py::test_a", False),
    ],
)
def test_groups_that_stock_loses(dist: str, text: str, nodeid: str, lost: bool) -> None:
    case = Case(0, files={"test_a.py": text}, arguments=[f"--dist={dist}"])
    assert groups_are_lost(case, [nodeid]) == lost


def test_frames_of_pluggy_are_left_out() -> None:
    left = without_pluggy(SHOWN)
    assert "pluggy" not in left
    assert "hook_name" not in left
    for kept in ("test_before", "assert False", "test_one", "self = 1", "logging", "runner"):
        assert kept in left


def test_cases_are_drawn_by_their_seed() -> None:
    """The same seed is the same project; together the seeds draw every conftest and shape."""
    cases = [draw(seed) for seed in range(300)]
    assert cases[:20] == [draw(seed) for seed in range(20)]
    for case in cases:
        for name, text in case.files.items():
            if name.endswith(".py") and name != "test_broken.py":
                compile(text, name, "exec")
    assert {name for case in cases for name in case.hostile} == HOSTILE.keys()
    shapes: tuple[tuple[str, int], ...] = (("workers", 3), ("cut_short", 2), ("crashes", 2))
    for name, count in shapes:
        assert len({getattr(case, name) for case in cases}) == count
    words = " ".join(text for case in cases for text in case.files.values())
    for word in ("pytest.exit", "KeyboardInterrupt", "shouldstop", "os._exit", "xfail", "subTest"):
        assert word in words
    assert isinstance(cases[0], Case)
