"""torch's share, set for each test once CUDA is up, and nobody else's share touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.gpu.nvml import NVIDIA
from pytest_gpushare.planning.caps import caps_for, torch_fraction, with_mark
from pytest_gpushare.planning.plan import Slot
from pytest_gpushare.units import GB, MB
from pytest_gpushare.worker.framework_caps import TorchCap

CARD = Device("GPU-1", "card", "0", 24 * GB, 2 * GB, 22 * GB)
SLOT = Slot(CARD, 6 * GB)


class Torch:
    """torch.cuda as far as its shares go."""

    def __init__(self, *, up: bool = True, share: float = 1.0) -> None:
        self.up, self.share, self.calls = up, share, list[float]()
        self.queued: list[Any] = []
        self.cuda = self

    def is_initialized(self) -> bool:
        return self.up

    def device_count(self) -> int:
        return 1

    def get_device_properties(self, _: int) -> Any:
        return SimpleNamespace(total_memory=24 * GB)

    def get_per_process_memory_fraction(self, _: int) -> float:
        return self.share

    def set_per_process_memory_fraction(self, fraction: float, _: int) -> None:
        self.share = fraction
        self.calls.append(round(fraction, 3))

    def _lazy_call(self, call: Any) -> None:
        self.queued.append(call)


def environment(**versions: str) -> dict[str, str]:
    """What a worker in that slot finds, where these are installed."""
    return with_mark(caps_for(SLOT, {}, versions, rules=NVIDIA.caps).environment)


@pytest.mark.parametrize("version", ["2.10.0", "2.4.0"])
def test_the_share_that_the_run_gave(version: str) -> None:
    assert torch_fraction(environment(torch=version)) == pytest.approx(5.414 / 24, abs=1e-4)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.5"},
        {"PYTEST_GPUSHARE_TORCH_FRACTION": "0.5"},
        {"PYTORCH_ALLOC_CONF": "x", "PYTEST_GPUSHARE_CAPS": "PYTORCH_ALLOC_CONF"},
    ],
)
def test_a_share_that_is_not_ours(found: dict[str, str]) -> None:
    """The user's own, or none at all: it is nobody else's to change."""
    torch = Torch()
    TorchCap(found, {"torch": torch}).set(2 * GB)
    assert torch.calls == []


def test_set_for_a_test_and_back() -> None:
    torch = Torch()
    cap = TorchCap(environment(torch="2.13.0"), {"torch": torch})
    cap.set(None)
    assert torch.calls == []
    cap.set(12 * GB)
    assert cap.size == 12 * GB
    cap.set(None)
    cap.set(48 * GB)
    assert torch.calls == [0.5, 0.226, 1.0]


def test_cuda_is_not_brought_up() -> None:
    torch = Torch(up=False)
    cap = TorchCap(environment(torch="2.13.0"), {"torch": torch})
    cap.set(12 * GB)
    assert torch.calls == []
    TorchCap(environment(torch="2.13.0"), {}).set(12 * GB)


def test_a_share_that_the_tests_set_stands() -> None:
    torch = Torch()
    cap = TorchCap(environment(torch="2.13.0"), {"torch": torch})
    cap.set(12 * GB)
    torch.share = 0.9
    cap.set(None)
    cap.set(6 * GB)
    assert (torch.calls, torch.share, cap.size) == ([0.5], 0.9, None)


def test_an_odd_torch_keeps_what_it_has() -> None:
    cap = TorchCap(environment(torch="2.13.0"), {"torch": object()})
    cap.set(12 * GB)


def test_the_room_of_the_device_takes_the_slots_place() -> None:
    """Where tests have needs of their own, what only the environment can set lets all through."""
    versions = {"torch": "2.13.0", "JAX": "0.10.2", "CuPy": "14.0.0"}
    found = caps_for(SLOT, {}, versions, rules=NVIDIA.caps, budget=18 * GB, mps=True).environment
    assert found["CUPY_GPU_MEMORY_LIMIT"] == str(18 * GB - 600 * MB)
    assert float(found["XLA_CLIENT_MEM_FRACTION"]) == pytest.approx(17.41 / 24, abs=1e-3)
    assert found["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=18432M"
