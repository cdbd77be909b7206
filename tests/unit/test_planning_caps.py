"""Caps as variables: what is set, what is merged, what is left to the user."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.gpu.devices import Device
from pytest_gpushare.gpu.nvml import NVIDIA
from pytest_gpushare.planning.caps import Caps, caps_for, with_mark, without_caps_of_outer_run
from pytest_gpushare.planning.plan import Slot
from pytest_gpushare.units import GB, MB

CARD = Device("GPU-1", "card", "0", 24 * GB, 2 * GB, 22 * GB)
SLOT = Slot(CARD, 4608 * MB)
FRACTION = "0.163085"  # (4608 - 600) / 24576, rounded down
ALL = {"torch": "2.10.0", "JAX": "0.10.2", "CuPy": "14.0.0", "TensorFlow": "2.20.0"}


def caps(outer: dict[str, str] | None = None, **more: bool) -> Caps:
    """The caps of a 4.5 GB slot with every framework installed."""
    return caps_for(SLOT, outer or {}, ALL, rules=NVIDIA.caps, **more)


def test_everything_is_capped() -> None:
    """Each framework gets the slot less the allowance for a CUDA context."""
    assert caps().environment == {
        "PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{FRACTION}",
        "XLA_CLIENT_MEM_FRACTION": FRACTION,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUPY_GPU_MEMORY_LIMIT": str(4008 * MB),
        "PYTEST_GPUSHARE_TENSORFLOW_MB": "4008",
    }
    assert caps().descriptions == (
        "torch 2.10.0: 3.91 GB",
        "JAX 0.10.2: 3.91 GB",
        "CuPy 14.0.0: 3.91 GB",
        "TensorFlow 2.20.0: 3.91 GB, set when it is imported",
    )


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_torch_settings_are_merged(name: str) -> None:
    """The user's allocator settings stay in front; their own variable is not touched."""
    mine = "expandable_segments:True,garbage_collection_threshold:0.8"
    assert (
        caps({name: mine}).environment["PYTORCH_ALLOC_CONF"]
        == f"{mine},per_process_memory_fraction:{FRACTION}"
    )
    assert "PYTORCH_CUDA_ALLOC_CONF" not in caps({name: mine}).environment


def test_torch_fraction_of_the_user_stands() -> None:
    """A cap that the user chose is not replaced by ours."""
    result = caps({"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.5"})
    assert "PYTORCH_ALLOC_CONF" not in result.environment
    assert result.descriptions[0] == "torch 2.10.0: the cap that the environment sets"


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu130", "2.0.0"])
def test_older_torch_is_capped_by_a_call(version: str) -> None:
    """An allocator key that an older torch does not know would make it fail."""
    result = caps_for(SLOT, {}, {"torch": version}, rules=NVIDIA.caps)
    assert "PYTORCH_ALLOC_CONF" not in result.environment
    assert result.environment["PYTEST_GPUSHARE_TORCH_FRACTION"] == FRACTION
    assert result.descriptions == (f"torch {version}: 3.91 GB, set when CUDA is first used",)


def test_no_torch_no_key() -> None:
    """Of a torch that is not installed the version is unknown: nothing is set for it."""
    assert not [
        name for name in caps_for(SLOT, {}, {}, rules=NVIDIA.caps).environment if "TORCH" in name
    ]


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_jax_fraction_of_the_user_stands(name: str) -> None:
    """Both names together raise ValueError in JAX, so neither is added to the other."""
    environment = caps({name: ".10"}).environment
    assert not [key for key in environment if key.startswith("XLA")]


@pytest.mark.parametrize("allocator", ["platform", "cuda_async"])
def test_jax_allocators_without_a_cap(allocator: str) -> None:
    """Where nothing holds, that is what is said."""
    result = caps({"XLA_PYTHON_CLIENT_ALLOCATOR": allocator})
    assert not [key for key in result.environment if key.startswith("XLA")]
    assert result.descriptions[1] == f"JAX 0.10.2: no cap (allocator {allocator})"


def test_older_jax_knows_the_older_name() -> None:
    """Where the younger name may not be read yet, the older one is set, and it alone."""
    environment = caps_for(SLOT, {}, {"JAX": "0.4.38"}, rules=NVIDIA.caps).environment
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == FRACTION
    assert "XLA_CLIENT_MEM_FRACTION" not in environment


def test_preallocation_of_the_user_stands() -> None:
    """XLA_PYTHON_CLIENT_PREALLOCATE is only set where it was not."""
    environment = caps({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}).environment
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in environment
    assert environment["XLA_CLIENT_MEM_FRACTION"] == FRACTION


def test_cupy_limit_of_the_user_stands() -> None:
    """CUPY_GPU_MEMORY_LIMIT is left alone where it is set."""
    assert "CUPY_GPU_MEMORY_LIMIT" not in caps({"CUPY_GPU_MEMORY_LIMIT": "50%"}).environment


def test_mps_caps_the_whole_slot() -> None:
    """The MPS limit covers contexts too, so nothing is taken off; by ordinal 0 in the worker."""
    result = caps(mps=True)
    assert result.environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=4608M"
    assert result.descriptions[-1] == "CUDA MPS: 4.5 GB"
    mine = {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1G"}
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" not in caps(mine, mps=True).environment


@given(st.integers(MB, 80 * GB), st.integers(1, 96), st.integers(0, 2 * GB))
def test_caps_never_exceed_the_slot(vram: int, total_gb: int, context: int) -> None:
    """Whatever the sizes, cap and fraction are positive and within slot and device."""
    total = max(total_gb * GB, vram)
    card = Device("GPU-1", "card", "0", total, 0, total)
    environment = caps_for(
        Slot(card, vram), {}, ALL, rules=NVIDIA.caps, context=context
    ).environment
    limit = int(environment["CUPY_GPU_MEMORY_LIMIT"])
    assert 0 < limit <= vram
    assert 0 <= float(environment["XLA_CLIENT_MEM_FRACTION"]) * total <= limit + 1


def test_caps_of_an_outer_run_are_not_the_users() -> None:
    """A run inside a worker caps its own workers by their own, smaller slots."""
    user = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "OTHER": "1"}
    inside = {**user, **with_mark(caps(user).environment)}
    assert inside["PYTORCH_ALLOC_CONF"] != user["PYTORCH_ALLOC_CONF"]
    seen = without_caps_of_outer_run(inside)
    assert {name: seen[name] for name in user} == user
    assert caps(seen).environment == caps(user).environment
    assert without_caps_of_outer_run(user) == user
