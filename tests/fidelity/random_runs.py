"""Running the case of a seed both ways, and saying what differs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from inner_pytest import left_out

from pytest_gpushare.dispatch.suite import plain_id

from .compare import (
    beyond_replays,
    broken_rules,
    ends_as_replayed,
    exactly,
    more_setups,
    replayed,
    within,
)
from .generator import Case, draw
from .runs import KILLED, OURS, STOCK_TWICE, Run, run

LEFT_OUT = left_out(["cacheprovider", "rerunfailures"])
"""rerunfailures stays, as a plugin that many have: it looks at the next test."""
LIMIT = 240.0
"""Seconds for one run of a project, on a machine that does much else."""
PATIENCE = 30.0
"""Seconds for a run of stock, beyond five times what ours took."""


class _NoReference(Exception):
    """A run of stock hung, or ran a test again; see `exceptions`."""


@dataclass
class Compared:
    """What a case came to."""

    case: Case
    found: list[str]
    ours: Run
    stock_setups: dict[str, int]
    """Scope -> the largest number of set-ups in stock."""


def compare(
    seed: int, place: Path, environment: Mapping[str, str], *, always_replay: bool = False
) -> Compared:
    """Run the case of *seed* in *place*, with and without the plugin.

    always_replay: run what each worker of ours ran by stock, too, though nothing differs so far.
    """
    case = draw(seed)
    project = place / "project"
    project.mkdir(parents=True)
    case.write(project)
    shared = [*case.arguments, "-n", str(case.workers)]
    stock: list[Run] = []

    def one(where: str, arguments: list[str], limit: float = LIMIT) -> Run:
        return run(
            project, place / where, [*LEFT_OUT, *arguments], environment,
            steps=case.steps, files=("results.txt",), timeout=limit,
        )  # fmt: skip

    def replay(order: list[str]) -> Run:
        arguments = [*LEFT_OUT, *case.arguments, "-n", "1"]
        return run(project, place / "replay", arguments, environment, order=order, timeout=LIMIT)

    start = time.monotonic()
    ours = one("ours", [*shared, *([] if STOCK_TWICE else [*OURS, *case.ours])])
    patience = min(LIMIT, PATIENCE + 5 * (time.monotonic() - start))

    def one_more() -> Run:
        found = one("stock", shared, patience)
        repeated = [nodeid for nodeid, count in found.begun.items() if count > 1]
        if found.code == KILLED or (repeated and all(ours.begun[it] <= 1 for it in repeated)):
            raise _NoReference
        stock.append(found)
        return found

    try:
        found = _differences(case, one_more, stock, ours, replay, always_replay)
    except _NoReference:
        found = broken_rules(ours)
    if ours.code == KILLED:
        found.append(f"it did not end within {LIMIT:g} s")
    if ours.code in (3, 4) and not ours.collected:
        found.append(f"nothing was collected: {(ours.out + ours.err)[-500:]}")
    other = case.another_scheduler or any(it.startswith("--dist") for it in case.arguments)
    if not (STOCK_TWICE or ours.own_scheduler or other) and ours.begun:
        found.append("the own scheduler was not in charge")
    scopes = {scope for it in stock for scope in it.setups}
    return Compared(case, found, ours, {s: max(it.setups[s] for it in stock) for s in scopes})


def groups_are_lost(case: Case, begun: Iterable[str]) -> bool:
    """Whether stock does not keep the groups of this project together; see `exceptions`.

    begun: node ids, behind which xdist writes the group where pytest lets it.
    """
    has_groups = any("xdist_group" in text for text in case.files.values())
    written = any(plain_id(nodeid, "loadgroup") != nodeid for nodeid in begun)
    return case.dist == "loadgroup" and has_groups and not written


def _differences(
    case: Case,
    one_more: Callable[[], Run],
    stock: list[Run],
    ours: Run,
    replay: Callable[[list[str]], Run],
    always_replay: bool,
) -> list[str]:
    """What differs; `one_more` adds a run to *stock*, of which there may be five."""
    if case.workers == 1 and case.dist and not groups_are_lost(case, ours.begun):
        found = exactly(one_more(), ours, dist=case.dist)
        while found and case.crashes and len(stock) < 4:
            # Who had been sent how many tests depends on which of them lasted 0.1 s.
            found = exactly(one_more(), ours, dist=case.dist)
    else:
        # A crash leaves the rest to another worker, and a step before chooses the tests.
        whole = not (case.cut_short or case.crashes or case.steps)
        found = within(
            one_more, ours, cut_short=case.cut_short, most=5, replay=replay if whole else None
        )
        if case.cut_short and ends_as_replayed(found, ours, replay):
            found = []
        if not (whole or case.steps):
            found = beyond_replays(found, ours, replay)
        if always_replay and whole and not found:
            found = replayed(ours, replay)
        while whole and not found and more_setups(stock, ours) and len(stock) < 5:
            one_more()
    return found
