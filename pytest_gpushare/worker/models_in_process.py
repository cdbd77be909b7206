"""Tests that use models in a process without workers: in groups, each model loaded in time."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.worker.collection import MarkerReader
from pytest_gpushare.worker.refusals import REFUSAL

if TYPE_CHECKING:
    from pytest_gpushare.session.llm import LlmTests
    from pytest_gpushare.session.run import ActiveRun


class ModelsInProcess:
    """Loads the model of each test before its protocol begins, outside of its time-out."""

    def __init__(self, run: ActiveRun, message: dict[str, Any]) -> None:
        """`message` is what a worker would receive about its tests."""
        self._run = run
        self._reader = MarkerReader(message)
        self._message = message["ollama"]
        self._llm: LlmTests | None = None
        self._groups: dict[pytest.Item, int] = {}
        self._open: int | None = None
        self._refusals: dict[int, tuple[str, str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Bring tests of one model together, where there are several: each switch is a load.

        Only tests that use models change their places, among themselves.
        """
        names = self._message["markers"]
        if not (self._message["rules"] or self._message["param"]) and not any(
            name in item.keywords for item in items for name in names
        ):
            return
        found = {at: self._reader.model_of(item) for at, item in enumerate(items)}
        uses = {at: use for at, use in found.items() if use is not None}
        if not uses:
            return
        from pytest_gpushare.session.llm import LlmTests

        self._llm = self._run.llm = LlmTests(self._run, uses, {}, [item.nodeid for item in items])
        self._run.services.add(self._llm)
        self._groups = {items[at]: group for at, group in self._llm.of.items()}
        if len(self._llm.groups) > 1:
            places = sorted(uses)
            ordered = sorted((items[at] for at in places), key=self._groups.__getitem__)
            for at, item in zip(places, ordered, strict=True):
                items[at] = item

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Have the model loaded first; where that fails, the test is reported with the reason."""
        group = self._groups.get(item)
        if group is not None and self._llm is not None:
            refusal = self._llm.groups[group].refusal or self._refusals.get(group)
            if refusal is None and group != self._open:
                problem = self._llm.open_now(group)
                if problem:
                    refusal = self._refusals[group] = "fail", problem
                else:
                    self._open = group
            if refusal is not None:
                item.stash[REFUSAL] = refusal
        return (yield)
