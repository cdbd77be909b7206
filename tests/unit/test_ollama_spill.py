"""Why a part of a model landed on the CPU, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.spill import Cause, Promise, Setting, Spill, judge, spilled, why
from pytest_gpushare.ollama.spill import held_by as in_words
from pytest_gpushare.units import GB, MB

MODEL = LoadedModel("m:14b", 10 * GB, 6 * GB, "d", 4096)
RESERVATION = 12 * GB


def device(
    tests: Mapping[str, float] | None = None, others: float = 2, ollama: float = 0, total: int = 24
) -> DeviceUsage:
    """24 GB of VRAM and who holds how many GB of them; `tests` None: the driver does not tell."""
    used = int((others + ollama + sum((tests or {}).values())) * GB)
    by_worker = {worker: int(size * GB) for worker, size in (tests or {}).items()}
    return DeviceUsage(total * GB, used, total * GB - used, {"Ollama": int(ollama * GB)}, by_worker)


def untold(held: DeviceUsage) -> DeviceUsage:
    return held._replace(workers=None)


def promise(
    reservation: int = RESERVATION, start: DeviceUsage | None = None, needed: int = 3 * GB
) -> Promise:
    """The plan's own arithmetic for a device with 22 GB free."""
    start = device()
    budget = max(0, start.free - max(0, reservation - start.of("Ollama")) - GB)
    return Promise({"GPU-0": start}, {"GPU-0": budget}, reservation, GB, 3 * GB)


def judged(
    *looks: DeviceUsage,
    model: LoadedModel = MODEL,
    kept: Promise | None = None,
    beside: tuple[LoadedModel, ...] = (),
) -> Spill:
    return judge(3.0, model, beside, [{"GPU-0": look} for look in looks], kept or promise())


def reason(spill: Spill, kept: Promise | None = None) -> str:
    kept = kept or promise()
    return why(spill, kept.reservation, sum(kept.budgets.values()))


def test_reservation_too_small() -> None:
    """The tests kept to their 17 GB; the model needs 10 + 0.5 + 1 GB, rounded up to 500 MB."""
    kept = promise(4 * GB)
    full = device({"gw0": 7, "gw1": 7})
    spill = judged(
        device(), full, full._replace(neighbours={"Ollama": 6 * GB}, free=2 * GB), kept=kept
    )
    assert (spill.cause, spill.is_ours) == (Cause.RESERVATION, True)
    assert spill.setting == Setting("ollama_vram_reservation_mb", "12000")
    assert spilled(spill) == (
        "Ollama put 4.0 GB of m:14b (10.0 GB) on the CPU; VRAM then: tests 14.0 GB "
        "(gw0 7.0 GB, gw1 7.0 GB), others 2.0 GB, 2.0 GB free"
    )
    assert reason(spill, kept) == (
        "the reservation of 4.0 GB was too small: gpu_share_ollama_vram_reservation_mb = 12000 "
        "would have kept it on the GPU"
    )


def test_tests_held_more_than_they_had() -> None:
    """14 GB in place of 9: slots as large as the largest worker was would have done."""
    spill = judged(device({"gw0": 8, "gw1": 6.2}))
    assert (spill.cause, spill.is_ours) == (Cause.TESTS, True)
    assert spill.setting == Setting("min_vram_per_worker_gb", "8")
    assert reason(spill) == (
        "the tests held 5.2 GB more than the 9.0 GB of VRAM that they had: "
        "gpu_share_min_vram_per_worker_gb = 8 would have kept it on the GPU"
    )


def test_one_test_larger_than_the_budget() -> None:
    """No GPU worker would be left; that is said, too."""
    spill = judged(device({"gw0": 14.1}))
    assert spill.setting == Setting("min_vram_per_worker_gb", "14.5", is_without_workers=True)
    assert reason(spill).endswith(
        "would have kept it on the GPU, without any GPU worker next to it"
    )


def test_other_processes() -> None:
    """The tests kept to their 9 GB, somebody else took 5 GB after the start."""
    spill = judged(device({"gw0": 4, "gw1": 4}, others=7))
    assert (spill.cause, spill.is_ours) == (Cause.OTHERS, False)
    assert reason(spill) == (
        "other processes took 5.0 GB of VRAM after the start: "
        "gpu_share_ollama_vram_reservation_mb = 17000 would have kept it on the GPU"
    )


def test_others_took_nearly_all() -> None:
    """No reservation helps against that."""
    spill = judged(device({}, others=16))
    assert (spill.cause, spill.is_ours) == (Cause.OTHERS, False)
    assert reason(spill) == (
        "other processes took 14.0 GB of VRAM after the start: end them before the tests"
    )


def test_driver_does_not_tell() -> None:
    """Under WSL 2 tests and others cannot be told apart: in doubt the run answers."""
    spill = judged(untold(device(others=16.5)))
    assert (spill.cause, spill.is_ours) == (Cause.DOUBT, True)
    assert reason(spill) == (
        "tests or other processes held 5.5 GB more than the 9.0 GB of VRAM that the tests had; "
        "the driver does not report which: gpu_share_ollama_vram_reservation_mb = 17500 would have "
        "kept it on the GPU"
    )
    assert in_words(spill).endswith(
        "7.5 GB free; the driver does not report which processes held the rest"
    )
    kept = promise(4 * GB)
    spill = judged(untold(device(others=16.5)), kept=kept)
    assert (spill.cause, spill.is_ours) == (Cause.RESERVATION, True)


def test_too_large_for_the_device() -> None:
    """Even without any test it would not have fitted."""
    large = LoadedModel("m:70b", 40 * GB, 20 * GB)
    spill = judged(device({"gw0": 1}), model=large)
    assert (spill.cause, spill.is_ours) == (Cause.SIZE, False)
    assert reason(spill) == (
        "no setting would have kept it on the GPU: it needs 41.5 GB, and 22.0 GB of VRAM are "
        "there for it and the tests"
    )


def test_num_gpu() -> None:
    """Nobody held the VRAM, and still a part of it is on the CPU."""
    spill = judged(device({"gw0": 0.6}), device({"gw0": 0.6}, ollama=6.5))
    assert (spill.cause, spill.is_ours) == (Cause.OPTIONS, False)
    assert reason(spill) == (
        "whenever VRAM was looked at, there was room for all of it on the GPU: a request set "
        "num_gpu, the server's own settings limit it, or another process held VRAM for a moment"
    )


def test_nvml_tells_nothing() -> None:
    spill = judge(3.0, MODEL, (), [{}], promise())
    assert (spill.cause, spill.is_ours) == (Cause.UNKNOWN, False)
    assert in_words(spill) == "who held VRAM then is unknown"
    assert reason(spill) == "NVML gave no reading at that time, so the cause is unknown"


def test_held_for_a_moment() -> None:
    """What was held between two looks, at least, follows from how much Ollama found free."""
    kept = promise(4 * GB)
    near = device({"gw0": 5, "gw1": 5})._replace(workers=None)
    # Seen a moment later, when one of the tests was over; 7.5 GB were free at the load.
    spill = judged(device({"gw0": 3}), near._replace(used=int(16.4 * GB)), kept=kept)
    assert (spill.cause, spill.tests) == (Cause.RESERVATION, 13 * GB)


def test_beside_another_model() -> None:
    """Ollama takes no more than 80 % of what is free, and the other one keeps its place."""
    other = LoadedModel("n:7b", 4 * GB, 4 * GB)
    kept = promise(8 * GB)
    spill = judged(device({"gw0": 6, "gw1": 6}, ollama=11), kept=kept, beside=(other,))
    # max(10.5 + 1, 10.5 / 0.8) + 4.5 = 17.625 GB
    assert spill.setting == Setting("ollama_vram_reservation_mb", "18500", is_without_workers=True)


def test_the_default_suffices_for_the_seed() -> None:
    """10.8 GB need 12.3 with margin and context: 12 GB and the safety buffer hold them."""
    model = LoadedModel("qwen2.5:14b", int(10.8 * GB), int(10.2 * GB))
    spill = judged(device({"gw0": 4.5, "gw1": 4.5}), model=model)
    assert spill.cause is Cause.RESERVATION
    # What cannot be explained goes on top of the reservation that was there.
    assert spill.setting is not None
    assert int(spill.setting.value) * MB >= RESERVATION + spill.missing


def test_two_devices() -> None:
    """Where Ollama may choose it takes no more than 80 % of what is free on one."""
    start = {"GPU-0": device(), "GPU-1": device()}
    kept = Promise(start, dict.fromkeys(start, 17 * GB), 4 * GB, GB, 3 * GB)
    look = {"GPU-0": device({"gw0": 8, "gw2": 9}), "GPU-1": device({"gw1": 8, "gw3": 9})}
    spill = judge(3.0, MODEL, (), [start, look], kept)
    assert (spill.cause, spill.tests) == (Cause.RESERVATION, 34 * GB)
    # 10.5 / 0.8 = 13.125 GB
    assert spill.setting == Setting("ollama_vram_reservation_mb", "13500")


@pytest.mark.parametrize("size", [1, 10, 39])
def test_zero_on_the_gpu(size: int) -> None:
    """A model without any VRAM is judged like the others."""
    model = LoadedModel("m", size * GB, 0)
    spill = judged(device({"gw0": 21.5}), model=model, kept=promise(0))
    assert spill.missing == size * GB
    assert spill.cause is (Cause.SIZE if size > 20 else Cause.RESERVATION)
