"""The devices of a what-if, from the texts of `--gpu-share-simulate`."""

from __future__ import annotations

import pytest

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.gpu.devices import simulated

GB = 2**30


def test_devices_of_a_what_if() -> None:
    facts = simulated(["24GB:used=2GB:name=My <GPU>", "512MB"])
    assert facts.simulated
    assert [(d.name, d.label, d.total, d.free) for d in facts.devices] == [
        ("My ?GPU?", "GPU 0", 24 * GB, 22 * GB),
        ("simulated GPU", "GPU 1", GB // 2, GB // 2),
    ]


@pytest.mark.parametrize(
    ("spec", "fact"),
    [
        ("24GB:size=2GB", '"size=2GB" is not understood'),
        ("24GB:used=1GB:used=2GB", '"used=2GB" is not understood'),
        ("0GB", "a device of 0 GB has no VRAM"),
        ("much", '"much" is no size'),
        ("24GB:used=some", '"some" is no size'),
        ("5000TB", '"5000TB" is more than any GPU has'),
        ("24GB:used=25GB", "more is used than there is"),
    ],
)
def test_texts_that_cannot_be_meant(spec: str, fact: str) -> None:
    with pytest.raises(SettingsError, match="allowed is TOTAL") as caught:
        simulated([spec])
    assert str(caught.value).startswith(f"--gpu-share-simulate {spec}: {fact}: ")


def test_at_most_64() -> None:
    with pytest.raises(SettingsError, match="65 devices: at most 64"):
        simulated(["1GB"] * 65)
