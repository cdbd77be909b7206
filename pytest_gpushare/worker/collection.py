"""What a worker knows of its tests: what the controller is sent of them, and which are refused.

Sent are markers, groups of shared fixtures and skips. A refused test is not run: pytest runs its
protocol and makes the reports, and only the set-up raises before any fixture is set up. So there
is one report a phase, and the teardown of earlier fixtures is where it always is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import pytest

from pytest_gpushare.compat.pytest_items import (
    fixture_scopes,
    fixtures_of,
    parameter_of,
    parameter_scopes,
)
from pytest_gpushare.compat.xdist_options import keeps_groups
from pytest_gpushare.config.settings import Alias
from pytest_gpushare.scheduler.needs import (
    IN_ORDER,
    MARKER,
    CollectedTests,
    Declared,
    Mark,
    ModelUse,
    Need,
    Patterns,
    Wanted,
    declared,
    use_by_rules,
    wanted,
    with_parameter,
)
from pytest_gpushare.units import format_gb, plural

_NOTHING = Declared()


class MarkerReader:
    """Reads markers as the settings say; they come from the controller."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self._marker: str = message["marker"]
        self._message = message
        self._ollama: Mapping[str, Any] = message["ollama"]
        self._names = {self._marker, MARKER, *(alias[0] for alias in message["aliases"])}
        self._parameter: str = self._ollama["param"]
        self._all_are_gpu_tests: bool = message["gpu_unless_marked"]

    # Most workers see no such marker and weigh nothing.

    @cached_property
    def _aliases(self) -> Sequence[Alias]:
        return [Alias(*alias) for alias in self._message["aliases"]]

    @cached_property
    def _rules(self) -> Patterns[int]:
        return Patterns(self._message["rules"])

    def declared(self, marks: Iterable[pytest.Mark]) -> Declared:
        """What the markers of one test say; most say nothing to us."""
        ours = [mark for mark in marks if mark.name in self._names]
        if not ours:
            return _NOTHING
        read = [Mark(mark.name, mark.args, mark.kwargs) for mark in ours]
        return declared(read, self._marker, self._aliases)

    def with_model(self, item: pytest.Item, said: Declared) -> Declared:
        """What a test says, with the model that a parameter of it names."""
        if not self._parameter:
            return said
        use = with_parameter(said.llm, parameter_of(item, self._parameter))
        return said if use is None else said._replace(llm=use.sent)

    @cached_property
    def _model_rules(self) -> Patterns[str]:
        return Patterns(self._ollama["rules"])

    def model_of(self, item: pytest.Item) -> ModelUse | None:
        """The model of Ollama's that a test uses, where no controller says; None: it uses none."""
        said = self.with_model(item, self.declared(item.iter_markers()))
        only = self._ollama["only_model"]
        return use_by_rules(item.nodeid, said.llm, self._model_rules, only)

    def wanted(self, item: pytest.Item) -> tuple[Declared, Wanted]:
        """Whether a test is a GPU test, where no controller weighs it."""
        said = self.declared(item.iter_markers())
        return said, wanted(
            item.nodeid, said, self._rules, gpu_unless_marked=self._all_are_gpu_tests
        )


class MarkerErrors:
    """Reports invalid arguments of markers as errors of the collection, as pytest reports others.

    Markers that are added after it are read when their test is to run.
    """

    def __init__(self, reader: MarkerReader) -> None:
        self._reader = reader

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self,
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Fail the report of a module or class in which a test has such a marker."""
        report = yield
        if report.outcome == "passed":
            # Parametrised tests have one marker, and one error.
            errors: dict[str, str] = {}
            for item in report.result:
                if isinstance(item, pytest.Item):
                    refusal = self._reader.declared(item.iter_markers()).refusal
                    if refusal:
                        errors.setdefault(refusal, item.nodeid)
            if errors:
                report.outcome = "failed"
                report.longrepr = "\n".join(
                    f"gpu-share: {nodeid}: {refusal}" for refusal, nodeid in errors.items()
                )
                report.result = []
        return report


def collected_tests(items: Sequence[pytest.Item], reader: MarkerReader) -> CollectedTests:
    """All tests of this process."""
    said, groups, skips = [], [], []
    scopes: dict[int, int] = {}
    by_marker = bool(items) and keeps_groups(items[0].config.option)
    for item in items:
        marks = list(item.iter_markers())
        said.append(reader.with_model(item, reader.declared(marks)))
        groups.append(_marked_group(marks) if by_marker else _group(item, scopes))
        skips.append(_is_skipped(item, marks))
    if not by_marker:
        groups = _in_order(items, _widened(items, groups))
    return CollectedTests(os.getpid(), said, groups, skips)


def _marked_group(marks: Iterable[pytest.Mark]) -> str:
    """The name that xdist gives the group of a test with these markers; empty where it has none."""
    names = {
        str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
        for mark in marks
        if mark.name == "xdist_group"
    }
    return "_".join(sorted(names))


_NODES: Mapping[int, type[Any]] = {1: pytest.Class, 2: pytest.Module, 3: pytest.Package}
_SCOPES = {"class": 1, "module": 2, "package": 3}


def _group(item: pytest.Item, scopes: dict[int, int]) -> str:
    """The node id of what the item shares fixtures with; the session is shared by all."""
    fixtures = fixtures_of(item)
    if fixtures is None:
        return ""
    # The tests of one parametrised function have this object in common; it outlives the loop.
    widest = scopes.get(id(fixtures))
    if widest is None:
        widest = max((_SCOPES.get(scope, 0) for scope in fixture_scopes(fixtures)), default=0)
        scopes[id(fixtures)] = widest
    if not widest:
        return ""
    node = item.getparent(_NODES[widest]) or item.getparent(pytest.Module)
    return node.nodeid if node is not None else ""


def _widened(items: Sequence[pytest.Item], groups: list[str]) -> list[str]:
    """The groups, where those of a class that lies in a module's group are the module's.

    A worker that ran the one and came back for the other would set the class's fixtures up twice.
    """
    keys = set(groups)
    if len(keys) < 2:
        return groups
    widest: dict[pytest.Collector | None, str] = {}
    result = []
    for item, group in zip(items, groups, strict=True):
        if group:
            parent = item.parent
            if parent not in widest:
                chain = parent.listchain()[1:] if parent is not None else []
                widest[parent] = next((node.nodeid for node in chain if node.nodeid in keys), "")
            group = widest[parent] or group
        result.append(group)
    return result


def _in_order(items: Sequence[pytest.Item], groups: list[str]) -> list[str]:
    """The groups; the keys of those that share parametrised fixtures say so."""
    ordered = {
        group for item, group in zip(items, groups, strict=True) if group and _shares_values(item)
    }
    return [IN_ORDER + group if group in ordered else group for group in groups]


def _shares_values(item: pytest.Item) -> bool:
    """Whether a fixture that it shares with others has different values for different tests."""
    return not _SCOPES.keys().isdisjoint(parameter_scopes(item))


def _is_skipped(item: pytest.Item, marks: Iterable[pytest.Mark]) -> bool:
    """Whether markers skip the test, as far as that can be known before it is its turn."""
    # Whatever stands in a condition is other people's code.
    with contextlib.suppress(Exception):
        if any(_skips(mark) for mark in marks):
            return True
    cls = getattr(item, "cls", None)
    function = getattr(cls, getattr(item, "originalname", None) or item.name, None)
    return bool(
        getattr(cls, "__unittest_skip__", False) or getattr(function, "__unittest_skip__", False)
    )


def _skips(mark: pytest.Mark) -> bool:
    if mark.name == "skip":
        return True
    if mark.name != "skipif":
        return False
    conditions = mark.args or (mark.kwargs.get("condition", False),)
    return any(not isinstance(c, str) and bool(c) for c in conditions)


def may_use_models(ollama: Mapping[str, Any], items: Sequence[pytest.Item]) -> bool:
    """Whether a test may use a model of Ollama's, by a rule, a parameter or a marker."""
    if ollama["rules"] or ollama["param"]:
        return True
    return any(name in item.keywords for item in items for name in ollama["markers"])


Refusal = tuple[str, str]
"""`fail` or `skip`, and the reason."""

REFUSAL: pytest.StashKey[Refusal] = pytest.StashKey()
"""Why the test is not run; nothing where it is."""


class Refusals:
    """The plugin that keeps tests from running that the controller refuses."""

    def refusal_of(self, item: pytest.Item) -> Refusal | None:
        """Why a test that is about to run must not."""
        return item.stash.get(REFUSAL, None)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Raise for a refused test; its own `skip` markers have spoken before."""
        __tracebackhide__ = True
        refusal = self.refusal_of(item)
        if refusal is not None:
            item.stash[_RAISED] = refusal
            outcome, reason = refusal
            if outcome == "skip":
                pytest.skip(reason)
            pytest.fail(reason, pytrace=False)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Report a refused test as failed, whatever `xfail` says, or as skipped at its place."""
        report = yield
        refusal = item.stash.get(_RAISED, None)
        if refusal is None or call.when != "setup":
            return report
        del item.stash[_RAISED]
        outcome, reason = refusal
        if outcome == "skip":
            path, line, _ = item.reportinfo()
            report.longrepr = (str(path), 0 if line is None else line + 1, f"Skipped: {reason}")
        else:
            # A test that fails, not an error in a fixture.
            report.outcome, report.when, report.longrepr = "failed", "call", reason
            vars(report).pop("wasxfail", None)
        return report


_RAISED: pytest.StashKey[Refusal] = pytest.StashKey()


class LocalRefusals(Refusals):
    """The same where no dispatcher decides: refuses what this process cannot run, too."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self._reader = MarkerReader(message)
        self._without_gpu: str = message["without_gpu"]
        self._absence: str = message["absence"]
        self._budget: int = message["budget"]
        self._devices: int = message["devices"]

    def refusal_of(self, item: pytest.Item) -> Refusal | None:
        """Why the test must not run here."""
        if (refusal := super().refusal_of(item)) is not None:
            return refusal
        said, want = self._reader.wanted(item)
        if said.refusal:
            return "fail", f"gpu-share: {said.refusal}"
        if not want.marked:
            return None
        if not self._absence:
            problem = self._problem(want.need or Need())
            return ("fail", f"gpu-share: {problem}") if problem else None
        if said.required:
            return "fail", f"gpu-share: it requires a GPU: {self._absence}"
        if self._without_gpu == "run":
            return None
        reason = f"gpu-share: {self._absence} (gpu_share_without_gpu = {self._without_gpu})"
        return self._without_gpu, reason

    def _problem(self, need: Need) -> str:
        if need.devices > self._devices:
            seen = plural(self._devices, "device")
            return (
                f"needs {plural(need.devices, 'device')}, and this process sees {seen}: see "
                "gpu_share_visible_devices, or leave it out with -m or -k"
            )
        if need.vram is not None and need.vram > self._budget:
            return (
                f"needs {format_gb(need.vram)} of VRAM (by {need.source}), and the budget is "
                f"{format_gb(self._budget)}: lower the need, or leave more to the tests"
            )
        return ""
