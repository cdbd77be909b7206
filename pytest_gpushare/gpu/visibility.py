"""CUDA_VISIBLE_DEVICES: which devices it shows, as CUDA reads it, and who has changed it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.text import printable, read_regular

VARIABLE = "CUDA_VISIBLE_DEVICES"
_ORDINAL = r"([+-]?)([0-9]+)"
"""The start of an entry that CUDA reads as an integer, as C's `strtoul` does."""


class Visible(NamedTuple):
    """The devices that are left, in the order that CUDA gives them, and what is wrong."""

    devices: tuple[Device, ...]
    problem: str = ""
    """What is wrong with the variable's value; CUDA does not report it."""
    absence: str = ""
    """Why no device is left, where none is."""


def visible(devices: Sequence[Device], value: str | None, order: str | None = None) -> Visible:
    """The devices that a process with this CUDA_VISIBLE_DEVICES sees.

    `value` None is an unset variable: all devices. `order` is CUDA_DEVICE_ORDER.
    An entry that names no device hides itself and all that follow, and a device that
    is named twice leaves none at all (CUDA Programming Guide, environment variables).
    """
    if value is None:
        return Visible(tuple(devices))
    if not value.strip():
        return Visible((), absence=f"{VARIABLE} is empty; unset it or name a device")
    found: list[Device] = []
    problem, written = "", f"{VARIABLE}={_short(value)}"
    gpus = _as_cuda_counts(devices, order)
    for entry in value.split(","):
        device = _named(gpus, entry.strip())
        if device is None:
            problem = (
                f'{written}: "{_short(entry.strip())}" names no device: it and what follows '
                "are ignored"
            )
            break
        if device in found:
            twice = f"{written}: names {device.label} twice: CUDA then sees no device"
            return Visible((), twice, twice)
        found.append(device)
    if not found:
        return Visible((), "", problem)
    if not problem and _order_matters(devices, value, order):
        problem = (
            f"{written}: counts in CUDA's own order of devices, which NVML does not know: taken "
            "as the fastest first; set CUDA_DEVICE_ORDER=PCI_BUS_ID or name UUIDs"
        )
    return Visible(tuple(found), problem)


def _named(gpus: Mapping[str, Sequence[Device]], entry: str) -> Device | None:
    """The device that an entry means; of a GPU that is cut into MIG instances, its first one."""
    ordinal = re.match(_ORDINAL, entry)
    if ordinal is not None:
        # What follows the digits is ignored: "1gpu2" is 1. Compared as text, since
        # Python converts no integer of more than 4300 digits.
        sign, digits = ordinal.group(1), ordinal.group(2).lstrip("0") or "0"
        number = digits if digits == "0" else sign.replace("+", "") + digits
        return next(iter(gpus.get(number, ())), None)
    if not entry.upper().startswith(("GPU-", "MIG-")) or len(entry) < 5:
        return None
    start = entry.lower()
    matches = [parts[0] for parts in gpus.values() if parts[0].parent.lower().startswith(start)]
    matches += [d for parts in gpus.values() for d in parts if d.uuid.lower().startswith(start)]
    return matches[0] if len(matches) == 1 else None


def _as_cuda_counts(devices: Sequence[Device], order: str | None) -> dict[str, list[Device]]:
    """Number in CUDA -> the GPU's MIG instances, or the GPU itself.

    Under CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA counts as NVML does. By default it puts the fastest
    first, by a rule of its own that capability and size come near; equal ones stay in order.
    """
    gpus: dict[str, list[Device]] = {}
    for device in devices:
        gpus.setdefault(device.index.partition(".")[0], []).append(device)
    if order == "PCI_BUS_ID" or not _are_mixed(devices):
        return gpus
    fastest = sorted(
        gpus.values(), key=lambda gpu: (gpu[0].capability, sum(d.total for d in gpu)), reverse=True
    )
    return {str(number): gpu for number, gpu in enumerate(fastest)}


def _are_mixed(devices: Sequence[Device]) -> bool:
    return len({device.name for device in devices}) > 1


def _short(text: str) -> str:
    """A piece of the environment, fit for one line of a message."""
    text = printable(text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _order_matters(devices: Sequence[Device], value: str, order: str | None) -> bool:
    """Whether integers may mean other devices to CUDA (fastest first) than to NVML."""
    integers = any(re.match(_ORDINAL, entry.strip()) for entry in value.split(","))
    return integers and order != "PCI_BUS_ID" and _are_mixed(devices)


def set_variables(wanted: Mapping[str, str]) -> Callable[[], None]:
    """Set environment variables of this process; the result undoes that."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    return lambda: _restore(before)


def cuda_is_up(own_process_has_context: bool) -> bool:
    """Whether CUDA was initialised in this process, so that its visibility is settled.

    Asks no framework to load: what is not imported has not initialised anything.
    """
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    return own_process_has_context or bool(is_initialized and is_initialized())


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
    try:
        return read_regular(path, _MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _relative(name: str) -> str:
    try:
        return str(Path(name).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return name
