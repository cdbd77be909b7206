"""What the terminal says of VRAM after the tests: every line, however wide, and how much of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.report.document import document
from pytest_gpushare.report.output import Line, OutputOptions, laid_out
from pytest_gpushare.report.results import Results
from pytest_gpushare.report.summary import summary
from pytest_gpushare.session.tests import leaks
from pytest_gpushare.text import encodable, width_of
from pytest_gpushare.units import GB

from .scene import CONTEXT, Scene

GOLDEN = Path(__file__).parent / "golden"


def counted() -> Results:
    """The frameworks count: peaks are exact, a leak has its test, and more workers would fit."""
    run = Scene()
    for at in range(7):
        size = (0.3 + at / 5) * GB
        run.ran(
            f"tests/test_models.py::test_forward[{at}-some-long-parameter]",
            at % 2,
            holds=size / GB + CONTEXT / GB,
            counted={"peak": int(size), "left": GB if at == 3 else 0},
        )
    return Results(run.finish())


def by_nvml() -> Results:
    """NVML alone tells: peaks are lower bounds, and a leak has suspects."""
    run = Scene()
    run.ran("tests/test_a.py::test_short", 0, 0.2)
    run.ran("tests/test_a.py::test_large", 0, 3, holds=5.2)
    run.ran("tests/test_a.py::test_small", 1, 2, holds=1.25)
    run.hold(0, 2.0)
    run.ran("tests/test_a.py::test_either", 0, 0.4)
    run.ran("tests/test_a.py::test_or", 0, 2)
    return Results(run.finish())


def silent() -> Results:
    """NVML tells nothing by process, and no framework counts."""
    run = Scene()
    run.card.silent = True
    run.ran("tests/test_a.py::test_large", 0, 3, holds=5.2)
    return Results(run.finish())


def needs() -> Results:
    """Tests with needs of their own may take more than a slot."""
    run = Scene()
    run.active.has_needs = True
    run.ran("test_a.py::test_large", 0, 3, holds=6, counted={"peak": 5 * GB})
    run.ran("test_a.py::test_small", 1, 1, counted={"peak": GB})
    return Results(run.finish())


def crashed() -> Results:
    """More leaks than lines, and a worker that crashed."""
    run = Scene()
    for at in range(5):
        run.ran(f"test_a.py::test_leaks[{at}]", 0, 0.2, counted={"peak": GB, "left": (at + 1) * GB})
    run.active.workers.leave("gw1", 1.0, crashed=True)
    return Results(run.finish())


def unused() -> Results:
    """A run that took no VRAM says nothing."""
    run = Scene()
    run.ran("test_a.py::test_nothing", 0)
    return Results(run.finish())


@pytest.mark.parametrize("case", [counted, by_nvml, silent, needs, crashed, unused])
def test_golden(case: Callable[[], Results]) -> None:
    """Four verbosities, a pipe and three widths; a terminal that shows ASCII alone at the end."""
    run = case()
    parts: list[str] = []
    told: list[str] = []
    for verbosity, flag in ((-1, "-q"), (0, "default"), (1, "-v"), (2, "-vv")):
        lines = summary(run, OutputOptions(verbosity, 80))
        parts += [f"=== {flag}, in a pipe", *(line.text for line in lines)]
        told += [line.text for line in lines]
        for columns in (60, 80, 120):
            lines = laid_out(summary(run, OutputOptions(verbosity, columns)), columns)
            parts += [f"=== {flag}, {columns} columns", *(line.text for line in lines)]
            check_widths((line.text for line in lines), columns)
    lines = [line.text for line in summary(run, OutputOptions(1, 80))]
    parts += ["=== -v, 80 columns, ASCII", *(encodable(line, "ascii") for line in lines)]
    text = "\n".join(parts) + "\n"
    path = GOLDEN / f"usage_{case.__name__}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    # The founding write-up's grep finds every line.
    assert all(any(word in line for word in ("VRAM", "GPU", "workers")) for line in told)


def check_widths(lines: Iterable[str], columns: int) -> None:
    """No line is longer than the terminal, unless it is one word, or -o with its setting."""
    assert all(width_of(line) <= columns or len(line.split()) <= 2 for line in lines)


ACCEPTANCE = Path(__file__).parents[1] / "acceptance" / "golden"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_every_line_in_a_terminal(columns: int) -> None:
    """Headers, verdicts and problems, as the acceptance tests have them in a pipe."""
    names = ("two_devices", "resident", "fallback", "models", "monitor")
    paths = [path for name in names for path in sorted(ACCEPTANCE.glob(f"{name}_*.txt"))]
    assert len(paths) > 15
    parts: list[str] = []
    for path in paths:
        whole = [Line(text) for text in path.read_text(encoding="utf-8").splitlines()]
        lines = [line.text for line in laid_out(whole, columns)]
        check_widths(lines, columns)
        parts += [f"=== {path.name}", *lines]
    text = "\n".join(parts) + "\n"
    path = GOLDEN / f"terminal_{columns}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_at_most_one_line_when_quiet() -> None:
    """The gravest problem, and how many more there are; nothing where nothing is wrong."""
    assert summary(counted(), OutputOptions(-1)) == [
        Line(
            "gpu-share: tests/test_models.py::test_forward[3-some-long-parameter] left 1.0 GB of "
            "VRAM behind (gw1)",
            problem=True,
        )
    ]
    (line,) = summary(crashed(), OutputOptions(-1))
    assert line.text.endswith(" (and 3 more problems: run without -q)")
    assert summary(needs(), OutputOptions(-1)) == []


def test_leaks_are_problems() -> None:
    assert [line.problem for line in summary(crashed(), OutputOptions(0, 80))] == [True] * 4


def test_nothing_of_a_device_that_others_fill() -> None:
    """A desktop that takes 50 MB is no news."""
    run = Scene()
    run.card.held[1] = 50 * 2**20
    run.ran("test_a.py::test_nothing")
    assert summary(Results(run.finish()), OutputOptions(2, 200)) == []


def test_a_skipped_test_is_no_suspect() -> None:
    """The one that leaked ran in between two readings; the one that was skipped did nothing."""
    run = Scene(workers=1)
    run.ran("t::quiet", 0, 2, holds=0.6)
    run.hold(0, 3.0)
    run.ran("t::leaks", 0, 0.6)
    run.ran("t::skipped", 0, 0.1, outcome="skipped")
    run.tick(2)
    (leak,) = leaks(run.active.tests, run.finish().workers)
    assert "t::skipped" not in leak.suspects
    assert "t::leaks" in leak.suspects


def test_results_are_computed_once() -> None:
    """Whatever is printed and written of them: plans are not made again for each reader."""
    results = counted()
    plans: list[Plan] = []
    replan = results.run.replan
    assert replan is not None
    results.run.replan = lambda settings: plans.append(replan(settings)) or plans[-1]  # type: ignore[func-returns-value]
    summary(results, OutputOptions(0, 80))
    made = len(plans)
    summary(results, OutputOptions(2, 400))
    document(results, 0, [])
    assert len(plans) == made > 0
