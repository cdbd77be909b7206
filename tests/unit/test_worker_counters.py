"""The frameworks' counters: each, together, and what cannot be told."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.units import GB, MB
from pytest_gpushare.worker.counters import Count, counts, held, measured, used


class Torch:
    """torch.cuda as far as it counts."""

    def __init__(self, *, up: bool = True, devices: int = 1) -> None:
        self.up, self.devices = up, devices
        self.figures = [[0, 0, 0, 0] for _ in range(devices)]
        self.cuda = self

    def is_initialized(self) -> bool:
        return self.up

    def device_count(self) -> int:
        return self.devices

    def memory_stats_as_nested_dict(self, device: int) -> dict[str, Any]:
        used, reserved, peak_used, peak_reserved = self.figures[device]
        return {
            "allocated_bytes": {"all": {"current": used, "peak": peak_used}},
            "reserved_bytes": {"all": {"current": reserved, "peak": peak_reserved}},
        }

    def reset_peak_memory_stats(self, device: int) -> None:
        self.figures[device][2:] = self.figures[device][:2]


class Cupy:
    """CuPy's pool and driver."""

    def __init__(self, *, context: int = 1) -> None:
        self.used = self.total = 0
        self.asked = False
        self.cuda = SimpleNamespace(
            driver=SimpleNamespace(ctxGetCurrent=lambda: context),
            runtime=SimpleNamespace(getDeviceCount=lambda: 1),
        )

    def get_default_memory_pool(self) -> Any:
        self.asked = True
        return SimpleNamespace(used_bytes=lambda: self.used, total_bytes=lambda: self.total)


class Jax:
    """JAX's devices; its peaks can be reset by nobody."""

    def __init__(self, platform: str = "gpu") -> None:
        self.stats: dict[str, int] | None = {"bytes_in_use": 0, "num_allocs": 0}
        self.platform = platform

    def local_devices(self) -> list[Any]:
        return [SimpleNamespace(platform=self.platform, memory_stats=lambda: self.stats)]


def modules(**found: Any) -> dict[str, Any]:
    bridge = SimpleNamespace(backends_are_initialized=lambda: True)
    return {**found, **({"jax._src.xla_bridge": bridge} if "jax" in found else {})}


def test_nothing_is_loaded() -> None:
    assert counts({}) is None
    assert (used({}), held({})) == (None, None)
    assert "torch" not in sys.modules


def test_torch_that_has_no_cuda_yet_is_not_asked() -> None:
    assert counts({"torch": Torch(up=False)}) is None


def test_torch_from_nothing() -> None:
    """The first test: all that was reserved was for it."""
    torch = Torch()
    torch.figures[0] = [1 * GB, 2 * GB, 3 * GB, 4 * GB]
    found = measured(None, counts({"torch": torch}))
    assert found is not None
    assert (found.peaks, found.exact, found.helds) == ((4 * GB,), True, (2 * GB,))
    assert (found.used, found.grown) == (1 * GB, 1 * GB)


def test_torch_is_reset_before_each_test() -> None:
    torch = Torch()
    torch.figures[0] = [0, 0, 9 * GB, 9 * GB]
    before = counts({"torch": torch}, reset=True)
    found = measured(before, counts({"torch": torch}))
    assert found is not None
    assert (found.peaks, found.exact) == ((0,), True)


@pytest.mark.parametrize(
    ("peak_used", "peak_held", "peak", "exact"),
    [
        (1 * GB, 6 * GB, 1 * GB, False),  # served from the cache that was there
        (7 * GB, 13 * GB, 7 * GB, False),  # none of the cache could be used
        (13 * GB, 13 * GB, 13 * GB, True),  # all of it was
    ],
)
def test_what_earlier_tests_left_in_the_cache(
    peak_used: int, peak_held: int, peak: int, exact: bool
) -> None:
    """6 GB lie in the cache before the test: they are not its need."""
    before = {("torch", 0): Count(0, 6 * GB, 6 * GB, 6 * GB)}
    after = {("torch", 0): Count(0, peak_held, peak_used, peak_held)}
    found = measured(before, after)
    assert found is not None
    assert (found.peaks, found.exact) == ((peak,), exact)


def test_cupy_has_no_peaks_but_a_pool_that_grows() -> None:
    cupy = Cupy()
    found = {"cupy": cupy}
    cupy.used, cupy.total = 0, 2 * GB
    grown = measured({("cupy", 0): Count(0, 0, 0, 0, tracked=False)}, counts(found))
    assert grown is not None
    assert (grown.peaks, grown.exact) == ((2 * GB,), True)
    # Nothing grew: what was used in between nobody knows.
    same = measured(counts(found), counts(found))
    assert same is not None
    assert (same.peaks, same.exact, same.helds) == ((0,), False, (2 * GB,))


def test_cupy_without_a_context_is_not_asked() -> None:
    """Its pool would make one."""
    cupy = Cupy(context=0)
    assert counts({"cupy": cupy}) is None
    assert not cupy.asked
    # torch tells that CUDA is up, on every system.
    assert counts({"cupy": cupy, "torch": Torch()}) is not None


def test_jax_keeps_its_highest_peak() -> None:
    """Only a test that breaks the record tells its peak; one that allocates nothing has none."""
    jax = Jax()
    loaded = modules(jax=jax)

    def after(**stats: int) -> tuple[int, bool]:
        before = counts(loaded)
        jax.stats = {**(jax.stats or {}), **stats}
        found = measured(before, counts(loaded))
        assert found is not None
        return found.peaks[0], found.exact

    assert after(num_allocs=1, bytes_in_use=0, peak_bytes_in_use=3 * GB) == (3 * GB, True)
    assert after(num_allocs=2, bytes_in_use=1 * GB) == (1 * GB, False)
    assert after() == (1 * GB, True)
    assert after(num_allocs=3, peak_bytes_in_use=5 * GB) == (5 * GB, True)
    jax.stats = {**(jax.stats or {}), "pool_bytes": 6 * GB}
    assert held(loaded) == 6 * GB


def test_jax_on_the_cpu_says_nothing() -> None:
    assert counts(modules(jax=Jax("cpu"))) is None
    assert counts({"jax": Jax()}) is None


def test_several_devices_and_frameworks_add_up() -> None:
    torch, cupy = Torch(devices=2), Cupy()
    torch.figures = [[1 * MB, 2 * MB, 3 * MB, 4 * MB], [0, 20 * MB, 30 * MB, 40 * MB]]
    cupy.used, cupy.total = 100 * MB, 200 * MB
    found = measured(None, counts({"torch": torch, "cupy": cupy}))
    assert found is not None
    assert found.peaks == (204 * MB, 40 * MB)
    assert found.helds == (202 * MB, 20 * MB)
    assert held({"torch": torch, "cupy": cupy}) == 222 * MB


@pytest.mark.parametrize("broken", [object(), SimpleNamespace(cuda=None)])
def test_a_framework_in_an_odd_state_makes_it_unknown(broken: object) -> None:
    """As in the middle of its import; unknown is not 0."""
    assert counts({"torch": broken, "cupy": Cupy()}) is None
