"""The snapshots of watch in words, from values."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from pytest_gpushare.cli.terminal import _cropped, text_of
from pytest_gpushare.cli.watch import (
    SeenDevice,
    Snapshot,
    Watcher,
    _is_trustworthy,
    document,
    lines,
    rows,
)
from pytest_gpushare.gpu.devices import Device, GpuProcess, Memory
from pytest_gpushare.gpu.nvml import Nvml
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.session.session_record import RunningSession, SessionWorker
from pytest_gpushare.text import encodable
from pytest_gpushare.units import GB

CARD = Device("GPU-0", "RTX 3090 Ti", "0", 24 * GB, 12 * GB, 12 * GB)
SEEN = SeenDevice(CARD, Memory(24 * GB, 12 * GB, 12 * GB), 6 * GB, 4 * GB, 2 * GB, (0.0, 0.5, 1.0))
WORKERS = (
    SessionWorker("gw0", 11, "gpu", "GPU-0", 3 * GB),
    SessionWorker("gw1", 12, "gpu", "GPU-0", 3 * GB),
    SessionWorker("gw2", 13, "cpu", None, 0),
)
SNAPSHOT = Snapshot(
    at=1_000_000_000.0,
    devices=(SEEN,),
    absence="",
    driver="580",
    problems=("GPU 1 was left out: it is lost",),
    sessions=(RunningSession(10, "/p", 1_000_000_000.0 - 3725, WORKERS),),
    held={11: 4 * GB},
    ollama=OllamaFacts(
        "h:1", True, True, "0.33.0", (LoadedModel("m", 8 * GB, 6 * GB),), reachable=True
    ),
)
CLOCK = time.strftime("%H:%M:%S", time.localtime(SNAPSHOT.at))


def drawn(snapshot: Snapshot, width: int = 100) -> list[str]:
    return [text_of(row) for row in rows(snapshot, width)]


def test_rows() -> None:
    """All that a terminal shows."""
    assert drawn(SNAPSHOT) == [
        f"pytest-gpushare watch  {CLOCK}, driver 580",
        "",
        "GPU 0 RTX 3090 Ti",
        "  ██████▓▓▓▓▒▒░░░░░░░░░░░░  12.0 GB of 24.0 GB used, 12.0 GB free  ▁▅█",
        "  █ Ollama 6.0 GB  ▓ tests 4.0 GB  ▒ others 2.0 GB  ",
        "GPU 1 was left out: it is lost",
        "",
        "session 10 in /p: 3 workers, 1:02:05",
        "  gw0: GPU 0, 4.0 GB of 3.0 GB, over its slot, PID 11",
        "  gw1: GPU 0, unknown of 3.0 GB, PID 12",
        "  gw2: CPU, no GPU",
        "",
        "Ollama 0.33.0 at h:1",
        "  m 8.0 GB, 75 % on GPU",
    ]


def test_ascii() -> None:
    """In a terminal without these signs the parts of a bar still differ, also in the legend."""
    shown = [encodable(line, "ascii") for line in drawn(SNAPSHOT)]
    assert "  @@@@@@%%%%==............  12.0 GB" in "\n".join(shown)
    assert "  @ Ollama 6.0 GB  % tests 4.0 GB  = others 2.0 GB" in "\n".join(shown)


def test_lines() -> None:
    """The same facts for a pipe, the time in front of each."""
    told = list(lines(SNAPSHOT))
    assert all(line.startswith(f"{CLOCK} ") for line in told)
    assert told[0].endswith(
        "GPU 0: 12.0 GB of 24.0 GB used, 12.0 GB free; Ollama 6.0 GB, tests 4.0 GB, others 2.0 GB"
    )
    assert len(told) == 8


def test_document() -> None:
    """What is unknown is null, never 0."""
    found = json.loads(json.dumps(document(SNAPSHOT)))
    assert [w["held_bytes"] for w in found["sessions"][0]["workers"]] == [4 * GB, None, None]
    assert found["sessions"][0]["workers"][2]["slot_bytes"] is None
    assert found["at"] == "2001-09-09T01:46:40.000+00:00"
    blind = replace(SEEN, memory=None, ollama=None, tests=None, others=None)
    (device,) = document(replace(SNAPSHOT, devices=(blind,)))["devices"]
    assert {device[name] for name in device if name.endswith("_bytes")} == {None}


def test_nothing_is_known() -> None:
    """A lost device, nobody told by process, no session, no Ollama."""
    blind = replace(SEEN, memory=None, ollama=None, tests=None, others=None, history=())
    snapshot = replace(SNAPSHOT, devices=(blind,), sessions=(), problems=(), ollama=OllamaFacts())
    assert drawn(snapshot)[2:] == [
        "GPU 0 RTX 3090 Ti",
        "  no reading: the device does not answer",
        "  holders unknown",
        "",
        "no session runs under the plugin",
        "",
        "Ollama is not asked",
    ]
    assert f"{CLOCK} GPU 0: no reading; holders unknown" in list(lines(snapshot))


def test_what_ollama_says_of_itself_is_shown_where_nvml_lists_nobody() -> None:
    seen = replace(SEEN, tests=None, others=None)
    snapshot = replace(SNAPSHOT, devices=(seen,))
    assert "  Ollama 6.0 GB, others unknown" in drawn(snapshot)
    assert any(text.endswith("; Ollama 6.0 GB, others unknown") for text in lines(snapshot))


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_no_line_is_too_long(width: int) -> None:
    """It is broken at words, so that no figure is lost; a bar that does not fit is cut."""
    if width > 20:
        assert all(len(text_of(row).rstrip()) <= width for row in rows(SNAPSHOT, width))
    cut = _cropped(rows(SNAPSHOT, width), width, 40)
    assert max(len(text_of(row)) for row in cut) <= width


def test_small_terminal() -> None:
    """The last line says how much is missing."""
    cut = [text_of(row) for row in _cropped(rows(SNAPSHOT, 80), 80, 5)]
    assert (len(cut), cut[-1]) == (5, "... 10 more lines")


def test_pids_of_a_container_tell_nothing() -> None:
    """A list with a process that is not here is about another system."""
    import os

    assert _is_trustworthy([GpuProcess(os.getpid(), 1)])
    assert not _is_trustworthy([GpuProcess(os.getpid(), 1), GpuProcess(2**22 + 5, 1)])
    assert not _is_trustworthy([GpuProcess(os.getpid(), None)])


def test_a_bar_always_has_its_length() -> None:
    """Rounding at the borders neither adds nor drops a cell."""
    for used in range(0, 25):
        for tests in range(0, used + 1):
            seen = replace(
                SEEN,
                memory=Memory(24 * GB + 7, used * GB, (24 - used) * GB),
                ollama=(used - tests) * GB // 2,
                tests=tests * GB,
                others=0,
                history=(),
            )
            line = drawn(replace(SNAPSHOT, devices=(seen,)))[3]
            assert sum(line.count(sign) for sign in "█▓▒░") == 24


def test_watcher_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that hangs is waited for no longer than the limit."""
    from pathlib import Path

    from pytest_gpushare.cli import watch as module
    from pytest_gpushare.config.sources import Written, load

    monkeypatch.setattr(module, "_OPEN_PATIENCE", 0.05)
    monkeypatch.setattr(Nvml, "open", lambda _: time.sleep(5))
    here = Path("/nowhere")
    off = {"gpu_share_enable_ollama_detection": "false"}
    watcher = Watcher(load(Written({}, {}, off, "", here, here, here)))
    assert watcher.snapshot(1.0).absence == "NVML did not answer within 0.05 s"
