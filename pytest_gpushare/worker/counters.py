"""What the frameworks of this process count: VRAM in use, kept, and the highest of it.

Asked around every test of a GPU worker, so it must cost nothing where no framework is loaded.
It looks into `sys.modules` alone: it imports no framework, and does not initialise CUDA. What a
framework refuses to say is unknown (None), never 0.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_SLACK = 20
"""A cache below 1/20 of the peak does not blur it: allocators round by more."""


class Count(NamedTuple):
    """What one framework counts on one device, in bytes."""

    used: int
    """Held by live objects."""
    held: int
    """The same and what the framework keeps for reuse: what the device lacks."""
    peak_used: int
    """The highest `used` since the last reset; since the start where nothing resets it."""
    peak_held: int
    """The highest `held` likewise."""
    allocations: int | None = None
    """How many there were so far; None where the framework does not count them."""
    tracked: bool = True
    """Whether the framework keeps peaks itself; else they are those of this moment."""


Counts = Mapping[tuple[str, int], Count]
"""(framework, number of the visible device) -> count."""


class Measured(NamedTuple):
    """What a stretch of work, such as a test, took by the counters; bytes without CUDA contexts."""

    peaks: tuple[int, ...]
    """The highest that the process held for it, by visible device."""
    exact: bool
    """Whether that is the peak; else it was at least this much."""
    helds: tuple[int, ...]
    """What the frameworks keep now, caches included, by visible device."""
    used: int
    """What live objects hold now, on all devices."""
    grown: int
    """By how much that is more than before; negative where it is less."""
    process: int = 0
    """The highest that the whole process held on one device, caches of earlier work included."""
    process_exact: bool = False
    """Whether that is the peak; else it was at least this much."""


def counts(modules: Mapping[str, Any] = sys.modules, *, reset: bool = False) -> Counts | None:
    """What every framework that is up counts now; None where none is, or one cannot say.

    `reset` makes the peaks that follow count from here, where the framework can do that.
    """
    if not may_count(modules):
        return None
    found: dict[tuple[str, int], Count] | None = None
    for name, read in _READERS:
        module = modules.get(name)
        if module is None:
            continue
        try:
            read_now = read(module, modules, reset)
        except Exception:
            # In the middle of its import, or in an odd state: the sum is unknown.
            return None
        if read_now is not None:
            found = found or {}
            found.update({(name, at): count for at, count in enumerate(read_now)})
    return found


def may_count(modules: Mapping[str, Any] = sys.modules) -> bool:
    """Whether a framework is imported that will count once it is up."""
    return not modules.keys().isdisjoint(_FRAMEWORKS)


def measured(before: Counts | None, after: Counts) -> Measured:
    """What was taken between two readings, the first of which reset the peaks.

    A framework that was not up before had nothing then.
    """
    before = before or {}
    devices = 1 + max(at for _, at in after)
    peaks, helds, process, exact = [0] * devices, [0] * devices, [0] * devices, True
    for (name, at), now in after.items():
        peak, sure = _peak(before.get((name, at), _NOTHING), now)
        peaks[at] += peak
        helds[at] += now.held
        process[at] += max(now.peak_held, now.held, now.peak_used)
        exact = exact and sure
    used = sum(count.used for count in after.values())
    return Measured(
        tuple(peaks),
        exact,
        tuple(helds),
        used,
        used - sum(c.used for c in before.values()),
        max(process),
        # Only of a peak that was reset is it known what the process held since then.
        all(count.tracked and count.allocations is None for count in after.values()),
    )


def nothing_taken(before: Counts | None, after: Counts | None) -> bool:
    """Whether it is sure that nothing was allocated between two readings."""
    if before is None or after is None or before.keys() != after.keys():
        return False
    return all(
        # The peak was reset, so one that is no higher says that nothing was added.
        now.tracked and now.peak_used == now.used == before[at].used
        if now.allocations is None
        else now.allocations == before[at].allocations
        for at, now in after.items()
    )


def used(modules: Mapping[str, Any] = sys.modules) -> int | None:
    """Bytes that live objects hold on all devices; None where that is unknown."""
    found = counts(modules)
    return None if found is None else sum(count.used for count in found.values())


def held(modules: Mapping[str, Any] = sys.modules) -> int | None:
    """Bytes that frameworks hold on all devices, caches included; None where that is unknown."""
    found = counts(modules)
    return None if found is None else sum(count.held for count in found.values())


def _peak(before: Count, now: Count) -> tuple[int, bool]:
    """The highest held for the work itself, and whether that is sure.

    What earlier tests left in the caches is in `held` without being needed. It may have been
    reused in part, so with a large cache the figure is a lower bound.
    """
    if now.allocations is not None and now.allocations == before.allocations:
        return before.used, True
    if not now.tracked:
        highest = max(before.held, now.held)
        grown = now.held > before.held or not highest
        peak_used = max(before.used, now.used)
    elif now.allocations is not None:
        # Nothing resets its peak: only a new record says how high this work went.
        grown = now.peak_used > before.peak_used
        highest = peak_used = now.peak_used if grown else max(before.used, now.used)
    else:
        highest, peak_used, grown = now.peak_held, now.peak_used, True
    slack = before.held - before.used if now.allocations is None else 0
    peak = max(peak_used, highest - slack)
    return peak, grown and (not peak or slack <= peak // _SLACK or peak_used == highest)


_NOTHING = Count(0, 0, 0, 0)


def _torch(torch: Any, _modules: Mapping[str, Any], reset: bool) -> Sequence[Count] | None:
    cuda = torch.cuda
    if not cuda.is_initialized():
        return None
    found = []
    for device in range(cuda.device_count()):
        # One call: memory_reserved() and its kin sort a hundred figures each.
        stats = cuda.memory_stats_as_nested_dict(device)
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        found.append(
            Count(
                int(allocated["current"]),
                int(reserved["current"]),
                int(allocated["peak"]),
                int(reserved["peak"]),
            )
        )
        if reset:
            cuda.reset_peak_memory_stats(device)
    return found


def _cupy(cupy: Any, modules: Mapping[str, Any], _reset: bool) -> Sequence[Count] | None:
    if not cuda_has_context(cupy, modules):
        return None
    pool = cupy.get_default_memory_pool()
    devices = cupy.cuda.runtime.getDeviceCount()
    found = []
    for device in range(devices):
        # The pool answers for the current device; with one device there is nothing to switch.
        if devices == 1:
            in_use, kept = int(pool.used_bytes()), int(pool.total_bytes())
        else:
            with cupy.cuda.Device(device):
                in_use, kept = int(pool.used_bytes()), int(pool.total_bytes())
        found.append(Count(in_use, kept, in_use, kept, tracked=False))
    return found


def cuda_has_context(cupy: Any, modules: Mapping[str, Any] = sys.modules) -> bool:
    """Whether this thread has a CUDA context already; asking CuPy's pool would make one.

    On Windows the driver must not be asked before it is up, which torch alone knows there.
    """
    torch = modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    return sys.platform != "win32" and bool(cupy.cuda.driver.ctxGetCurrent())


def _jax(jax: Any, modules: Mapping[str, Any], _reset: bool) -> Sequence[Count] | None:
    bridge = modules.get("jax._src.xla_bridge")
    if bridge is None or not bridge.backends_are_initialized():
        return None
    found = []
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats:
            in_use = int(stats["bytes_in_use"])
            peak = int(stats.get("peak_bytes_in_use", in_use))
            # The allocator's pool grows and never shrinks; not every version reports its size.
            pool = max(in_use, int(stats.get("pool_bytes") or 0))
            found.append(Count(in_use, pool, peak, pool, int(stats["num_allocs"])))
    return found or None


_READERS: tuple[
    tuple[str, Callable[[Any, Mapping[str, Any], bool], Sequence[Count] | None]], ...
] = (("torch", _torch), ("cupy", _cupy), ("jax", _jax))
_FRAMEWORKS = [name for name, _ in _READERS]


_MOST_ERRORS = 100
"""Of one failure; chains can be long, and are not worth more."""


def empty(modules: Mapping[str, Any] = sys.modules) -> None:
    """Collect garbage, clear the frames of the last failure, empty the frameworks' caches."""
    # What pytest and Python keep for a debugger after the fact.
    for name in ("last_exc", "last_value"):
        error = getattr(sys, name, None)
        if isinstance(error, BaseException):
            clear_frames(error)
    gc.collect()
    for name, give_back in _CACHES:
        if (module := modules.get(name)) is not None:
            try:
                give_back(module, modules)
            except Exception:
                # A framework in an odd state keeps what it has; the tests go on.
                continue


def clear_frames(error: BaseException | None, kept: Collection[int] = ()) -> None:
    """Let go of what the local variables of a failure hold, its causes and members included.

    Its report must have been made: the values of variables are gone afterwards. Errors whose
    `id` is in `kept` are left as they are.
    """
    for each in errors_of(error):
        if id(each) in kept:
            continue
        step = each.__traceback__
        while step is not None:
            frame, step = step.tb_frame, step.tb_next
            # A frame that still runs, or waits to go on, keeps what it has.
            with contextlib.suppress(RuntimeError):
                frame.clear()
                # Until Python 3.12 a snapshot of the variables, made when the failure was
                # shown, outlives them until it is asked for again.
                _ = frame.f_locals


def errors_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and the members of groups; each once."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _MOST_ERRORS:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += (each.__context__, each.__cause__)
        members = getattr(each, "exceptions", ())
        if isinstance(members, tuple | list):
            waiting += (one for one in members if isinstance(one, BaseException))


def _empty_torch(torch: Any, _modules: Mapping[str, Any]) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _empty_cupy(cupy: Any, modules: Mapping[str, Any]) -> None:
    if cuda_has_context(cupy, modules):
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def _empty_jax(jax: Any, modules: Mapping[str, Any]) -> None:
    bridge = modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        # Compiled functions hold their constants on the device.
        jax.clear_caches()


_CACHES: tuple[tuple[str, Callable[[Any, Mapping[str, Any]], None]], ...] = (
    ("jax", _empty_jax),
    ("torch", _empty_torch),
    ("cupy", _empty_cupy),
)


def measured_context(device: str) -> int | None:
    """Bytes of this process's context on the device of that UUID; None where that is unknown.

    Imports no framework and does not initialise CUDA: without CUDA there is nothing to measure.
    The driver's library is opened here for a moment, in a process that has finished its tests.
    """
    found = counts() or {}
    # Without torch it is unknown whether CUDA is up, and JAX counts for itself.
    if ("torch", 0) not in found or "jax" in sys.modules:
        return None
    from pytest_gpushare.gpu.vendors import own_vram

    own = own_vram(device)
    counted = sum(count.held for (_, at), count in found.items() if at == 0)
    return own - counted if own is not None and own > counted else None
