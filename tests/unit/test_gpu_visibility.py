"""CUDA_VISIBLE_DEVICES in all its forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.gpu.nvml import visible

A = Device("GPU-aaaa1111-0000-0000-0000-000000000000", "Big", "0", 24, 0, 24)
B = Device("GPU-aaaa2222-0000-0000-0000-000000000000", "Big", "1", 24, 0, 24)
C = Device("GPU-cccc3333-0000-0000-0000-000000000000", "Big", "2", 24, 0, 24)
SMALL = Device("GPU-dddd4444-0000-0000-0000-000000000000", "Small", "3", 8, 0, 8)
M0 = Device("MIG-eeee5555-0000-0000-0000-000000000000", "A100 MIG", "4.0", 10, 0, 10)
M5 = Device("MIG-eeee6666-0000-0000-0000-000000000000", "A100 MIG", "4.5", 10, 0, 10)
OLD = Device("MIG-GPU-ffff7777-0000/3/0", "A100 MIG", "5.3", 10, 0, 10)
ALL = (A, B, C, M0, M5, OLD)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ALL),
        ("0", (A,)),
        ("0,1,2", (A, B, C)),
        ("2,0", (C, A)),
        (" 1 , 0 ", (B, A)),
        ("+1", (B,)),
        ("00,01", (A, B)),
        (A.uuid, (A,)),
        (A.uuid.upper(), (A,)),
        (f"{B.uuid},{A.uuid}", (B, A)),
        ("GPU-aaaa1", (A,)),
        ("GPU-c", (C,)),
        ("gpu-c", (C,)),
        (f"0,{C.uuid}", (A, C)),
        (M5.uuid, (M5,)),
        ("MIG-eeee5", (M0,)),
        (f"{M5.uuid},{M0.uuid}", (M5, M0)),
        (OLD.uuid, (OLD,)),
        # As C's strtoul: what follows the digits of an entry counts for nothing.
        ("1gpu2,2ampere", (B, C)),
        ("0 1", (A,)),
        ("0;1", (A,)),
        ("1,0x1", (B, A)),
        ("-0", (A,)),
        ("4.0", (M0,)),
    ],
)
def test_seen(value: str | None, expected: tuple[Device, ...]) -> None:
    """Devices in the order that the value gives them, without a word."""
    found = visible(ALL, value, "PCI_BUS_ID")
    assert (found.devices, found.problem, found.absence) == (expected, "", "")


@pytest.mark.parametrize(
    ("value", "expected", "odd"),
    [
        ("0,-1,1", (A,), "-1"),
        ("0,9,1", (A,), "9"),
        ("0,,1", (A,), ""),
        ("0,", (A,), ""),
        ("-1", (), "-1"),
        ("1,-1gpu,0", (B,), "-1gpu"),
        ("6", (), "6"),
        ("all", (), "all"),
        ("none", (), "none"),
        ("NoDevFiles", (), "NoDevFiles"),
        ("GPU-aaaa", (), "GPU-aaaa"),
        ("GPU-", (), "GPU-"),
        ("GPU-zzzz,0", (), "GPU-zzzz"),
        ("MIG-eeee", (), "MIG-eeee"),
        ("aaaa1111", (), "aaaa1111"),
        ("\u0661", (), "\u0661"),
        (f"{C.uuid},GPU-aaaa,{A.uuid}", (C,), "GPU-aaaa"),
    ],
)
def test_hidden(value: str, expected: tuple[Device, ...], odd: str) -> None:
    """An entry that names no single device hides itself and all that follow, and that is told."""
    found = visible(ALL, value, "PCI_BUS_ID")
    text = f'CUDA_VISIBLE_DEVICES={value}: "{odd}" names no device: it and what follows are ignored'
    assert found.devices == expected
    assert (found.problem, found.absence) == ((text, "") if expected else ("", text))


@pytest.mark.parametrize(
    "value", ["0,0", "0,1,+0", f"0,{A.uuid}", "GPU-aaaa1,0", "0,1,1,9", "0,0gpu"]
)
def test_twice(value: str) -> None:
    """A device that is named twice leaves none at all."""
    found = visible(ALL, value, "PCI_BUS_ID")
    label = "GPU 1" if value.startswith("0,1,1") else "GPU 0"
    text = f"CUDA_VISIBLE_DEVICES={value}: names {label} twice: CUDA then sees no device"
    assert (found.devices, found.absence) == ((), text)


@pytest.mark.parametrize("value", ["", " ", "\t"])
def test_empty(value: str) -> None:
    """Set to nothing means none, and says how to get one."""
    found = visible(ALL, value, "PCI_BUS_ID")
    assert (found.devices, found.problem) == ((), "")
    assert found.absence == "CUDA_VISIBLE_DEVICES is empty; unset it or name a device"


@pytest.mark.parametrize(
    ("devices", "value", "order", "is_reported"),
    [
        ((A, SMALL), "0", None, True),
        ((A, SMALL), "0", "FASTEST_FIRST", True),
        ((A, SMALL), "0", "PCI_BUS_ID", False),
        ((A, SMALL), f"{A.uuid},1", None, True),
        ((A, SMALL), A.uuid, None, False),
        ((A, SMALL), None, None, False),
        ((A, B), "1,0", None, False),
    ],
)
def test_order_of_mixed_devices(
    devices: tuple[Device, ...], value: str | None, order: str | None, is_reported: bool
) -> None:
    """Integers may count otherwise in CUDA than in NVML, where devices differ."""
    found = visible(devices, value, order)
    assert len(found.devices) > 0
    assert ("set CUDA_DEVICE_ORDER=PCI_BUS_ID or name UUIDs" in found.problem) is is_reported


def test_long_values() -> None:
    """What cannot be printed, or not on one line, is cut short; digits have no limit."""
    for value in ("9" * 10_000, "x\n\x1b[31m" * 1000, "0," + "y" * 10_000):
        found = visible(ALL, value, "PCI_BUS_ID")
        message = found.problem or found.absence
        assert message.isprintable()
        assert len(message) < 400
    assert visible(ALL, "0" * 10_000 + "1").devices == (B,)


ENTRIES = st.sampled_from(
    ["0", "1", "2", "9", "-1", "", A.uuid, B.uuid, "GPU-aaaa", "GPU-c", M0.uuid, "MIG-eeee", "x"]
)


@given(st.lists(ENTRIES, min_size=1, max_size=6))
def test_prefix_property(entries: list[str]) -> None:
    """Any list: what is seen are the first entries, each one device, none of them twice."""
    found = visible(ALL, ",".join(entries), "PCI_BUS_ID")
    assert len({device.uuid for device in found.devices}) == len(found.devices)
    for entry, device in zip(entries, found.devices, strict=False):
        assert entry == device.index or device.uuid.startswith(entry)
    whole = len(found.devices) == len(entries)
    assert bool(found.problem or found.absence) is not whole
    assert bool(found.absence) is (not found.devices)


@given(st.text(max_size=40))
def test_any_text(value: str) -> None:
    """Whatever stands there, devices or a reason come out."""
    found = visible(ALL, value, "PCI_BUS_ID")
    assert bool(found.devices) is not bool(found.absence)


def _gpu(number: int, gigabytes: int, capability: tuple[int, int], **more: str) -> Device:
    size = gigabytes * 2**30
    return Device(
        f"GPU-{number}aaa", f"card {capability}", str(number), size, 0, size,
        capability=capability, **more,
    )  # fmt: skip


def test_integers_count_the_fastest_first() -> None:
    """By default CUDA's 0 is the fastest device, not NVML's first; that is a guess, and told."""
    old, new = _gpu(0, 24, (7, 5)), _gpu(1, 24, (9, 0))
    guessed = visible((old, new), "0")
    assert guessed.devices == (new,)
    by_bus = visible((old, new), "0", "PCI_BUS_ID")
    assert (by_bus.devices, by_bus.problem) == ((old,), "")


def test_a_gpu_in_mig_mode_stands_for_its_first_instance() -> None:
    """Its index and its UUID name one instance, as a process sees no more than one."""
    size = 2**30
    parts = tuple(
        Device(f"MIG-{n}bbb", "part", f"0.{n}", size, 0, size, parent="GPU-0ccc") for n in range(3)
    )
    for value in ("0", "GPU-0ccc", "GPU-0"):
        assert visible(parts, value, "PCI_BUS_ID").devices == parts[:1]
    assert visible(parts, "MIG-2bbb").devices == parts[2:]
