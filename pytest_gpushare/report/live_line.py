"""The live line: the VRAM of the fullest device while the tests run, below pytest's output."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_gpushare.compat.pytest_terminal import (
    LineBelow,
    captures_output,
    is_drawable,
    reporter_file,
    shows_progress,
)
from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.ollama.models import OLLAMA
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.text import encodable
from pytest_gpushare.units import GB

if TYPE_CHECKING:
    import pytest

INTERVAL = 0.25
"""Seconds between two looks at the figures."""

_CELLS = 4
_BARS = "▁▂▃▄▅▆▇"
_STOP_TIMEOUT = 1.0


def begin(run: ActiveRun, config: pytest.Config) -> None:
    """Show the line from now on until the run's services stop, where it is wanted."""
    if run.sampler is None or not is_wanted(run, config):
        return
    file = reporter_file(config)
    if file is not None:
        run.services.add(LiveLine(run, LineBelow(file), file.encoding or "ascii"))


def is_wanted(
    run: ActiveRun, config: pytest.Config, environment: Mapping[str, str] = os.environ
) -> bool:
    """Whether the last row of this terminal is free for a line."""
    # The tests of a run without workers own the terminal as much as pytest does.
    if run.settings.live == "off" or run.plan.request.in_process:
        return False
    quiet = int(getattr(config.option, "verbose", 0)) < 0
    if quiet or not captures_output(config) or not is_drawable(environment):
        return False
    if run.settings.live == "on":
        return True
    on_ci = environment.get("CI") or environment.get("BUILD_NUMBER")
    return not on_ci and not shows_progress(config) and sys.platform != "win32"


class LiveLine:
    """The service that draws the line: four times a second at most, and only what has changed."""

    def __init__(self, run: ActiveRun, place: LineBelow, encoding: str) -> None:
        self._run, self._place, self._encoding = run, place, encoding
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="gpu-share-line", daemon=True)

    def start(self) -> None:
        """Draw from now on."""
        if self._place.install():
            self._thread.start()

    def stop(self) -> None:
        """Remove the line: what follows is not about running tests."""
        self._stopped.set()
        self._place.remove()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT)

    def _serve(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                text = encodable(line(self._run), self._encoding)
            except Exception:
                # The line is no reason to disturb a run.
                self._place.remove()
                return
            if text:
                self._place.show(text)


def line(run: ActiveRun) -> str:
    """`gpu-share: GPU 0 ▇▇▇▂ 19.5 of 24 GB · tests 7.4 · Ollama 10.1 · 212/600`; empty before
    the first reading."""
    if run.sampler is None:
        return ""
    labels = {planned.device.uuid: planned.device.label for planned in run.plan.devices}
    used = [
        (watched.last, labels.get(uuid, "GPU"))
        for uuid, watched in run.sampler.devices.items()
        if watched.last is not None and watched.last.total
    ]
    if not used:
        return ""
    fullest, label = max(used, key=lambda each: each[0].used / each[0].total)
    others = f" +{len(used) - 1}" if len(used) > 1 else ""
    parts = [
        f"gpu-share: {label} {gauge(fullest.used, fullest.total)} "
        f"{_gb(fullest.used)} of {_round(fullest.total)} GB{others}",
        *_owners(fullest),
    ]
    done, total = sum(run.tests.counts.values()), run.tests.total
    if total:
        parts.append(f"{min(done, total)}/{total}")
    return " · ".join(parts)


def _owners(usage: DeviceUsage) -> list[str]:
    parts = []
    if usage.tests is not None:
        # What nobody explains of the rise is the tests' until a process list says otherwise.
        parts.append(f"tests {_gb(usage.tests + usage.unattributed)}")
    if OLLAMA in usage.neighbours:
        parts.append(f"Ollama {_gb(usage.of(OLLAMA))}")
    return parts


def gauge(used: int, total: int) -> str:
    """The part in use, in eighths of each cell."""
    top = len(_BARS) - 1
    filled = min(1.0, used / max(1, total)) * _CELLS
    return "".join(_BARS[round(top * min(1.0, max(0.0, filled - cell)))] for cell in range(_CELLS))


def _gb(size: int) -> str:
    return f"{size / GB:.1f}"


def _round(size: int) -> str:
    """`24`, or `23.6` where that is no whole number."""
    return f"{size / GB:.1f}".removesuffix(".0")
