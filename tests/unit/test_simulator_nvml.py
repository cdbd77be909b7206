"""The simulated NVML, as the real pynvml sees it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine, Mig, build
from simulator.build import CompilerMissingError, exported_functions
from simulator.running import run, start

GIB = 1 << 30
MIB = 1 << 20

PRELUDE = """
import json, sys, time
import pynvml as n
def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except n.NVMLError as error:
        return error.value
    return 0
"""

INITIALISED = PRELUDE + "n.nvmlInit()\nd = n.nvmlDeviceGetHandleByIndex(0)\n"


def ask(machine: Machine, expression: str, **options: Any) -> Any:
    """Evaluate *expression* where `n` is an initialised pynvml and `d` its first device."""
    return run(machine, f"{INITIALISED}print(json.dumps({expression}))", **options)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine.create(tmp_path / "state", [Device(reserved="400MB"), Device(total="16GB")])


def test_pynvml_reads_devices_and_memory(machine: Machine) -> None:
    """Names, UUIDs, PCI addresses and both versions of memory info arrive as written."""
    answer = run(
        machine,
        INITIALISED
        + """
v1, v2 = n.nvmlDeviceGetMemoryInfo(d), n.nvmlDeviceGetMemoryInfo(d, version=n.nvmlMemory_v2)
pci = n.nvmlDeviceGetPciInfo(d)
print(json.dumps({
    "count": n.nvmlDeviceGetCount(),
    "name": n.nvmlDeviceGetName(d),
    "uuid": n.nvmlDeviceGetUUID(d),
    "v1": [v1.total, v1.used, v1.free],
    "v2": [v2.total, v2.reserved, v2.used, v2.free],
    "pci": [pci.busId, pci.busIdLegacy, pci.bus],
    "by_pci": n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByPciBusId(b"0000:02:00.0")),
    "driver": n.nvmlSystemGetDriverVersion(),
    "nvml": n.nvmlSystemGetNVMLVersion(),
    "cuda": n.nvmlSystemGetCudaDriverVersion_v2(),
    "capability": n.nvmlDeviceGetCudaComputeCapability(d),
    "mode": n.nvmlDeviceGetComputeMode(d),
    "minor": n.nvmlDeviceGetMinorNumber(d),
    "load": n.nvmlDeviceGetUtilizationRates(d).gpu,
}))""",
    )
    used, reserved = 2 * GIB, 400 * MIB
    assert answer == {
        "count": 2,
        "name": "NVIDIA GeForce RTX 3090 Ti",
        "uuid": "GPU-00000000-0000-0000-0000-000000000000",
        # In version 1 the driver's own share counts as used, in version 2 it does not.
        "v1": [24 * GIB, used + reserved, 24 * GIB - used - reserved],
        "v2": [24 * GIB, reserved, used, 24 * GIB - used - reserved],
        "pci": ["00000000:01:00.0", "0000:01:00.0", 1],
        "by_pci": 1,
        "driver": "580.95.05",
        "nvml": "13.580.95.05",
        "cuda": 13000,
        "capability": [8, 6],
        "mode": 0,
        "minor": 0,
        "load": 0,
    }


def test_process_lists(machine: Machine) -> None:
    """A process is listed with its VRAM and its context, and can be named."""
    machine.allocate(0, "3GB")
    listed = ask(
        machine,
        "[[p.pid, p.usedGpuMemory, n.nvmlSystemGetProcessName(p.pid)]"
        " for p in n.nvmlDeviceGetComputeRunningProcesses(d)]"
        " + n.nvmlDeviceGetGraphicsRunningProcesses(d)",
    )
    name = Path(f"/proc/{os.getpid()}/cmdline").read_bytes().split(b"\0")[0].decode()
    assert listed == [[os.getpid(), 3 * GIB + 600 * MIB, name]]


def test_process_list_protocol(machine: Machine) -> None:
    """The count is answered with error 7 where there is no room, 0 where there is nothing."""
    machine.allocate(0, "3GB")
    answer = run(
        machine,
        INITIALISED
        + """
from ctypes import byref, c_uint
def probe(index, count, array):
    count = c_uint(count)
    fn = n.nvmlLib.nvmlDeviceGetComputeRunningProcesses_v3
    return [fn(n.nvmlDeviceGetHandleByIndex(index), byref(count), array), count.value]
print(json.dumps([probe(0, 0, None), probe(1, 0, None), probe(0, 3, None)]))""",
    )
    assert answer == [[7, 1], [0, 0], [2, 3]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("normal", GIB + 600 * MIB), ("hidden-memory", None), ("zero-memory", 0)],
)
def test_process_memory_may_be_unknown(tmp_path: Path, mode: Any, expected: int | None) -> None:
    """WDDM hides the bytes of a process, some containers say 0; PIDs may be the host's."""
    machine = Machine.create(tmp_path / "state", [Device(processes=mode, pid_offset=1000)])
    machine.allocate(0, "1GB")
    listed = ask(
        machine, "[[p.pid, p.usedGpuMemory] for p in n.nvmlDeviceGetComputeRunningProcesses(d)]"
    )
    assert listed == [[os.getpid() + 1000, expected]]


@pytest.mark.parametrize(
    ("device", "call", "code"),
    [
        (Device(processes="none"), "error_of(n.nvmlDeviceGetComputeRunningProcesses, d)", 3),
        (Device(memory="unsupported"), "error_of(n.nvmlDeviceGetMemoryInfo, d)", 3),
        (Device(memory="zero"), "n.nvmlDeviceGetMemoryInfo(d).total", 0),
        (Device(), "error_of(n.nvmlDeviceGetHandleByIndex, 1)", 2),
        (Device(), "error_of(n.nvmlDeviceGetHandleByUUID, 'GPU-0000')", 6),
        (Device(), "error_of(n.nvmlDeviceGetHandleByPciBusId, b'0000:09:00.0')", 6),
        (Device(), "error_of(n.nvmlDeviceGetMigMode, d)", 3),
        (Device(capability=(9, 0)), "n.nvmlDeviceGetMigMode(d)[0]", 0),
        (Device(), "error_of(n.nvmlSystemGetProcessName, 2**22 + 1)", 6),
        (Device(), "error_of(n.nvmlDeviceGetMemoryInfo, d, version=5)", 25),
    ],
)
def test_refusals(tmp_path: Path, device: Device, call: str, code: int) -> None:
    """What NVML cannot say it refuses with the code of the real one."""
    assert ask(Machine.create(tmp_path / "state", [device]), call) == code


def test_initialisation_is_counted(machine: Machine) -> None:
    """Two inits need two shutdowns; before and after, everything is uninitialised."""
    answer = run(
        machine,
        PRELUDE
        + """
n._LoadNvmlLibrary()
codes = [error_of(n.nvmlDeviceGetCount), error_of(n.nvmlShutdown)]
n.nvmlInit(); n.nvmlInit(); n.nvmlShutdown()
codes.append(error_of(n.nvmlDeviceGetCount))
n.nvmlShutdown()
codes.append(error_of(n.nvmlDeviceGetCount))
print(json.dumps([*codes, str(n.NVMLError(1))]))""",
    )
    assert answer == [1, 1, 0, 1, "Uninitialized"]


def test_no_machine_means_no_driver(machine: Machine) -> None:
    """Without a state file initialisation fails with DRIVER_NOT_LOADED."""
    call = PRELUDE + "print(error_of(n.nvmlInit))"
    assert run(machine, call, env={"GPUSHARE_SIM_STATE": ""}) == 9
    assert run(machine, call, env={"GPUSHARE_SIM_STATE": "/nowhere"}) == 9


def test_errors_can_be_injected(machine: Machine) -> None:
    """For one device, for some calls, for all functions that begin alike."""
    memory = "nvmlDeviceGetMemoryInfo"
    machine.inject(memory, code=15, device=1)
    machine.inject("nvmlDeviceGetName", code=999, first=1, count=2)
    machine.inject("nvmlSystem*", code=4)
    answer = ask(
        machine,
        f"[[error_of(n.{memory}, n.nvmlDeviceGetHandleByIndex(i)) for i in (0, 1)],"
        " [error_of(n.nvmlDeviceGetName, d) for _ in range(5)],"
        " [error_of(n.nvmlSystemGetDriverVersion), error_of(n.nvmlSystemGetNVMLVersion)]]",
    )
    assert answer == [[0, 15], [0, 999, 999, 0, 0], [4, 4]]
    machine.clear_injections()
    assert ask(machine, "error_of(n.nvmlSystemGetDriverVersion)") == 0


def test_initialisation_can_fail(machine: Machine) -> None:
    """As after a driver update: the library and the kernel module do not match."""
    machine.inject("nvmlInitWithFlags", code=18)
    assert run(machine, PRELUDE + "print(error_of(n.nvmlInit))") == 18


def test_a_delay_holds_up_nobody_else(machine: Machine) -> None:
    """A call that hangs does not hang the machine: the lock is given up meanwhile."""
    machine.inject("nvmlDeviceGetName", delay=0.3)
    code = INITIALISED + "print(0, flush=True); n.nvmlDeviceGetName(d)"
    with start(machine, code) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        machine.release(machine.allocate(0, 1))
        assert time.monotonic() - began < 0.2
        process.communicate(timeout=30)
        assert time.monotonic() - began >= 0.25


def test_injections_are_checked(machine: Machine) -> None:
    """A misspelt function would never fail, and the test that injects it always pass."""
    with pytest.raises(ValueError, match="no function 'nvmlDeviceGetMemory'"):
        machine.inject("nvmlDeviceGetMemory", code=3)


def test_mig(tmp_path: Path) -> None:
    """Instances have their own VRAM and handles; the GPU shows their sum."""
    instances = (Mig("10GB", used="1GB"), Mig("20GB", index=3, uuid="MIG-big"))
    gpu = Device("40GB", name="NVIDIA A100", capability=(8, 0), mig=instances)
    machine = Machine.create(tmp_path / "state", [gpu], context=0)
    machine.allocate("MIG-big", "4GB")
    answer = run(
        machine,
        INITIALISED
        + """
found = {}
for index in range(n.nvmlDeviceGetMaxMigDeviceCount(d)):
    try:
        mig = n.nvmlDeviceGetMigDeviceHandleByIndex(d, index)
    except n.NVMLError as error:
        found[index] = error.value
        continue
    memory = n.nvmlDeviceGetMemoryInfo(mig)
    parent = n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
    found[index] = [
        n.nvmlDeviceGetUUID(mig), n.nvmlDeviceGetName(mig), memory.total >> 30, memory.used >> 30,
        n.nvmlDeviceGetIndex(parent), n.nvmlDeviceIsMigDeviceHandle(mig).value,
        [p.gpuInstanceId for p in n.nvmlDeviceGetComputeRunningProcesses(mig)],
    ]
big = n.nvmlDeviceGetHandleByUUID("MIG-big")
print(json.dumps({
    "found": found,
    "mode": n.nvmlDeviceGetMigMode(d),
    "count": n.nvmlDeviceGetCount(),
    "parent": n.nvmlDeviceGetMemoryInfo(d).used >> 30,
    "listed": len(n.nvmlDeviceGetComputeRunningProcesses(d)),
    "by_uuid": n.nvmlDeviceGetMemoryInfo(big).total >> 30,
    "load": error_of(n.nvmlDeviceGetUtilizationRates, d),
}))""",
    )
    first = ["MIG-00000000-0000-0000-0000-000000000000", "NVIDIA A100 MIG 10gb", 10, 1, 0, 1, []]
    found: dict[str, Any] = {str(index): 6 for index in range(7)}
    found |= {"0": first, "3": ["MIG-big", "NVIDIA A100 MIG 20gb", 20, 4, 0, 1, [4]]}
    expected = {"mode": [1, 1], "count": 1, "parent": 5, "listed": 1, "by_uuid": 20, "load": 3}
    assert answer == {"found": found, **expected}


@pytest.mark.parametrize(("variant", "mig"), [("old", 3), ("ancient", 13)])
def test_old_drivers_lack_symbols(machine: Machine, variant: str, mig: int) -> None:
    """pynvml says FUNCTION_NOT_FOUND; what older drivers had still works."""
    answer = ask(
        machine,
        "[error_of(n.nvmlDeviceGetMemoryInfo, d, version=n.nvmlMemory_v2),"
        " error_of(n.nvmlDeviceGetComputeRunningProcesses_v3, d),"
        " error_of(n.nvmlDeviceGetMigMode, d),"
        " error_of(n.nvmlDeviceGetComputeRunningProcesses_v2, d),"
        " error_of(n.nvmlDeviceGetMemoryInfo, d)]",
        variant=variant,
    )
    assert answer == [13, 13, mig, 0, 0]


def test_every_function_is_exported(tmp_path: Path) -> None:
    """The list that injections are checked against is the list of symbols."""
    library = ctypes.CDLL(str(build(tmp_path)))
    assert len(exported_functions()) > 35
    for name in exported_functions():
        assert getattr(library, name)


def test_builds_are_cached_and_may_race(tmp_path: Path) -> None:
    """Two processes may build at once; a third finds the result."""
    code = "import sys; from simulator import build; build(sys.argv[1])"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    builders = [subprocess.Popen(command, env=env) for _ in range(2)]
    assert [builder.wait(120) for builder in builders] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["libnvidia-ml.so.1"]
    before = (tmp_path / "libnvidia-ml.so.1").stat().st_mtime_ns
    assert build(tmp_path).stat().st_mtime_ns == before


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what is missing and what to do."""
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(CompilerMissingError, match="'no-such-compiler'.*install gcc"):
        build(tmp_path)


def test_threads_may_call_at_once(machine: Machine) -> None:
    """Threads exclude each other like processes do."""
    answer = run(
        machine,
        INITIALISED
        + """
from concurrent.futures import ThreadPoolExecutor
import gpusim
def work(_):
    with gpusim.alloc("1GB"):
        return len(n.nvmlDeviceGetComputeRunningProcesses(d))
with ThreadPoolExecutor(8) as pool:
    counts = list(set(pool.map(work, range(200))))
print(json.dumps([counts, n.nvmlDeviceGetMemoryInfo(d).used]))""",
    )
    assert answer == [[1], 2 * GIB + 400 * MIB + 600 * MIB]
