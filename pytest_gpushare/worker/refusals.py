"""Tests that are not run: refused, or without the GPU that they are for.

pytest runs its protocol and makes the reports; only the set-up raises before any fixture is set
up. So there is one report a phase, and the teardown of earlier fixtures is where it always is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import pytest

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.units import format_gb, plural
from pytest_gpushare.worker.collection import MarkerReader

Refusal = tuple[str, str]
"""`fail` or `skip`, and the reason."""

REFUSAL: pytest.StashKey[Refusal] = pytest.StashKey()
"""Why the test is not run; nothing where it is."""


class Refusals:
    """The plugin that keeps refused tests from running."""

    def __init__(self, judge: Callable[[pytest.Item], Refusal | None]) -> None:
        """`judge` says of a test that is about to run why it must not."""
        self._judge = judge

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Raise for a refused test; its own `skip` markers have spoken before."""
        __tracebackhide__ = True
        refusal = self._judge(item)
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


def sent_by_the_controller(item: pytest.Item) -> Refusal | None:
    """Why the controller does not want this test to run."""
    return item.stash.get(REFUSAL, None)


class LocalRefusals:
    """Which tests a process cannot run for which no dispatcher decides."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self._reader = MarkerReader(message)
        self._without_gpu: str = message["without_gpu"]
        self._absence: str = message["absence"]
        self._budget: int = message["budget"]
        self._devices: int = message["devices"]

    def __call__(self, item: pytest.Item) -> Refusal | None:
        """Why the test must not run here."""
        if (refusal := sent_by_the_controller(item)) is not None:
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
