"""Where the running process was placed: for tests, conftests and what they start; and who has
changed what it sees."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """The place of one pytest process in the plan of its run."""

    role: str
    """`gpu`: sees the device below; `cpu`: sees none; `unplanned`: the plugin did not place it."""
    device: str | None = None
    """UUID of its GPU or MIG instance, as NVML gives it."""
    name: str | None = None
    """Name of the device, such as `NVIDIA GeForce RTX 3090 Ti`."""
    index: str | None = None
    """NVML's index of the device on the host, as nvidia-smi shows it; `0.1` for MIG."""
    vram: int = 0
    """Bytes of VRAM of its slot; the CUDA context counts towards it. 0 without a slot."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """The run's plan: `gpu_workers`, `cpu_workers`, `limited_by`, `slots` (a UUID and bytes each);
    empty where the process is unplanned."""

    @property
    def planned(self) -> bool:
        """Whether the plugin placed this process."""
        return self.role != "unplanned"


UNPLANNED = Place("unplanned")
_place = UNPLANNED


def current() -> Place:
    """The place of this process; one with the role `unplanned` where the plugin is not active.

    For code without fixtures. Valid from the moment at which the initial conftests are loaded;
    a pytest that a test starts as a process of its own has a place of its own.
    """
    return _place


def entered(place: Place) -> Callable[[], None]:
    """Make a place the current one until the result is called."""
    global _place
    before, _place = _place, place
    return lambda: _set(before)


def _set(place: Place) -> None:
    global _place
    _place = place


def set_variables(wanted: Mapping[str, str]) -> Callable[[], None]:
    """Set environment variables of this process; the result undoes that."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    return lambda: _restore(before)


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


_MOST_BYTES = 1024 * 1024
_MOST_FILES = 2000


def difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What a process sees against what it was given: `NAME was A, is B`; empty where equal."""
    changes = [
        f"{name} was {text or 'empty'}, is {_shown(found.get(name))}"
        for name, text in wanted.items()
        if found.get(name) != text
    ]
    return "; ".join(changes)


def culprit(names: Iterable[str], files: Iterable[str | None]) -> str:
    """`conftest.py:12`: the first line that writes one of the variables; empty where none does."""
    writes = re.compile(
        rf"^(?!\s*#).*\b({'|'.join(map(re.escape, names))})\b[\"']?\s*[\],=)].*", re.M
    )
    for name in list(dict.fromkeys(file for file in files if file))[:_MOST_FILES]:
        text = _text(Path(name))
        for match in writes.finditer(text):
            line = match.group()
            if "env" in line and not _reads(line):
                return f"{_relative(name)}:{text.count(chr(10), 0, match.start()) + 1}"
    return ""


def _reads(line: str) -> bool:
    """Whether a line only asks for the variable."""
    return re.search(r"environ(\.get\(|\[[^\]]*\](?!\s*=[^=]))|getenv", line) is not None


def _shown(text: str | None) -> str:
    return "unset" if text is None else text[:200] or "empty"


def _text(path: Path) -> str:
    # Every worker imports this module, and few look for who has changed what they see.
    from pytest_gpushare.text import read_regular

    try:
        return read_regular(path, _MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _relative(name: str) -> str:
    try:
        return str(Path(name).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return name
