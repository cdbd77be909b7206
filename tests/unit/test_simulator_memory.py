"""Simulated VRAM: taken, refused, given back, lost with its process."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from simulator import Device, Machine, Mig, OutOfMemoryError, to_bytes, to_text
from simulator.child import wait_for
from simulator.hardware import DeviceState
from simulator.layout import INJECTION_LIMIT, SLOT_LIMIT
from simulator.running import run, start
from simulator.visibility import visible_devices

GIB = 1 << 30
MIB = 1 << 20

HOLD = """
import gpusim, sys
held = gpusim.alloc("{size}")
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def hold(machine: Machine, size: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds *size* until it is told, or killed."""
    with start(machine, HOLD.format(size=size)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine.create(tmp_path / "state", [Device(), Device("16GB", used=0)])


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [(5, 5), ("24GB", 24 * GIB), ("600MB", 600 * MIB), ("11.2 GiB", 12025908428), ("7", 7)],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    """GB is GiB, MB is MiB, and fractions are exact."""
    assert to_bytes(size) == nbytes


@pytest.mark.parametrize("size", [-1, "-1GB", "1.GB", "GB", "1 PB", "1e9", ""])
def test_sizes_that_are_none(size: int | str) -> None:
    """Anything else is refused, not guessed at."""
    with pytest.raises(ValueError, match="size"):
        to_bytes(size)


def test_sizes_as_torch_writes_them() -> None:
    """Messages are searched for by people who know torch's."""
    texts = [to_text(n) for n in (4 * GIB, 1536 * MIB, 20 * MIB, 1 << 10, 3)]
    assert texts == ["4.00 GiB", "1.50 GiB", "20.00 MiB", "1.00 KiB", "3 bytes"]


def test_the_first_allocation_takes_the_context(machine: Machine) -> None:
    """It stays when the allocation goes, and is taken once per device."""
    handle = machine.allocate(0, "4GB")
    other = machine.allocate(0, "1GB")
    assert machine.snapshot()[0].used == 7 * GIB + 600 * MIB
    assert machine.snapshot()[0].processes == ((os.getpid(), 5 * GIB + 600 * MIB),)
    machine.release(handle)
    machine.release(other)
    machine.release(other)  # a second time does nothing
    state = machine.snapshot()[0]
    assert (state.used, state.free) == (2 * GIB + 600 * MIB, 22 * GIB - 600 * MIB)
    assert state.peak_used == 7 * GIB + 600 * MIB


def test_what_does_not_fit_is_refused(machine: Machine) -> None:
    """With torch's words, and nothing changed but a counter."""
    machine.set_used(0, "22.8GB")
    message = (
        "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 0 has a total capacity of 24.00 GiB"
        " of which 1.20 GiB is free."
    )
    with pytest.raises(OutOfMemoryError) as caught:
        machine.allocate(0, "4GB")
    assert str(caught.value) == message
    state = machine.snapshot()[0]
    assert (state.used, state.oom_count, state.processes) == (to_bytes("22.8GB"), 1, ())
    with pytest.raises(OutOfMemoryError):
        machine.set_used(0, "25GB")


def test_the_context_must_fit_too(machine: Machine) -> None:
    """The last byte can be had, and not one more."""
    with pytest.raises(OutOfMemoryError):
        machine.allocate(1, 16 * GIB - 600 * MIB + 1)
    machine.allocate(1, 16 * GIB - 600 * MIB)
    assert machine.snapshot()[1].free == 0


def test_foreign_use_and_the_drivers_share(tmp_path: Path) -> None:
    """Both take from what is free; only the first counts as used."""
    machine = Machine.create(tmp_path / "state", [Device("10GB", used="1GB", reserved="1GB")])
    machine.set_used(0, "3GB")
    state = machine.snapshot()[0]
    assert [state.used >> 30, state.free >> 30, state.reserved >> 30] == [3, 6, 1]


def test_the_dead_lose_everything(machine: Machine) -> None:
    """Context and all, as soon as anybody looks; a zombie is dead."""
    with hold(machine, "3GB") as process:
        assert machine.snapshot()[0].processes == ((process.pid, 3 * GIB + 600 * MIB),)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
        assert machine.snapshot()[0].used == 2 * GIB
        process.communicate(timeout=30)


def test_nvml_frees_what_the_dead_held(machine: Machine) -> None:
    """The C library does so too, with no Python near."""
    with hold(machine, "3GB") as process:
        process.communicate("\n", timeout=30)
    code = (
        "import json, pynvml as n; n.nvmlInit(); d = n.nvmlDeviceGetHandleByIndex(0);"
        "print(json.dumps([n.nvmlDeviceGetMemoryInfo(d).used,"
        " len(n.nvmlDeviceGetComputeRunningProcesses(d))]))"
    )
    assert run(machine, code) == [2 * GIB, 0]


def test_vram_may_come_back_late(tmp_path: Path) -> None:
    """For a while it is used, and nobody's."""
    machine = Machine.create(tmp_path / "state", [Device(used=0)], late_free=0.2)
    with hold(machine, "3GB") as process:
        process.communicate("\n", timeout=30)
    state = machine.snapshot()[0]
    assert (state.used, state.processes) == (3 * GIB + 600 * MIB, ())
    wait_for(lambda: machine.snapshot()[0].used == 0)


def test_races_never_exceed_the_total(tmp_path: Path) -> None:
    """Eight processes take and give at random; some are killed in the middle."""
    machine = Machine.create(tmp_path / "state", [Device("4GB", used=0)], context="100MB")
    code = """
import gpusim, json, random, sys
print("ready", flush=True)
sys.stdin.readline()
held, refused = [], 0
for _ in range(150):
    try:
        held.append(gpusim.alloc(f"{random.randint(1, 900)}MB"))
    except gpusim.OutOfMemoryError:
        refused += 1
        held[:random.randint(0, len(held))] = []
print(refused)
"""
    with ExitStack() as stack:
        processes = [stack.enter_context(start(machine, code)) for _ in range(8)]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        time.sleep(random.uniform(0.005, 0.05))
        for process in processes[:2]:
            process.send_signal(signal.SIGKILL)
        refused = [int(process.communicate(timeout=60)[0] or 0) for process in processes]
    state = machine.snapshot()[0]
    assert state.used == 0
    assert 3 * GIB < state.peak_used <= 4 * GIB
    assert state.oom_count >= sum(refused) > 0


def test_capacity(tmp_path: Path) -> None:
    """4096 allocations fit, and cost little; devices and injections have a limit too."""
    machine = Machine.create(tmp_path / "state", [Device(used=0)], context=0)
    handles = [machine.allocate(0, MIB) for _ in range(200)]
    machine.release(handles[3])
    assert machine.snapshot()[0].used == 199 * MIB
    machine.allocate(0, MIB)
    machine._store.state.slot_count = SLOT_LIMIT  # as if all had been in use once
    for index in range(SLOT_LIMIT):
        slot = machine._store.state.slots[index]
        slot.state, slot.pid = 1, os.getpid()
        slot.started = machine._store.state.slots[0].started
    with pytest.raises(RuntimeError, match="at most 4096"):
        machine.allocate(0, 1)
    with pytest.raises(ValueError, match="at most 32"):
        Machine.create(tmp_path / "other", [Device()] * 33)
    with pytest.raises(RuntimeError, match="at most 64"):
        for _ in range(INJECTION_LIMIT + 1):
            machine.inject("nvmlInit", code=9)


def test_mistakes_are_refused(tmp_path: Path, machine: Machine) -> None:
    """In the description of a machine, and in its use."""
    path = tmp_path / "other"
    with pytest.raises(ValueError, match="more than its total"):
        Machine.create(path, [Device("1GB", used="2GB")])
    with pytest.raises(ValueError, match="same UUID"):
        Machine.create(path, [Device(uuid="GPU-a"), Device(uuid="GPU-a")])
    with pytest.raises(ValueError, match="same index"):
        Machine.create(path, [Device(mig=(Mig("1GB"), Mig("1GB", index=0)))])
    with pytest.raises(ValueError, match="no device 2; the machine has 2"):
        machine.allocate(2, 1)
    with pytest.raises(ValueError, match="no device 'GPU-x'"):
        machine.allocate("GPU-x", 1)
    with pytest.raises(ProcessLookupError):
        machine.allocate(0, 1, pid=2**22 + 1)
    with pytest.raises(ValueError, match="MIG mode"):
        Machine.create(path, [Device(mig=(Mig(),))]).allocate(0, 1)
    path.write_bytes(b"not a state")
    with pytest.raises(ValueError, match="no simulator state"):
        Machine.open(path)


def test_garbage_collection_in_the_middle_of_a_call(machine: Machine) -> None:
    """A finalizer that runs while the lock is held waits for its turn, not for ever."""
    handle = machine.allocate(0, "1GB")
    twin = Machine.open(machine.path)
    with machine._store.locked():
        twin.release(handle)
    assert machine.snapshot()[0].processes == ((os.getpid(), 600 * MIB),)


# --- gpusim ---


def test_gpusim(machine: Machine) -> None:
    """Freed by hand, by a with block, and by the garbage collector."""
    code = """
import gc, gpusim, json
def free(): return gpusim.mem_get_info()[0] >> 20
seen = [free()]
with gpusim.alloc("4GB"):
    seen.append(free())
seen.append(free())
a = gpusim.alloc("1GB"); a.free(); a.free()
seen.append(free())
b = gpusim.alloc("2GB"); del b; gc.collect()
seen.append(free())
try:
    gpusim.alloc("40GB")
except RuntimeError as error:
    seen.append([type(error).__name__, str(error)[:46]])
kept = gpusim.alloc("1GB")  # for the interpreter's end to deal with
print(json.dumps([seen, gpusim.available(), gpusim.device(), gpusim.device_count()]))
"""
    after = 22 * 1024 - 600
    oom = ["OutOfMemoryError", "CUDA out of memory. Tried to allocate 40.00 Gi"]
    seen = [22 * 1024, after - 4096, after, after, after, oom]
    uuid = "GPU-00000000-0000-0000-0000-000000000000"
    assert run(machine, code) == [seen, True, uuid, 2]
    assert machine.snapshot()[0].used == 2 * GIB


def test_gpusim_without_a_device(machine: Machine) -> None:
    """The message is CUDA's; the variable is read once."""
    code = """
import gpusim, json, os
answer = [gpusim.available()]
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
try:
    gpusim.alloc(1)
except gpusim.NoGpuError as error:
    answer.append(str(error))
print(json.dumps(answer))
"""
    answer = [False, "no CUDA-capable device is detected"]
    assert run(machine, code, env={"CUDA_VISIBLE_DEVICES": ""}) == answer


def test_a_forked_child_owns_nothing(machine: Machine) -> None:
    """It does not free what its parent holds, and pays for its own context."""
    code = """
import gpusim, json, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
a = gpusim.alloc("2GB")
pid = os.fork()
if pid == 0:
    a.free()
    gpusim.alloc("1GB")
    with open("/proc/self/fd/1", "w"): pass
    sys.exit(0)
os.waitpid(pid, 0)
print(json.dumps(gpusim.mem_get_info()[0] >> 20))
"""
    assert run(machine, code) == 20 * 1024 - 600
    assert machine.snapshot()[0].peak_used == (5 * 1024 + 1200) * MIB


GPUS = [
    Device("16GB", uuid="GPU-aaaa1111"),
    Device("24GB", uuid="GPU-aabb2222"),
    Device("40GB", uuid="GPU-cc", capability=(8, 0), mig=(Mig(uuid="MIG-1"), Mig(uuid="MIG-2"))),
]


@pytest.fixture
def devices(tmp_path: Path) -> list[DeviceState]:
    return Machine.create(tmp_path / "state", GPUS).snapshot()


@pytest.mark.parametrize(
    ("value", "order", "expected"),
    [
        (None, "PCI_BUS_ID", ["GPU-aaaa1111", "GPU-aabb2222"]),
        # By default CUDA puts the fastest first.
        (None, None, ["GPU-aabb2222", "GPU-aaaa1111"]),
        ("0", None, ["GPU-aabb2222"]),
        ("1, 0", "PCI_BUS_ID", ["GPU-aabb2222", "GPU-aaaa1111"]),
        ("", None, []),
        ("-1", None, []),
        ("1,7,0", "PCI_BUS_ID", ["GPU-aabb2222"]),
        ("nonsense,0", None, []),
        ("0,0", None, []),
        ("GPU-aabb2222", None, ["GPU-aabb2222"]),
        ("GPU-aab", None, ["GPU-aabb2222"]),
        ("GPU-aa", None, []),
        ("GPU-", None, []),
        ("MIG-2", None, ["MIG-2"]),
        ("MIG-", None, []),
        ("MIG-2,MIG-1", None, ["MIG-2"]),
        ("GPU-cc", None, ["MIG-1"]),
        ("2,0", "PCI_BUS_ID", ["MIG-1"]),
    ],
)
def test_visible_devices(
    devices: list[DeviceState], value: str | None, order: str | None, expected: list[str]
) -> None:
    """CUDA_VISIBLE_DEVICES in all its forms."""
    environ = {"CUDA_VISIBLE_DEVICES": value, "CUDA_DEVICE_ORDER": order}
    given = {name: text for name, text in environ.items() if text is not None}
    assert visible_devices(devices, given) == expected


def test_env_composes_with_what_is_there(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search paths that the user has set stay in force, after ours."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setenv("PYTHONPATH", "/opt/python")
    env = machine.env(tmp_path)
    assert env["LD_LIBRARY_PATH"] == f"{tmp_path}:/opt/lib"
    assert env["PYTHONPATH"].endswith(":/opt/python")
    code = "import json, gpusim, simulator; print(json.dumps(gpusim.__name__))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert json.loads(done.stdout) == "gpusim"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Machines hold no descriptor between calls; collected, they hold no mapping."""
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in range(5):
        machine = Machine.create(tmp_path / f"state{index}", [Device()])
        machine.allocate(0, "1GB")
    del machine
    gc.collect()
    # mmap duplicates the descriptor of the file for as long as the mapping lives.
    assert len(list(Path("/proc/self/fd").iterdir())) == before
