"""What becomes of GPU tests where no dispatcher decides: without any GPU, or without workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pytest_gpushare.plan.needs import Need
from pytest_gpushare.pull.instead import report_instead
from pytest_gpushare.pull.items import Reader
from pytest_gpushare.pull.rest import Between
from pytest_gpushare.units import format_gb, plural


class Unaided:
    """The plugin of a process that must see for itself which of its tests can run."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self._reader = Reader(message)
        self._without: str = message["without_gpu"]
        self._absence: str = message["absence"]
        self._budget: int = message["budget"]
        self._devices: int = message["devices"]
        self._between: Between | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Report a test that is not run; leave the others to pytest."""
        between = self._between = self._between or Between(item.session)
        between.follow(item)
        outcome, reason = self._judged(item)
        if not outcome:
            return None
        reason = f"gpu-share: {reason}"
        report_instead(item, outcome, reason, lambda: between.tear_down(nextitem))
        return True

    def _judged(self, item: pytest.Item) -> tuple[str, str]:
        """`fail` or `skip` with the reason; two empty texts for a test that is to run."""
        said, want = self._reader.wanted(item)
        if said.refusal:
            return "fail", said.refusal
        if not want.marked:
            return "", ""
        if not self._absence:
            problem = self._problem(want.need or Need())
            return ("fail", problem) if problem else ("", "")
        if said.required:
            return "fail", f"it requires a GPU: {self._absence}"
        if self._without == "run":
            return "", ""
        return self._without, f"{self._absence} (gpu_share_without_gpu = {self._without})"

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
