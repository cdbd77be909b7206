"""Caps: what keeps a worker's frameworks within its slot, set from outside the process.

A cap is the slot less an allowance for the CUDA context, which no framework counts. What
the user has set is respected, and merged where a variable holds several settings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.units import MB, format_gb

if TYPE_CHECKING:
    from pytest_gpushare.planning.plan import Slot


CONTEXT_ALLOWANCE = 600 * MB
"""Bytes that a CUDA context and its modules take; 256 to 616 MB have been seen."""

TORCH_HOOK = "PYTEST_GPUSHARE_TORCH_FRACTION"
"""The fraction that the worker sets once torch has brought CUDA up (torch before 2.10)."""
TENSORFLOW_HOOK = "PYTEST_GPUSHARE_TENSORFLOW_MB"
"""The limit that the worker sets once TensorFlow is imported."""

_TORCH, _TORCH_OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_TORCH_KEY = "per_process_memory_fraction"
_JAX, _JAX_OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_JAX_PREALLOCATE, _JAX_ALLOCATOR = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"
_CUPY = "CUPY_GPU_MEMORY_LIMIT"
_MPS = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
MPS = "CUDA MPS"
"""The rule that caps all that a process does on a device, not one framework."""


class Caps(NamedTuple):
    """The variables that cap one worker, and one description for each framework."""

    environment: Mapping[str, str] = {}
    descriptions: tuple[str, ...] = ()
    """`torch 2.13.0: 3.91 GB`, one for each framework that is installed."""


class _Cap(NamedTuple):
    """What a framework's rule looks at."""

    size: int
    """Bytes."""
    fraction: str
    """The same as a part of the device's total."""
    outer: Mapping[str, str]
    version: str
    """Empty where the framework is not installed."""


def caps_for(
    slot: Slot,
    outer: Mapping[str, str],
    versions: Mapping[str, str],
    *,
    rules: Collection[str],
    context: int = CONTEXT_ALLOWANCE,
    mps: bool = False,
    budget: int | None = None,
) -> Caps:
    """The caps of the worker in this slot.

    `budget`, that of the device in bytes, takes the slot's place where tests have needs of
    their own: what only the environment can set must let the largest of them through.

    `outer` is the environment that it would have without us, `versions` the installed
    frameworks (see `gpu.host.installed_frameworks`), `rules` the names of those that hold on the
    device (see `gpu.vendors.Vendor.caps`), `context` the allowance in bytes.
    """
    vram = slot.vram if budget is None else budget
    cap = cap_of(vram, context)
    # Rounded down, so that the fraction never comes to more than the cap.
    fraction = f"{float(Fraction(cap * 10**6 // slot.device.total, 10**6)):.6f}"
    environment: dict[str, str] = {}
    descriptions: list[str] = []
    for name, rule in _RULES.items():
        if name not in rules:
            continue
        added, how = rule(_Cap(cap, fraction, outer, versions.get(name, "")))
        environment.update(added)
        if name in versions:
            descriptions.append(f"{name} {versions[name]}: {how}")
    if mps and MPS in rules and _MPS not in outer:
        # The worker's device is its only one, so its number is 0 there.
        environment[_MPS] = f"0={vram // MB}M"
        descriptions.append(f"{MPS}: {format_gb(vram)}")
    return Caps(environment, tuple(descriptions))


def cap_of(vram: int, context: int) -> int:
    """What frameworks may take of so much VRAM, in bytes, as they do not count the context."""
    return max(vram - context, vram // 2)


MARK = "PYTEST_GPUSHARE_CAPS"
"""The names of the variables that a run set for its caps, for runs inside its workers."""


def with_mark(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, and a note of which they are."""
    return {**environment, MARK: ",".join(environment)}


def without_caps_of_outer_run(outer: Mapping[str, str]) -> dict[str, str]:
    """The environment as the user had set it.

    Inside a worker the outer run's caps look like the user's, and would cap each worker of
    the inner run at the slot that they share.
    """
    kept = dict(outer)
    for name in outer.get(MARK, "").split(","):
        text = kept.pop(name, "")
        if name == _TORCH:
            kept[name] = re.sub(rf"(^|,)\s*{_TORCH_KEY}\s*:[^,]*", "", text).lstrip(",")
    return kept


def torch_fraction(environment: Mapping[str, str]) -> float | None:
    """The share of its device at which a run has capped torch in the process with this
    environment; None where it has not: the user's own cap stays."""
    ours = environment.get(MARK, "").split(",")
    text = environment.get(TORCH_HOOK, "") if TORCH_HOOK in ours else ""
    if _TORCH in ours:
        match = re.search(rf"(?:^|,)\s*{_TORCH_KEY}\s*:([0-9.]+)", environment.get(_TORCH, ""))
        text = match.group(1) if match else ""
    try:
        return float(text)
    except ValueError:
        return None


def _torch(cap: _Cap) -> tuple[dict[str, str], str]:
    given = cap.outer.get(_TORCH) or cap.outer.get(_TORCH_OLD) or ""
    if re.search(rf"(^|,)\s*{_TORCH_KEY}\s*:", given):
        return {}, "the cap that the environment sets"
    if _backend_is_async(given):
        return {}, "no cap (backend cudaMallocAsync)"
    if cap.version and _release(cap.version) < (2, 10):
        # An allocator key that it does not know makes an older torch fail at its first use.
        return {TORCH_HOOK: cap.fraction}, f"{format_gb(cap.size)}, set when CUDA is first used"
    if not cap.version:
        return {}, ""
    given = given.strip().strip(",")
    return {_TORCH: f"{given},{_TORCH_KEY}:{cap.fraction}".lstrip(",")}, format_gb(cap.size)


def _backend_is_async(given: str) -> bool:
    return re.search(r"(^|,)\s*backend\s*:\s*cudaMallocAsync", given) is not None


def _jax(cap: _Cap) -> tuple[dict[str, str], str]:
    if cap.outer.get(_JAX_ALLOCATOR, "").lower() in ("platform", "cuda_async", "vmm"):
        return {}, f"no cap (allocator {cap.outer[_JAX_ALLOCATOR].lower()})"
    if cap.outer.get(_JAX) or cap.outer.get(_JAX_OLD):
        # Both names together raise ValueError in JAX.
        return {}, "the cap that the environment sets"
    # The name without PYTHON is younger; JAX 0.10 still reads the older one.
    name = _JAX_OLD if cap.version and _release(cap.version) < (0, 10) else _JAX
    environment = {name: cap.fraction}
    if _JAX_PREALLOCATE not in cap.outer:
        environment[_JAX_PREALLOCATE] = "false"
    return environment, format_gb(cap.size)


def _cupy(cap: _Cap) -> tuple[dict[str, str], str]:
    if cap.outer.get(_CUPY):
        return {}, "the cap that the environment sets"
    return {_CUPY: str(cap.size)}, format_gb(cap.size)


def _tensorflow(cap: _Cap) -> tuple[dict[str, str], str]:
    if not cap.version:
        return {}, ""
    return {TENSORFLOW_HOOK: str(cap.size // MB)}, f"{format_gb(cap.size)}, set when it is imported"


_RULES = {"torch": _torch, "JAX": _jax, "CuPy": _cupy, "TensorFlow": _tensorflow}


def _release(version: str) -> tuple[int, int]:
    match = re.match(r"([0-9]+)\.([0-9]+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)
