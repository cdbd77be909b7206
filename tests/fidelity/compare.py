"""How a run under the own scheduler differs from runs under stock xdist.

`exactly` is for one worker: the runs must be equal, report by report. `within` is for more of
them: stock differs from itself there, so that ours must lie within what stock showed, and where a
run was cut short nothing may be lost, and nothing run twice. What may differ all the same stands
in `exceptions`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from .runs import Run

PHASES = ("setup", "call", "teardown")
ENDS = ("exit code:", "reports of a worker's end:", "INTERNALERROR here")
"""How a difference begins that is one of what ended the run."""
_NEVER_BEGUN = "reported for a worker's end, but never begun"
_WARNING = "a warning here, not in stock"


def exactly(stock: Run, ours: Run, *, output: bool = True, dist: str = "load") -> list[str]:
    """What differs between two runs with one worker each.

    output: whether the output is compared, too; some plugins write times into it.
    dist: xdist's `--dist`; but for `load`, the order is not compared after a crash.
    """
    found = [text for text in broken_rules(ours) if text not in broken_rules(stock)]
    found += _differ("exit code", [stock.code], [ours.code])
    order = [[row[2] for row in _of(it, "logstart")] for it in (stock, ours)]
    if order[0] != order[1] and sorted(order[0]) == sorted(order[1]):
        # All else would differ, too.
        fixed, distribution = _outside([stock], ours, cut_short=False)
        # Where a worker was replaced: xdist puts groups that were sent to the dead one to the end.
        replaced = len(stock.workers) > 1 and dist != "load"
        return ([] if replaced else _differ("order", *order)) + fixed + distribution
    internal = bool(stock.internal_errors)
    if not internal:
        found += _differ("internal errors", [], ours.internal_errors)
    found += _differ("reports", map(_report, stock.reports), map(_report, ours.reports))
    for kind in ("logstart", "logfinish", "collect", "warning"):
        rows = [[str(row[2:]) for row in _of(it, kind)] for it in (stock, ours)]
        found += _differ(kind, *rows)
    # A replacement of a crashed worker has a record of its own, in no order to the first one's.
    kinds = ("collected", "begun", "ended", "phase", "next", "makereport", "up", "down", "items")
    for kind in kinds:
        pair = [
            sorted(_process(rows, kind) for rows in it.workers.values()) for it in (stock, ours)
        ]
        found += _differ(f"in the workers: {kind}", *([str(x) for r in p for x in r] for p in pair))
    if not internal:
        found += _differ("junit", map(str, stock.junit or []), map(str, ours.junit or []))
        found += _differ("junit counts", [str(stock.junit_counts)], [str(ours.junit_counts)])
        if output:
            found += _differ("output", stock.normal_out.splitlines(), ours.normal_out.splitlines())
    found += _differ("files", map(str, stock.files.items()), map(str, ours.files.items()))
    return found


def within(
    stock: Callable[[], Run],
    ours: Run,
    *,
    cut_short: bool = False,
    most: int = 3,
    replay: Callable[[list[str]], Run] | None = None,
) -> list[str]:
    """What is in our run, but in none of *most* stock runs.

    stock: makes one more stock run; it is asked only as long as ours differs from those made.
    replay: runs the given tests, in this order, by stock with one worker. What depends on the
        distribution alone is no difference where each worker of ours made the reports that stock
        makes of the same tests in the same order.
    """
    runs: list[Run] = []
    found: list[str] = []
    while len(runs) < most:
        runs.append(stock())
        fixed, distribution = _outside(runs, ours, cut_short, replay is not None)
        found = fixed + distribution
        if not found:
            return []
        if not fixed and len(runs) > 1 and replay is not None:
            wrong = replayed(ours, replay)
            return distribution + wrong if wrong else []
    return found


def replayed(ours: Run, replay: Callable[[list[str]], Run]) -> list[str]:
    """What differs between each worker of ours and stock with the same tests in that order."""
    found: list[str] = []
    codes: set[int] = set()
    for rows in ours.workers.values():
        begun = [row[2] for row in rows if row[1] == "begun"]
        if not begun:
            continue
        again = replay(begun)
        codes.add(again.code)
        mine = [_report(it) for it in ours.reports if it["worker"] == rows[0][0]]
        theirs = [_report(it) for it in again.reports]
        # The worker's own progress, which it prints into what subtests capture.
        # The number that a hostile conftest gives to it, and how many tests pytest collected.
        own = r" *\[ *\d+%\]|\['number', '\d+'\]|testscollected=\d+"
        mine, theirs = ([re.sub(own, "", it) for it in side] for side in (mine, theirs))
        found += _differ(f"reports of {rows[0][0]} and their replay", theirs, mine)
        for kind in ("phase", "next", "makereport", "up", "down"):
            pair = [_process(it, kind) for it in (next(iter(again.workers.values())), rows)]
            found += _differ(f"in {rows[0][0]} and its replay: {kind}", *pair)
    if codes and codes | {ours.code} <= {0, 1}:
        found += _differ("exit code and that of the replays", [max(codes)], [ours.code])
    return found


def ends_as_replayed(found: Sequence[str], ours: Run, replay: Callable[[list[str]], Run]) -> bool:
    """Whether only the end differs, and stock ends so where it is given what each worker of ours
    began, in that order: the exit code, internal errors, and the tests with which workers end.

    For runs that are cut short: which of several tests that end a run comes first, and whether a
    second one does before all is over, depends on the distribution.
    """
    if not found or not all(text.startswith(ENDS) for text in found):
        return False
    again = _replays(ours, replay)
    errors = {line for it in again for line in _last_lines(it.internal_errors)}
    # Failures of several workers may end a run: no replay of one has that exit code.
    same_code = not any(text.startswith(ENDS[0]) for text in found)
    return (
        (same_code or ours.code in {it.code for it in again})
        and set(_last_lines(ours.internal_errors)) <= errors
        and set(ours.crashed) <= {nodeid for it in again for nodeid in it.crashed}
    )


def _replays(ours: Run, replay: Callable[[list[str]], Run]) -> list[Run]:
    """What stock makes of the tests that each worker of ours began, in that order."""
    begun = ([row[2] for row in rows if row[1] == "begun"] for rows in ours.workers.values())
    return [replay(order) for order in begun if order]


_TEARDOWNS = "errors of teardowns"


def beyond_replays(
    found: Sequence[str], ours: Run, replay: Callable[[list[str]], Run]
) -> list[str]:
    """The differences without the outcomes that stock shows where it is given what each worker of
    ours began, in that order, and then the test that this worker would have run next; and without
    the number of errors of wider teardowns, where those runs of stock have as many; and without
    warnings that those give, too: a worker that dies keeps back those of its last test.

    For runs with crashes, or cut short: a plugin that runs failed tests again shows the error of
    a wider teardown as an outcome, of whichever test the distribution makes the last.
    """
    again: dict[str, Run] = {}
    left = []
    for text in found:
        if text.startswith(_TEARDOWNS):
            if sum(it.errors for it in _replays(ours, replay)) != ours.errors:
                left.append(text)
            continue
        if text.startswith(_WARNING):
            given = {warning for it in _replays(ours, replay) for warning in _warnings(it)}
            if text.removeprefix(f"{_WARNING}: ") not in given:
                left.append(text)
            continue
        nodeid = next((name for name in ours.outcomes if text.startswith(f"{name}: ")), None)
        rows = next((it for it in ours.workers.values() if _begins(it, nodeid)), None)
        if nodeid is None or rows is None or text.startswith(f"{nodeid}: None in stock"):
            left.append(text)
            continue
        worker = str(rows[0][0])
        if worker not in again:
            order = [str(row[2]) for row in rows if row[1] == "begun"]
            after = [row[3] for row in rows if row[1] == "next" and row[2] == order[-1]]
            again[worker] = replay([*order, *(str(it) for it in after[-1:] if it is not None)])
        if _outcome(again[worker], nodeid, True) != _outcome(ours, nodeid, True):
            left.append(text)
    return left


def _begins(rows: list[list[Any]], nodeid: str | None) -> bool:
    return any(row[1] == "begun" and row[2] == nodeid for row in rows)


def _last_lines(texts: Iterable[str]) -> list[str]:
    return [text.strip().splitlines()[-1] for text in texts]


def _outside(
    stock: Sequence[Run], ours: Run, cut_short: bool, replayed: bool = True
) -> tuple[list[str], list[str]]:
    """What no stock run shows: by itself, and what may be due to the distribution.

    replayed: whether a replay can tell if the number of errors is due to the distribution; where
        none can, as after a crash, there must be errors where stock has some.
    """
    # An INTERNALERROR of stock's ends the run where it is.
    cut_short = cut_short or any(it.internal_errors for it in stock)
    rules = [broken_rules(it) for it in stock]
    broken = {text for texts in rules for text in texts}
    found = [text for text in broken_rules(ours) if text not in broken]
    # Which test a worker had been sent when it died between two depends on the distribution.
    unbegun = [text for text in found if text.startswith(_NEVER_BEGUN)]
    if len(unbegun) <= max(sum(it.startswith(_NEVER_BEGUN) for it in texts) for texts in rules):
        found = [text for text in found if text not in unbegun]
    distribution = []
    codes = sorted({it.code for it in stock})
    if ours.code not in codes:
        # Whether anything failed follows from the reports.
        by_reports = {ours.code, *codes} == {0, 1}
        text = f"exit code: {codes} in stock, {ours.code} here"
        (distribution if by_reports else found).append(text)
    for nodeid in sorted({*ours.outcomes, *(n for it in stock for n in it.outcomes)}):
        theirs = [_outcome(it, nodeid, cut_short) for it in stock]
        mine = _outcome(ours, nodeid, cut_short)
        if mine in theirs or (cut_short and (mine is None or all(it is None for it in theirs))):
            continue
        shown = theirs[0] if len({str(it) for it in theirs}) == 1 else theirs
        lost = mine is None or all(it is None for it in theirs)
        (found if lost else distribution).append(f"{nodeid}: {shown} in stock, {mine} here")
    ends = [len(it.crashed) for it in stock]
    # Which workers hold what must not be torn down depends on the distribution.
    if cut_short and not min(1, *ends) <= len(ours.crashed) <= max(ends):
        found.append(f"reports of a worker's end: {ends} in stock, {len(ours.crashed)} here")
    errors = [it.errors for it in stock]
    least, most = (min(errors), max(errors)) if replayed else (min(1, *errors), ours.errors)
    if not any(errors):
        most = 0
    if not cut_short and not least <= ours.errors <= most:
        distribution.append(f"{_TEARDOWNS}: {errors} in stock, {ours.errors} here")
    if not any(it.internal_errors for it in stock):
        last = _last_lines(ours.internal_errors)
        found += [f"INTERNALERROR here, none in stock: {line}" for line in last]
    found += _junit_outside(stock, ours, cut_short)
    if cut_short:
        return found, distribution
    for name in {*ours.files, *(n for it in stock for n in it.files)}:
        texts = [it.files.get(name) for it in stock]
        if ours.files.get(name) not in texts:
            found.append(f"file {name}: {texts[0]!r} in stock, {ours.files.get(name)!r} here")
    # How often one is given depends on the distribution.
    new = _warnings(ours) - {text for it in stock for text in _warnings(it)}
    distribution += [f"{_WARNING}: {text}" for text in sorted(new)]
    return found, distribution


def more_setups(stock: Iterable[Run], ours: Run) -> dict[str, tuple[int, int]]:
    """Scope -> the largest number of set-ups in stock, and ours, where ours is larger."""
    runs = list(stock)
    found = {}
    for scope, count in ours.setups.items():
        largest = max(it.setups[scope] for it in runs)
        if count > largest:
            found[scope] = largest, count
    return found


def broken_rules(run: Run) -> list[str]:
    """What is wrong with a run by itself: a test lost, begun twice, or reported twice."""
    found = []
    reports: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in run.reports:
        reports[report["nodeid"]].append(report)
    named = run.out + run.err
    for nodeid, count in run.begun.items():
        if count > 1:
            found.append(f"begun {count} times: {nodeid}")
        complete = any(it["when"] in ("teardown", "???") for it in reports[nodeid])
        if not complete and nodeid not in named:
            found.append(f"begun, but neither reported to the end nor named: {nodeid}")
    never = sorted(reports.keys() - {*run.begun, *run.collect_errors})
    for nodeid in never:
        died = {it["when"] for it in reports[nodeid]} == {"???"}
        found.append(f"{_NEVER_BEGUN if died else 'reported, but never begun'}: {nodeid}")
    phases = Counter((it["nodeid"], it["when"]) for it in run.reports if it["kind"] == "TestReport")
    for (nodeid, when), count in phases.items():
        if count > 1:
            found.append(f"{count} reports of {when}: {nodeid}")
    found += _next_items(run)
    for nodeid, when in _unfinished(run, phases):
        found.append(f"no report of the {when}: {nodeid}")
    junit = Counter(case[:2] for case in run.junit or [] if len(case) < 3 and case[1])
    found += [f"twice in the JUnit XML file: {case}" for case, count in junit.items() if count > 1]
    return found


def _unfinished(run: Run, phases: Counter[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Tests whose process went on, but whose reports are not complete."""
    for rows in run.workers.values():
        ended = [row[2] for row in rows if row[1] == "ended"]
        for nodeid in ended:
            for when in ("setup", "teardown"):
                if not phases[nodeid, when] and nodeid not in run.crashed:
                    yield nodeid, when


def _next_items(run: Run) -> list[str]:
    """A test's nextitem is the one that its worker ran next, unless the worker ran none."""
    found = []
    for rows in run.workers.values():
        steps = [row for row in rows if row[1] in ("begun", "next")]
        for row, after in pairwise(steps):
            again = row[2] == after[2]  # a plugin runs it once more
            if row[1] == "next" and after[1] == "begun" and row[3] != after[2] and not again:
                found.append(f"nextitem of {row[2]} was {row[3]}, but {after[2]} ran next")
    return found


def _report(report: dict[str, object]) -> str:
    return str({name: value for name, value in report.items() if name != "worker"})


def _process(rows: list[list[object]], kind: str) -> list[str]:
    return [str(row[2:]) for row in rows if row[1] == kind]


def _outcome(run: Run, nodeid: str, cut_short: bool) -> list[tuple[Any, ...]] | None:
    """How a test went; of a run cut short without the end of its worker, which may fall on another
    test, as that of the teardown of a module does.
    """
    found = run.outcomes.get(nodeid)
    if found is None or not cut_short:
        return found
    return [it for it in found if it[0] != "???"] or None


def _warnings(run: Run) -> set[str]:
    return {f"{row[2]} {row[3]} {row[4]}" for row in _of(run, "warning")}


def _of(run: Run, kind: str) -> list[list[Any]]:
    """Rows of the controller."""
    return [row for row in run.rows.get("controller", []) if row[1] == kind]


def _junit_outside(stock: Sequence[Run], ours: Run, cut_short: bool) -> list[str]:
    if (ours.junit is None) not in [it.junit is None for it in stock]:
        return ["JUnit XML file: only one side wrote it"]
    if cut_short or any(it.internal_errors for it in (ours, *stock)):
        return []
    # A failed test with an error of its teardown stands there a second time.
    names = [{case[:2] for case in it.junit or []} for it in stock]
    mine = {case[:2] for case in ours.junit or []}
    if mine in names:
        return []
    return [f"JUnit test cases: {names[0] - mine} only in stock, {mine - names[0]} only here"]


def _differ(what: str, theirs: Iterable[object], mine: Iterable[object]) -> list[str]:
    left, right = [str(it) for it in theirs], [str(it) for it in mine]
    if left == right:
        return []
    lines = difflib.unified_diff(left, right, "stock", "ours", lineterm="", n=0)
    shown = [line[:200] for line in lines if not line.startswith(("@@", "---", "+++"))][:12]
    return ["\n    ".join([f"{what} differ:", *shown])]
