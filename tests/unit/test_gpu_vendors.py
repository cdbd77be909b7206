"""Several vendors' probes as one."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import toy_vendor

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.gpu import nvml, vendors
from pytest_gpushare.planning import startup

MB = 2**20


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one toy GPU; the vendors are NVIDIA, without a driver, and the toy's."""
    monkeypatch.setattr(nvml.Nvml, "open", lambda _probe: None)
    (tmp_path / "devices.json").write_text(json.dumps([["Toy", 8 * MB, MB]]))
    monkeypatch.setenv("TOY_GPUS", str(tmp_path))
    monkeypatch.setattr(vendors, "VENDORS", (*vendors.VENDORS, "toy_vendor:TOY"))
    return tmp_path


def settings() -> Settings:
    here = Path()
    ini = {"gpu_share_enable_ollama_detection": "false"}
    return load(Written({}, {"gpu_share_config": ""}, ini, "", here, here, here))


def test_each_figure_comes_from_the_device_s_vendor(toy: Path) -> None:
    """That NVML is missing is no problem where another vendor has devices."""
    probe = vendors.open_later(lambda _pid: "Neighbour")
    probe.open()
    facts = probe.read({})
    (toy / "held-1").write_text(f"0 {2 * MB}")
    assert (facts.absence, facts.problems, facts.driver) == ("", (), "toy 1.0")
    assert [(device.label, device.free) for device in facts.devices] == [("GPU toy0", 7 * MB)]
    assert probe.memory() == {"TOY-0": (8 * MB, 3 * MB, 5 * MB)}
    assert probe.processes() == {"TOY-0": ((1, 2 * MB, "Neighbour"),)}
    assert probe.processes_on("TOY-0") == ((1, 2 * MB, "Neighbour"),)
    assert probe.processes_on("another") is None
    assert probe.versions() == {"toy library": "1.0"}
    probe.close()


@pytest.mark.parametrize(
    ("hangs", "named"),
    [
        (nvml.Nvml, "NVML did not answer within 0.05 s: check nvidia-smi; "),
        (toy_vendor.Toy, "toy did not answer within 0.05 s: check the disk"),
    ],
)
@pytest.mark.parametrize("method", ["open", "read"])
def test_the_driver_that_hangs_is_named(
    toy: Path, monkeypatch: pytest.MonkeyPatch, hangs: type, named: str, method: str
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(hangs, method, lambda *_: answers.wait(60))
    monkeypatch.setattr(startup, "DEVICES_TIMEOUT", 0.05)
    try:
        found = startup.probe(settings(), (), {})
    finally:
        answers.set()
    assert found.gpus.absence.startswith(named)
    found.close()


def test_variables(toy: Path) -> None:
    assert vendors.variables() == ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    assert vendors.settling_variables() == (*vendors.variables(), "CUDA_DEVICE_ORDER")
