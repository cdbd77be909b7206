"""The plugin of a process that has no GPU for its GPU tests, in a run that has none at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pytest_gpushare.pull.instead import report_instead
from pytest_gpushare.pull.items import Reader
from pytest_gpushare.pull.rest import Between


class Absent:
    """Runs GPU tests on the CPU, or skips or fails them, as the settings say."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self._reader = Reader(message)
        self._without: str = message["without_gpu"]
        self._why: str = message["absence"]
        self._between: Between | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Report a test that is not run; leave the others to pytest."""
        between = self._between = self._between or Between(item.session)
        outcome, reason = self._judged(item)
        if not outcome:
            between.last = item
            return None
        report_instead(item, outcome, reason)
        between.change_over(nextitem)
        return True

    def _judged(self, item: pytest.Item) -> tuple[str, str]:
        said, want = self._reader.wanted(item)
        if said.refusal:
            return "fail", f"gpu-share: {said.refusal}"
        if not want.marked:
            return "", ""
        if said.required:
            return "fail", f"gpu-share: it requires a GPU: {self._why}"
        if self._without == "run":
            return "", ""
        return self._without, f"gpu-share: {self._why} (gpu_share_without_gpu = {self._without})"
