"""NVML fails in every way: the run never breaks, and what is said is right.

Whole runs are for what a user sees. The matrix of functions and error codes goes through
one subprocess in which the plugin's own probe asks the real pynvml again and again.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine, Mig, build
from simulator.build import exported_functions
from simulator.layout import State

from .conftest import SHOW_PLACE, Project, clean_environment

PROBE = """
import dataclasses, json, os, sys, time
from pathlib import Path
from pytest_gpushare.planning import startup
from pytest_gpushare.config.sources import Written, load
from simulator import Machine

def plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


machine = Machine.open()
here = Path.cwd()
ini = {"gpu_share_enable_ollama_detection": "false"}
settings = load(Written({}, {}, ini, "", here, here, here))
job = json.loads(sys.argv[1])
if "hold" in job:
    held = machine.allocate(*job["hold"])
if "limit" in job:
    startup.DEVICES_TIMEOUT = job["limit"]
answers = []
for case in job["cases"]:
    machine.clear_injections()
    for injection in case.get("inject", []):
        machine.inject(**injection)
    began = time.monotonic()
    probes = startup.probe(settings, (), case.get("env", {}))
    probes.close()
    took = time.monotonic() - began
    answers.append({**plain(probes.gpus), "took": took})
machine.clear_injections()
print(json.dumps({"pid": os.getpid(), "answers": answers}, default=str))
sys.stdout.flush()
# Calls that hang in the library would be waited for, were they not daemon threads.
"""

CODES = {
    1: "Uninitialized",
    2: "Invalid Argument",
    3: "Not Supported",
    4: "no permission: check the access rights of /dev/nvidia*, or the container's devices",
    6: "Not Found",
    7: "Insufficient Size",
    9: "the NVIDIA driver is not loaded: load it, or check nvidia-smi",
    12: "NVML library not found: is the NVIDIA driver installed?",
    13: "Function Not Found",
    15: "the GPU is lost: reset it or reboot",
    17: "The operating system has blocked the request.",
    18: "driver and library versions differ: reboot, or reload the driver",
    999: "unknown error: check nvidia-smi; in a container, restart it",
}
"""The codes that NVML is known to give here, and what is said of each."""

WHOLE = Device(total="24GB", used="2GB")
IN_PARTS = Device(
    total="40GB",
    name="NVIDIA A100-SXM4-40GB",
    capability=(8, 0),
    mig=(Mig(total="10GB", index=0), Mig(total="20GB", used="1GB", index=3)),
)


def said_of(code: int) -> str:
    """The reason that a code is told as."""
    return f"{CODES[code]} (NVML error {code})"


def indices(answer: dict[str, Any]) -> list[str]:
    """The devices that are left."""
    return [device["index"] for device in answer["devices"]]


def ask(environment: dict[str, str], path: Path, **job: object) -> Any:
    """What the probe finds in each case of a job, in one process."""
    project = Project(path, {**clean_environment(), **environment})
    result = project.command([sys.executable, "-c", PROBE, json.dumps(job)])
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


@cache
def _matrix() -> list[tuple[str, int]]:
    return [(function, code) for function in EFFECTS for code in CODES]


def absent(answer: dict[str, Any], code: int) -> None:
    """No device, and the reason."""
    assert (answer["absence"], indices(answer)) == (said_of(code), [])


def first_left_out(answer: dict[str, Any], code: int) -> None:
    """The device is skipped with its reason, the others stay."""
    assert indices(answer) == ["1.0", "1.3", "2"]
    assert answer["problems"] == [f"GPU 0 was left out: {said_of(code)}"]


def unaffected(answer: dict[str, Any], code: int) -> None:
    """All is as without the fault."""
    assert {**answer, "took": 0} == {**answer["usual"], "usual": answer["usual"], "took": 0}


def no_memory(answer: dict[str, Any], code: int) -> None:
    """Not supported means memory that is shared with the CPU; anything else skips the device."""
    if code != 3:
        first_left_out(answer, code)
        return
    assert indices(answer) == ["0", "1.0", "1.3", "2"]
    assert [device["unified"] for device in answer["devices"]] == [True, False, False, False]


def no_name(answer: dict[str, Any], code: int) -> None:
    """A device without a name is a device."""
    assert answer["devices"][0]["name"] == "unnamed GPU"
    assert (indices(answer), answer["problems"]) == (["0", "1.0", "1.3", "2"], [])


def as_a_whole(answer: dict[str, Any], code: int) -> None:
    """A GPU that does not tell of MIG is taken as one without."""
    assert (indices(answer), answer["problems"]) == (["0", "1", "2"], [])


def second_left_out(answer: dict[str, Any], code: int) -> None:
    """A GPU in MIG mode that does not tell its instances is skipped with its reason."""
    assert indices(answer) == ["0", "2"]
    assert answer["problems"] == [f"GPU 1 was left out: {said_of(code)}"]


def no_instance(answer: dict[str, Any], code: int) -> None:
    """An index without an instance is a gap; any other reason is told, once."""
    assert indices(answer) == ["0", "2"]
    assert answer["problems"] == [
        "GPU 1 was left out: it is in MIG mode and has no instance: create one, or switch MIG off"
        if code in (2, 6)
        else f"GPU 1: MIG instances were left out: {said_of(code)}"
    ]


def no_processes(answer: dict[str, Any], code: int) -> None:
    """Who holds VRAM is unknown, which is not nobody."""
    assert (indices(answer), answer["problems"]) == (["0", "1.0", "1.3", "2"], [])
    assert [device["processes"] for device in answer["devices"]] == [None, [], [], []]
    assert answer["own_process_has_context"] is False


def no_capability(answer: dict[str, Any], code: int) -> None:
    """A device that does not tell its capability is a device."""
    assert answer["devices"][0]["capability"] == [0, 0]
    assert (indices(answer), answer["problems"]) == (["0", "1.0", "1.3", "2"], [])


def no_driver_version(answer: dict[str, Any], code: int) -> None:
    """A driver without a version is a driver."""
    assert (answer["driver"], answer["absence"], answer["problems"]) == (None, "", [])
    assert indices(answer) == ["0", "1.0", "1.3", "2"]


EFFECTS: dict[str, tuple[int | None, Callable[[dict[str, Any], int], None]]] = {
    "nvmlInitWithFlags": (None, absent),
    "nvmlShutdown": (None, unaffected),
    "nvmlDeviceGetCount_v2": (None, absent),
    "nvmlSystemGetDriverVersion": (None, no_driver_version),
    "nvmlDeviceGetHandleByIndex_v2": (0, first_left_out),
    "nvmlDeviceGetUUID": (0, first_left_out),
    "nvmlDeviceGetName": (0, no_name),
    "nvmlDeviceGetMemoryInfo_v2": (0, unaffected),
    "nvmlDeviceGetMemoryInfo": (0, unaffected),
    "nvmlDeviceGetMemoryInfo*": (0, no_memory),
    "nvmlDeviceGetComputeRunningProcesses_v3": (0, no_processes),
    "nvmlDeviceGetComputeMode": (0, unaffected),
    "nvmlDeviceGetCudaComputeCapability": (0, no_capability),
    "nvmlDeviceGetMigMode": (1, as_a_whole),
    "nvmlDeviceGetMaxMigDeviceCount": (1, second_left_out),
    "nvmlDeviceGetMigDeviceHandleByIndex": (1, no_instance),
}
"""Function -> the GPU on which it fails, and what comes of it."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, nvml_library: Path) -> Callable[..., Any]:
    """Ask a machine with three GPUs, the middle one in MIG mode with a gap in its indices."""
    path = tmp_path_factory.mktemp("mixed")
    machine = Machine.create(path / "vram", [WHOLE, IN_PARTS, WHOLE])

    def asked(**job: object) -> Any:
        return ask(machine.env(nvml_library), path, **job)

    return asked


# Each worker of xdist would ask for the whole matrix anew.
TOGETHER = pytest.mark.xdist_group("nvml-matrix")


@pytest.fixture(scope="module")
def answers(mixed: Callable[..., Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """What is found when each function gives each code; under "usual" what is without."""
    cases: list[dict[str, Any]] = [{}]
    for function, code in _matrix():
        injection = {"function": function, "code": code, "device": EFFECTS[function][0]}
        cases.append({"inject": [injection]})
    usual, *found = mixed(cases=cases, hold=[0, "1GB"])["answers"]
    return {key: {**answer, "usual": usual} for key, answer in zip(_matrix(), found, strict=True)}


@TOGETHER
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("function", EFFECTS)
def test_matrix(function: str, code: int, answers: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Each function of NVML gives each code: a device is skipped, or all, or nothing happens."""
    EFFECTS[function][1](answers[function, code], code)


@TOGETHER
def test_usual_answer(answers: dict[tuple[str, int], dict[str, Any]]) -> None:
    """What the matrix is compared with is a whole answer."""
    usual = answers["nvmlShutdown", 1]["usual"]
    assert indices(usual) == ["0", "1.0", "1.3", "2"]
    assert [device["used"] >> 20 for device in usual["devices"]] == [2048 + 1624, 0, 1024, 2048]
    assert (usual["absence"], usual["problems"], usual["driver"]) == ("", [], "580.95.05")
    assert usual["own_process_has_context"] is True


def test_matrix_is_complete(tmp_path: Path, nvml_library: Path) -> None:
    """The matrix has every function that the probe calls, and no other."""
    machine = Machine.create(tmp_path / "vram", [WHOLE, IN_PARTS])
    names = sorted(exported_functions())
    watch = [{"function": name} for name in names]
    # Where the newer memory info fails, the older is asked.
    watch.append({"function": "nvmlDeviceGetMemoryInfo_v2", "code": 999})
    code = PROBE.replace("machine.clear_injections()\nprint", "print")
    project = Project(tmp_path, {**clean_environment(), **machine.env(nvml_library)})
    result = project.command(
        [sys.executable, "-c", code, json.dumps({"cases": [{"inject": watch}]})]
    )
    assert (result.code, result.err) == (0, "")
    state = State.from_buffer_copy(machine.path.read_bytes())
    called = {name for at, name in enumerate(names) if state.injections[at].calls}
    assert called == {name for name in EFFECTS if not name.endswith("*")}


def test_hang(mixed: Callable[..., Any]) -> None:
    """A driver that is stuck in a call is left behind at the limit; closing it, too."""
    functions = [
        "nvmlInitWithFlags",
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
    ]
    cases = [{"inject": [{"function": name, "delay": 4.0}]} for name in functions]
    cases.append({"inject": [{"function": "nvmlShutdown", "delay": 4.0}]})
    began = time.monotonic()
    *stuck, closing = mixed(cases=cases, limit=0.5)["answers"]
    for answer in stuck:
        assert (answer["absence"], indices(answer)) == (too_late(0.5), [])
        assert 0.5 <= answer["took"] < 2.5
    assert indices(closing) == ["0", "1.0", "1.3", "2"]
    assert closing["took"] < 2.5
    # The process itself ends without waiting for what is stuck.
    assert time.monotonic() - began < 60


def test_slow_but_fine(mixed: Callable[..., Any]) -> None:
    """A driver that takes its time, as without persistence mode, is waited for."""
    slow = [
        {"function": "nvmlInitWithFlags", "delay": 1.5},
        {"function": "nvmlDevice*", "delay": 0.02},
    ]
    (answer,) = mixed(cases=[{"inject": slow}])["answers"]
    assert (indices(answer), answer["absence"]) == (["0", "1.0", "1.3", "2"], "")
    assert answer["took"] > 1.5


@pytest.mark.parametrize("variant", ["old", "ancient"])
def test_old_libraries(variant: str, tmp_path: Path) -> None:
    """A library without memory info v2, process lists v3, or MIG tells what it can."""
    machine = Machine.create(
        tmp_path / "vram", [Device(total="24GB", used="2GB", reserved="300MB")]
    )
    environment = machine.env(build(tmp_path / "library", variant).parent)
    (answer,) = ask(environment, tmp_path, cases=[{}])["answers"]
    (device,) = answer["devices"]
    assert (answer["problems"], device["processes"]) == ([], None)
    # Version 1 counts the driver's own share as used; what is free is the same.
    assert [device[name] >> 20 for name in ("total", "used", "free")] == [24576, 2348, 22228]


def devices_of(tmp_path: Path, nvml_library: Path, devices: Sequence[Device], **job: object) -> Any:
    """The one answer of a machine with these devices, and the process that asked."""
    machine = Machine.create(tmp_path / "vram", devices)
    found = ask(machine.env(nvml_library), tmp_path, cases=[{}], **job)
    return found["answers"][0], found["pid"]


@pytest.mark.parametrize("mode", ["unsupported", "zero"])
def test_unified_memory(mode: Any, tmp_path: Path, nvml_library: Path) -> None:
    """Where NVML knows no memory of the device, it is the host's."""
    answer, _ = devices_of(tmp_path, nvml_library, [Device(memory=mode)])
    (device,) = answer["devices"]
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    total = re.search(r"MemTotal:\s+(\d+)", meminfo)
    assert total is not None
    assert (device["unified"], device["total"]) == (True, int(total.group(1)) * 1024)
    assert 0 < device["free"] <= device["total"]


@pytest.mark.parametrize(
    ("mode", "offset", "expected"),
    [
        ("normal", 0, "own"),
        ("normal", 100_000, "shifted"),
        ("hidden-memory", 0, "unknown bytes"),
        ("zero-memory", 0, "unknown bytes"),
        ("none", 0, None),
    ],
)
def test_process_lists(
    mode: Any, offset: int, expected: str | None, tmp_path: Path, nvml_library: Path
) -> None:
    """Lists without bytes (WDDM, WSL 2), with the host's PIDs (containers), or none at all."""
    device = Device(processes=mode, pid_offset=offset)
    answer, pid = devices_of(tmp_path, nvml_library, [device], hold=[0, "1GB"])
    (found,) = answer["devices"]
    known = None if expected == "unknown bytes" else 1624 << 20
    listed = [{"pid": pid + offset, "used": known, "neighbour": ""}]
    assert found["processes"] == (None if expected is None else listed)
    assert answer["own_process_has_context"] is (expected in ("own", "unknown bytes"))
    assert found["used"] >> 20 == 2048 + 1624


def test_no_device(tmp_path: Path, nvml_library: Path) -> None:
    """A driver without a GPU."""
    answer, _ = devices_of(tmp_path, nvml_library, [])
    assert (answer["absence"], answer["devices"]) == ("NVML finds no device", [])


def test_all_devices_are_lost(mixed: Callable[..., Any]) -> None:
    """Nothing is left, and every device has its reason; the visibility is not blamed."""
    case = {
        "inject": [{"function": "nvmlDeviceGetHandleByIndex_v2", "code": 15}],
        "env": {"CUDA_VISIBLE_DEVICES": "0"},
    }
    (answer,) = mixed(cases=[case])["answers"]
    assert answer["absence"] == "no device can be used"
    assert answer["problems"] == [f"GPU {n} was left out: {said_of(15)}" for n in range(3)]


def test_one_instance_is_lost(tmp_path: Path, nvml_library: Path) -> None:
    """Of MIG instances, too, the one that fails is skipped with its reason."""
    machine = Machine.create(tmp_path / "vram", [IN_PARTS])
    uuid = machine.snapshot()[2].uuid
    lost = {"function": "nvmlDeviceGetMemoryInfo*", "code": 15, "device": uuid}
    (answer,) = ask(machine.env(nvml_library), tmp_path, cases=[{"inject": [lost]}])["answers"]
    assert indices(answer) == ["0.0"]
    assert answer["problems"] == [f"GPU 0.3 was left out: {said_of(15)}"]


def test_nonsense_figures(tmp_path: Path, nvml_library: Path) -> None:
    """A device that claims to have more free than it has is skipped, not believed."""
    machine = Machine.create(tmp_path / "vram", [WHOLE, WHOLE, WHOLE])
    with machine.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        state = State.from_buffer_copy(memory)
        state.devices[0].foreign = 25 << 30
        state.devices[2].total = 1 << 60
        memory[:] = bytes(state)
    (answer,) = ask(machine.env(nvml_library), tmp_path, cases=[{}])["answers"]
    assert indices(answer) == ["1"]
    first, third = answer["problems"]
    assert re.fullmatch(
        r"GPU 0 was left out: NVML reports impossible figures: \d+ of \d+ bytes free, .*", first
    )
    assert third.startswith("GPU 2 was left out: NVML reports impossible figures: ")


@pytest.mark.parametrize("uuid", ["GPU-a,GPU-b", "GPU-\x1b[31m"])
def test_nonsense_uuid(uuid: str, tmp_path: Path, nvml_library: Path) -> None:
    """A UUID that CUDA_VISIBLE_DEVICES cannot hold is no way to assign a device."""
    answer, _ = devices_of(tmp_path, nvml_library, [Device(uuid=uuid), WHOLE])
    assert indices(answer) == ["1"]
    assert answer["problems"] == [
        "GPU 0 was left out: NVML gives no UUID by which CUDA can select it"
    ]


def test_odd_names(tmp_path: Path, nvml_library: Path) -> None:
    """What a terminal would obey is replaced in names."""
    answer, _ = devices_of(tmp_path, nvml_library, [Device(name="A\x1b[31m\nB")])
    assert answer["devices"][0]["name"] == "A?[31m?B"


def test_outer_visibility(tmp_path: Path, nvml_library: Path) -> None:
    """CUDA_VISIBLE_DEVICES bounds what the probe gives, in each of its forms."""
    machine = Machine.create(
        tmp_path / "vram", [WHOLE, IN_PARTS, Device(name="Other", total="3GB", used="1GB")]
    )
    first, _, third, part, last = (device.uuid for device in machine.snapshot())
    values = {
        "2,0": ["2", "0"],
        f"{third},{first}": ["2", "0"],
        f"{last},{first}": ["1.3", "0"],
        part: ["1.0"],
        "0,9,2": ["0"],
        "0,0": [],
        "": [],
        "-1": [],
        " 2 , 0 ": ["2", "0"],
        "9" * 5000: [],
    }
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    cases: list[dict[str, Any]] = [
        {"env": {"CUDA_VISIBLE_DEVICES": value, **by_bus}} for value in values
    ]
    cases.append({"env": {"CUDA_VISIBLE_DEVICES": "2"}})
    *found, guessed = ask(machine.env(nvml_library), tmp_path, cases=cases)["answers"]
    assert dict(zip(values, map(indices, found), strict=True)) == values
    assert all(len(answer["all_devices"]) == 4 for answer in found)
    assert all(bool(answer["absence"]) is not bool(answer["devices"]) for answer in found)
    assert not any("did not answer" in answer["absence"] for answer in found)
    assert found[0]["problems"] == []
    # Compute capability 8.0 comes after 8.6 where the highest is taken to be the fastest.
    assert indices(guessed) == ["1.0"]
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in guessed["problems"][0]


# --- whole runs ---

TWO = (
    "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB "
    "(limited by max_workers_per_gb; preset conservative)"
)


def on_cpu(reason: str) -> str:
    """The headline of a run without a device."""
    return f"gpu-share: 2 CPU workers (no GPU: {reason})"


def test_run_without_devices(project: Project, machine: Machine) -> None:
    """The tests run on CPU workers, and the reason stands in the headline."""
    machine.inject("nvmlInitWithFlags", code=18)
    result = project.pytest("--gpu-share", PYTEST_XDIST_AUTO_NUM_WORKERS="2")
    assert (result.code, result.passed, result.workers, result.err) == (0, 4, 2, "")
    assert result.said == [on_cpu(said_of(18))]


def test_run_with_one_lost_gpu(project: Project, machine_with: Callable[..., Machine]) -> None:
    """Two of three GPUs do the work; the lost one is named with its reason, even at -q."""
    machine = machine_with(WHOLE, WHOLE, WHOLE)
    machine.inject("nvmlDeviceGetHandleByIndex_v2", code=15, device=1)
    project.write(test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "-q")
    assert (result.code, result.passed, result.err) == (0, 8, "")
    assert result.said == [f"gpu-share: GPU 1 was left out: {said_of(15)}"]
    used = {place.split()[1] for place in project.places().values()}
    assert used == {machine.snapshot()[0].uuid, machine.snapshot()[2].uuid}


def test_run_on_mig_instances(project: Project, machine_with: Callable[..., Machine]) -> None:
    """Workers are given instances by their UUIDs, over a gap in the indices."""
    parts = (Mig(total="20GB", index=0), Mig(total="20GB", index=3))
    machine = machine_with(Device(total="40GB", name="NVIDIA A100", capability=(8, 0), mig=parts))
    project.write(test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "--dist", "each", "-v")
    assert (result.code, result.err) == (0, "")
    assert result.said[0].startswith("gpu-share: 2 GPU workers × 7.0 GB")
    assert {line.split(" NVIDIA")[0] for line in result.said if "total" in line} == {
        "  GPU 0.0",
        "  GPU 0.3",
    }
    assert set(project.places().values()) == {
        f"gpu {device.uuid}" for device in machine.snapshot() if device.mig_index is not None
    }


def test_run_with_unified_memory(project: Project, machine_with: Callable[..., Machine]) -> None:
    """Memory that is shared with the CPU is told as such, whatever there is of it."""
    machine_with(Device(name="NVIDIA GB10", memory="unsupported"))
    result = project.pytest("--gpu-share", "-n", "1")
    assert (result.code, result.passed, result.workers, result.err) == (0, 4, 1, "")
    assert re.fullmatch(
        r"  GPU 0 NVIDIA GB10: total \S+ GB, available \S+ GB, shared with the CPU", result.said[1]
    )


HANGING_DRIVER = """
    import os, pathlib, time
    import pytest
    from simulator import Machine

    def hang():
        Machine.open().inject(os.environ["CALL"], delay=60)

    @pytest.mark.gpu(vram="2GB")
    @pytest.mark.parametrize("i", range(12))
    def test_gpu(i):
        if i == 4 and os.environ["HANGS"] == "middle":
            hang()
        time.sleep(0.2)

    @pytest.fixture(scope="session", autouse=True)
    def end():
        yield
        if os.environ["HANGS"] == "end":
            hang()
"""

STOPWATCH = """
    import atexit, os, pathlib, sys, threading, time

    MAIN = threading.main_thread().ident
    DRIVER = ("timed.py", os.path.join("gpu", "readings.py"), os.path.join("gpu", "nvml.py"))
    waited, sampler_waited, stopped = 0.0, 0.0, threading.Event()

    def waits(ident):
        # The thread is inside of a call that waits for the driver.
        frame = sys._current_frames().get(ident)
        while frame is not None:
            path = frame.f_code.co_filename
            if "pytest_gpushare" in path and path.endswith(DRIVER):
                return True
            frame = frame.f_back
        return False

    def watch():
        global waited, sampler_waited
        before, at = (False, False), time.monotonic()
        while not stopped.wait(0.005):
            samplers = [t.ident for t in threading.enumerate() if t.name == "gpu-share-watch"]
            now, later = (waits(MAIN), any(map(waits, samplers))), time.monotonic()
            waited += (later - at) * (before[0] and now[0])
            sampler_waited += (later - at) * (before[1] and now[1])
            before, at = now, later

    def end():
        stopped.set()
        role = "worker" if "PYTEST_XDIST_WORKER" in os.environ else "controller"
        pathlib.Path(f"{role}-{os.getpid()}.waited").write_text(f"{waited} {sampler_waited}")

    threading.Thread(target=watch, daemon=True).start()
    atexit.register(end)
"""


@pytest.mark.parametrize(
    ("hangs", "call"),
    [
        ("start", "nvml*"),
        ("middle", "nvml*"),
        # All that is asked while tests run.
        ("middle", "nvmlDeviceGetMemoryInfo*"),
        ("middle", "nvmlDeviceGetComputeRunningProcesses*"),
        ("end", "nvml*"),
    ],
)
def test_run_with_a_driver_that_hangs(
    hangs: str, call: str, project: Project, machine: Machine
) -> None:
    """Every call, or one, hangs from some moment on: all waits for it take 3 s at most together.

    Counted is for how long the main threads wait for the driver, so that a busy machine, on which
    everything takes longer, does not matter.
    """
    project.write(test_project=HANGING_DRIVER, conftest=STOPWATCH)
    if hangs == "start":
        machine.inject(call, delay=60)
    result = project.pytest(
        *("--gpu-share", "-o", "gpu_share_cpu_workers=1", "--gpu-share-report=report.json"),
        *("-o", "gpu_share_enable_ollama_detection=false"),
        HANGS=hangs,
        CALL=call,
        PYTEST_XDIST_AUTO_NUM_WORKERS="3",
    )
    assert (result.code, result.passed, result.err) == (0, 12, ""), result.out
    waited: dict[str, list[float]] = {"controller": [], "worker": []}
    by_sampler = 0.0
    for path in project.path.glob("*.waited"):
        main, sampler = map(float, path.read_text().split())
        waited[path.name.partition("-")[0]].append(main)
        by_sampler += sampler
    assert (len(waited["controller"]), len(waited["worker"])) == (1, 3)
    # Workers wait at the same time.
    assert waited["controller"][0] + max(waited["worker"]) <= 3.0, waited
    if hangs != "end":
        # It did hang, and the stopwatch has seen it: whoever asks first waits, and then nobody.
        assert max(waited["controller"][0], by_sampler) > 0.5, (waited, by_sampler)
    tests = json.loads((project.path / "report.json").read_text())["tests"]
    assert sum(test["waited_s"] for test in tests) < 1.0
    if hangs == "start":
        assert result.said[0] == (f"gpu-share: 3 CPU workers (no GPU: {too_late(2.5)})")


def too_late(seconds: float) -> str:
    """What is said of a driver that does not answer at the start."""
    return (
        f"NVML did not answer within {seconds:g} s: check nvidia-smi; persistence mode makes it "
        "start faster"
    )


def test_run_with_impossible_figures_in_the_middle(project: Project, machine: Machine) -> None:
    """2**64 - 1 and more than the device has are readings that are left out, not believed."""
    project.write(
        test_project="""
        import mmap, time
        import pytest
        from simulator import Machine
        from simulator.layout import State

        def test_a():
            time.sleep(0.5)
            path = Machine.open().path
            for foreign, total in ((50 << 30, 24 << 30), ((1 << 64) - 1, 24 << 30), (0, 1 << 63)):
                with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                    state = State.from_buffer_copy(memory)
                    device = state.devices[0]
                    before, size = device.foreign, device.total
                    device.foreign, device.total = foreign, total
                    memory[:] = bytes(state)
                time.sleep(0.5)
                with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                    state = State.from_buffer_copy(memory)
                    state.devices[0].foreign, state.devices[0].total = before, size
                    memory[:] = bytes(state)
        """
    )
    arguments = ("--gpu-share", "-W", "error", "--gpu-share-report=report.json")
    result = project.pytest(*arguments, beside=["unraisableexception"])
    assert (result.code, result.passed, result.err) == (0, 1, "")
    (device,) = json.loads((project.path / "report.json").read_text())["devices"]
    assert device["peak_used_bytes"] == 2 << 30


def test_two_devices_with_one_uuid(project: Project, machine_with: Callable[..., Machine]) -> None:
    """CUDA can show a worker only one of them: the other is left out, not handed out twice."""
    machine = machine_with(WHOLE, WHOLE)
    with machine.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        state = State.from_buffer_copy(memory)
        state.devices[1].uuid = state.devices[0].uuid
        memory[:] = bytes(state)
    result = project.pytest("--gpu-share", PYTEST_XDIST_AUTO_NUM_WORKERS="8")
    assert (result.code, result.passed, result.err) == (0, 4, "")
    assert result.said[0] == TWO
    assert (
        "GPU 1 was left out: NVML lists another device under the same UUID before it" in result.out
    )


def test_run_inside_outer_visibility(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Devices outside of CUDA_VISIBLE_DEVICES are neither counted nor given away."""
    machine = machine_with(WHOLE, WHOLE, WHOLE)
    project.write(test_project=SHOW_PLACE)
    uuids = [device.uuid for device in machine.snapshot()]
    result = project.pytest("--gpu-share", CUDA_VISIBLE_DEVICES=f"{uuids[2]},0,7")
    assert (result.code, result.err, result.workers) == (0, "", 4)
    assert set(project.places().values()) == {f"gpu {uuids[2]}", f"gpu {uuids[0]}"}
    assert result.said[1] == (
        f'  CUDA_VISIBLE_DEVICES={uuids[2]},0,7: "7" names no device: '
        "it and what follows are ignored"
    )


def test_run_with_no_visible_device(project: Project, machine: Machine) -> None:
    """Hidden GPUs stay hidden."""
    project.write(test_project=SHOW_PLACE)
    result = project.pytest(
        "--gpu-share", CUDA_VISIBLE_DEVICES="", PYTEST_XDIST_AUTO_NUM_WORKERS="2"
    )
    assert (result.code, result.passed) == (0, 8)
    assert result.said == [on_cpu("CUDA_VISIBLE_DEVICES is empty; unset it or name a device")]
    assert {place.strip() for place in project.places().values()} == {"cpu"}


def stand_in(project: Project, text: str) -> str:
    """A module `pynvml` that comes before the real one; the path to import it by."""
    directory = project.path / "stand-in"
    directory.mkdir()
    (directory / "pynvml.py").write_text(text, encoding="utf-8")
    return os.pathsep.join([str(directory), project.environment.get("PYTHONPATH", "")])


def deprecated() -> str:
    """What the deprecated distribution `pynvml` does: a warning, then the module as usual."""
    real = importlib.util.find_spec("pynvml")
    assert real is not None
    return (
        "import warnings\n"
        "warnings.warn('The pynvml package is deprecated.', FutureWarning, stacklevel=2)\n"
        f"exec(compile(open({real.origin!r}).read(), {real.origin!r}, 'exec'))\n"
    )


def test_run_with_deprecated_pynvml(project: Project, machine: Machine) -> None:
    """Its warning is only a warning, under pytest's own -W error too."""
    path = stand_in(project, deprecated())
    beside = ["unraisableexception"]
    result = project.pytest("--gpu-share", "-W", "error", beside=beside, PYTHONPATH=path)
    assert (result.code, result.passed, result.said[0]) == (0, 4, TWO)
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("text", "warnings", "reason"),
    [
        (
            deprecated(),
            "error::FutureWarning",
            "pynvml cannot be imported under -W error: the deprecated distribution pynvml is "
            "installed: uninstall it and reinstall nvidia-ml-py",
        ),
        (
            "raise ModuleNotFoundError(\"No module named 'pynvml'\")",
            None,
            "pynvml cannot be imported (No module named 'pynvml'): install nvidia-ml-py",
        ),
    ],
)
def test_run_without_pynvml(
    text: str, warnings: str | None, reason: str, project: Project, machine: Machine
) -> None:
    """Python's own error filter, or no module at all: the reason, the remedy, and the tests run."""
    result = project.pytest(
        "--gpu-share",
        PYTHONPATH=stand_in(project, text),
        PYTHONWARNINGS=warnings,
        PYTEST_XDIST_AUTO_NUM_WORKERS="2",
    )
    assert (result.code, result.passed, result.err) == (0, 4, "")
    assert result.said == [on_cpu(reason)]
