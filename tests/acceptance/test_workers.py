"""Workers in their place: seen from the inside, and after all that can happen to them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from simulator import Device, Machine, Mig

from .conftest import SHOW_PLACE, Project
from .in_one_process import Case, arguments, run_all

NO_LIMITS = (
    *("-o", "gpu_share_max_workers_per_gpu=0", "-o", "gpu_share_max_workers_per_gb=0"),
    *("-o", "gpu_share_ollama_gpu=none"),
)
EARLY = """
    # What this process sees before any of its own imports could change it.
    import os
    FIRST = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
"""
EARLY_TEST = """
    import os, pathlib
    import pytest
    from conftest import FIRST

    @pytest.mark.parametrize("i", range(40))
    def test_early(i, worker_id):
        pathlib.Path("places").mkdir(exist_ok=True)
        pathlib.Path("places", worker_id).write_text(FIRST)
"""


def fleet(count: int) -> list[Device]:
    """So many devices of mixed sizes."""
    sizes = ["24GB", "48GB", "12GB", "80GB"]
    return [Device(total=sizes[n % 4], used="1GB") for n in range(count)]


@pytest.mark.parametrize("count", [2, 8, 16])
def test_places_of_a_fleet(
    count: int, project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Every device has workers, and none has more than two."""
    machine = machine_with(*fleet(count))
    workers = min(count * 2, 16)
    case = arguments("--gpu-share", "-n", str(workers), *NO_LIMITS)
    result = run_all({"fleet": case}, project.path, project.environment)["fleet"]
    assert (result.code, len(result.places)) == (0, workers)
    seen = Counter(result.places)
    assert set(seen) == {f"gpu {state.uuid}" for state in machine.snapshot()}
    assert max(seen.values()) <= 2


@pytest.mark.parametrize("count", [1, 4])
def test_fleet(count: int, project: Project, machine_with: Callable[..., Machine]) -> None:
    """Each worker reads its device before its first conftest."""
    machine = machine_with(*fleet(count))
    project.write(conftest=EARLY, test_project=EARLY_TEST)
    workers = count * 2
    result = project.pytest("--gpu-share", "-n", str(workers), *NO_LIMITS)
    assert (result.code, result.workers, result.passed) == (0, workers, 40), result.out
    uuids = [state.uuid for state in machine.snapshot()]
    seen = Counter(project.places().values())
    assert set(seen) <= set(uuids)
    assert max(seen.values()) <= 2
    if len(project.places()) == workers:
        assert set(seen) == set(uuids)


def test_mig(project: Project, machine_with: Callable[..., Machine]) -> None:
    """MIG instances are devices of their own, with their own memory."""
    machine_with(Device(total="80GB", mig=(Mig("40GB"), Mig("20GB", index=3))))
    project.write(test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "-o", "gpu_share_ollama_gpu=none")
    assert result.code == 0
    assert result.said[0].startswith("gpu-share: 4 GPU workers (2 × 19.5 GB, 2 × 9.5 GB)")
    assert {place.split()[1][:4] for place in project.places().values()} == {"MIG-"}


def test_outer_visibility(project: Project, machine_with: Callable[..., Machine]) -> None:
    """What a scheduler or a container shows bounds the plan, and is composed with."""
    machine = machine_with(*(Device(used="1GB") for _ in range(4)))
    project.write(test_project=SHOW_PLACE)
    result = project.pytest(
        "--gpu-share", CUDA_VISIBLE_DEVICES="3,GPU-00000000-0000-0000-0000-000000000001"
    )
    assert result.code == 0
    uuids = [state.uuid for state in machine.snapshot()]
    assert {place.split()[1] for place in project.places().values()} <= {uuids[1], uuids[3]}
    assert next(line for line in result.said if line.startswith("  GPU")).startswith("  GPU 3 ")


@pytest.mark.parametrize(
    ("mode", "busy", "workers", "headline"),
    [
        (
            3,
            False,
            1,
            "1 GPU worker × 21.0 GB = 21.0 GB (limited by compute mode; preset no-ollama)",
        ),
        (3, True, 2, "2 CPU workers (GPU 0: its compute mode EXCLUSIVE_PROCESS keeps others out"),
        (2, False, 2, "2 CPU workers (GPU 0: its compute mode PROHIBITED lets no process in)"),
    ],
)
def test_compute_mode(
    mode: int,
    busy: bool,
    workers: int,
    headline: str,
    project: Project,
    machine_with: Callable[..., Machine],
) -> None:
    """A device that lets one process in gets one worker; one that lets none in gets none."""
    machine = machine_with(Device(total="24GB", used="2GB", compute_mode=mode), context="0MB")
    handle = machine.allocate(0, "1GB") if busy else None
    result = project.pytest(
        "--gpu-share", "--gpu-share-preset=no-ollama", PYTEST_XDIST_AUTO_NUM_WORKERS="2"
    )
    assert result.said[0].startswith(f"gpu-share: {headline}"), (result.said, handle)
    assert (result.code, result.workers, result.passed) == (0, workers, 4)


def test_index_names(project: Project, machine_with: Callable[..., Machine]) -> None:
    """`device_names = index` for tools that call int() on the variable."""
    machine_with(Device(used="1GB"), Device(used="1GB"))
    project.write(test_project=SHOW_PLACE)
    result = project.pytest("--gpu-share", "-o", "gpu_share_device_names=index")
    assert result.code == 0
    assert set(project.places().values()) == {"gpu 0", "gpu 1"}


CRASHING = """
    import os, pathlib, signal
    import pytest

    @pytest.mark.parametrize("i", range(12))
    def test_step(i, worker_id, gpu_share):
        pathlib.Path("places").mkdir(exist_ok=True)
        seen = os.environ["CUDA_VISIBLE_DEVICES"]
        assert gpu_share.device == seen
        with open("log.txt", "a") as log:
            print(os.environ["PYTEST_GPUSHARE_NUMBER"], seen, file=log)
        if i % 3 == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_crash(project: Project, machine_with: Callable[..., Machine]) -> None:
    """Every replacement of a killed worker has the dead one's device, up to the restart limit."""
    machine_with(Device(used="1GB"), Device(used="1GB"))
    project.write(test_project=CRASHING)
    result = project.pytest("--gpu-share", "-n2", "--max-worker-restart=4")
    assert "replacing crashed worker" in result.out
    assert len(re.findall(r"^FAILED|crashed while running", result.out, re.M)) >= 4
    lines = (project.path / "log.txt").read_text().split("\n")[:-1]
    devices = {tuple(line.split()) for line in lines}
    assert len(lines) >= 12
    assert {number for number, _ in devices} == {"0", "1"}
    assert len(devices) == 2


OVERWRITES = """
    import os

    def helper():
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    os.environ["CUDA_VISIBLE_DEVICES"] = "7"
"""


@pytest.mark.parametrize("mode", [["-n1"], ["-n0"]])
def test_overwritten_in_conftest(mode: list[str], project: Project, machine: Machine) -> None:
    """A conftest that sets the variable itself is told by file and line; strict fails the run."""
    project.write(conftest=OVERWRITES)
    result = project.pytest("--gpu-share", *mode)
    uuid = machine.snapshot()[0].uuid
    assert (result.code, result.passed) == (0, 4)
    who = "this process" if mode == ["-n0"] else "gw0"
    assert (
        f"gpu-share: {who} does not see the GPU that it was given: CUDA_VISIBLE_DEVICES was "
        f"{uuid}, is 7: changed by conftest.py:7" in result.out
    )
    strict = project.pytest("--gpu-share", *mode, "--gpu-share-strict")
    assert (strict.code, strict.passed) == (1, 4)
    assert "changed by conftest.py:7 (an error under --gpu-share-strict)" in strict.out


def test_overwritten_in_test_module(project: Project, machine: Machine) -> None:
    """The same where a test module does it, at its import."""
    project.write(
        test_project="""
            import os
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
            os.environ.update(CUDA_VISIBLE_DEVICES="0,1")

            def test_nothing():
                pass
        """
    )
    result = project.pytest("--gpu-share", "-n1", "--gpu-share-strict")
    assert result.code == 1
    assert "is 0,1: changed by test_project.py:" in result.out


def test_rival_hook(project: Project, machine: Machine) -> None:
    """A conftest with a placement of its own wins in its workers, and that is told."""
    project.write(
        conftest="""
            def pytest_xdist_setupnodes(config, specs):
                for spec in specs:
                    spec.env["CUDA_VISIBLE_DEVICES"] = "5"
        """,
        test_project=SHOW_PLACE,
    )
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (0, 8)
    assert set(project.places().values()) == {"gpu 5"}
    assert "is 5: changed by " in result.out


ASSIGNS = """
    import pytest

    @pytest.hookimpl({how})
    def pytest_xdist_setupnodes(config, specs):
        for spec in specs:
            spec.env = {{"OMP_NUM_THREADS": "1"}}
"""


@pytest.mark.parametrize("how", ["", "tryfirst=True", "trylast=True"])
@pytest.mark.parametrize("mark", ["", "@pytest.mark.gpu(vram='2GB')"])
def test_hook_that_assigns_an_environment(
    how: str, mark: str, project: Project, machine: Machine
) -> None:
    """A conftest that replaces `spec.env` keeps its variables, and the placement stands."""
    places = SHOW_PLACE.replace("def test", f"{mark}\n    def test")
    project.write(conftest=ASSIGNS.format(how=how), test_project=places)
    project.file(
        "test_variable.py",
        """
        import os

        def test_variable():
            assert os.environ["OMP_NUM_THREADS"] == "1"
        """,
    )
    result = project.pytest("--gpu-share", "-n1", "--gpu-share-strict")
    assert (result.code, result.passed) == (0, 9), result.out
    uuid = machine.snapshot()[0].uuid
    assert set(project.places().values()) == {f"gpu {uuid}"}


@pytest.mark.parametrize(
    "change",
    [
        "specs.append(execnet.XSpec('popen//id=added'))",
        "specs[0] = execnet.XSpec('popen//id=other')",
        "[spec.env.clear() for spec in specs]",
        "[setattr(spec, 'env', None) for spec in specs]",
    ],
)
def test_hook_that_changes_the_workers(change: str, project: Project, machine: Machine) -> None:
    """Whatever a hook does to the specs, each worker on this host has a place."""
    project.write(
        conftest=f"""
            import os, time
            import execnet

            # xdist counts no worker that a hook adds, so that another one may have collected first.
            if os.environ.get("PYTEST_XDIST_WORKER") == "gw0":
                time.sleep(1)

            def pytest_xdist_setupnodes(config, specs):
                {change}
        """,
        test_project=SHOW_PLACE.replace("def test", "@pytest.mark.gpu(vram='2GB')\n    def test"),
    )
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (0, 8), result.out
    uuid = machine.snapshot()[0].uuid
    assert set(project.places().values()) == {f"gpu {uuid}"}


def test_untouched_placement_is_no_news(project: Project, machine: Machine) -> None:
    """Strict does not fail a run in which nobody changed anything, nor does it say a word."""
    result = project.pytest("--gpu-share", "--gpu-share-strict")
    assert (result.code, "does not see" in result.out) == (0, False)


FIXTURE = """
    import pytest_gpushare

    def test_place(gpu_share):
        assert pytest_gpushare.current() == gpu_share
        print("PLACE", gpu_share.role, gpu_share.device, gpu_share.index, gpu_share.vram,
              gpu_share.planned, sorted(gpu_share.plan))
"""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-p", "no:xdist"], "PLACE unplanned None None 0 False []"),
        (["-n1"], "PLACE unplanned None None 0 False []"),
        (["--gpu-share"], "PLACE gpu {uuid} 0 4831838208 True"),
        (["--gpu-share", "-n0"], "PLACE gpu {uuid} 0 9663676416 True"),
        (
            ["--gpu-share", "-n1", "-o", "gpu_share_min_vram_per_worker_gb=30"],
            "PLACE cpu None None 0 True",
        ),
    ],
)
def test_fixture(arguments: list[str], line: str, project: Project, machine: Machine) -> None:
    """`gpu_share` tells role, device and slot, and says so where the plugin placed nothing."""
    project.write(test_project=FIXTURE)
    result = project.pytest(*arguments, "-rP")
    assert (result.code, result.passed) == (0, 1)
    assert line.format(uuid=machine.snapshot()[0].uuid) in result.out


INVISIBLE = """
    import os, pathlib, subprocess, sys, threading
    import pytest

    @pytest.fixture(autouse=True)
    def nothing_changes(tmp_path):
        # As Lightning's suite does: new variables, threads, files and children fail the test.
        before = dict(os.environ), set(threading.enumerate()), set(pathlib.Path().rglob("*"))
        yield
        after = dict(os.environ), set(threading.enumerate()), set(pathlib.Path().rglob("*"))
        assert {k for k, v in after[0].items() if before[0].get(k) != v} <= {"PYTEST_CURRENT_TEST"}
        assert not before[0].keys() - after[0].keys()
        assert {t for t in after[1] - before[1] if not t.daemon} == set()
        assert {p for p in after[2] - before[2] if "__pycache__" not in p.parts} == set()
        children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
        assert children == ""

    @pytest.mark.parametrize("i", range(4))
    def test_invisible(i, worker_id):
        assert worker_id in ("gw0", "gw1")
        # Not pynvml, by which a GPU worker reads what its own process holds.
        assert not {"httpx", "torch", "jax", "cupy", "tensorflow"} & set(sys.modules)
        # One that waits for a driver that hangs, started before the first test.
        ours = {t.name for t in threading.enumerate() if "gpu-share" in t.name}
        assert ours <= {"gpu-share-live"}
"""


def test_invisible_in_workers(project: Project, machine: Machine) -> None:
    """Strictest settings, warnings as errors, and a suite that watches its own surroundings."""
    project.write(test_project=INVISIBLE)
    strict = ("--strict-config", "--strict-markers", "-W", "error")
    result = project.pytest("--gpu-share", *strict, beside=["unraisableexception"])
    assert (result.code, result.passed, result.err) == (0, 4, ""), result.out


def test_caps_reach_the_workers(project: Project, machine: Machine) -> None:
    """The variables are there before the first import; `cap_vram = false` leaves them all out."""
    project.write(
        conftest="""
            import os
            NAMES = ("XLA_CLIENT_MEM_FRACTION", "CUPY_GPU_MEMORY_LIMIT")
            SEEN = [os.environ.get(name) for name in NAMES]
        """,
        test_project="""
            from conftest import SEEN
            def test_caps():
                print("CAPS", *SEEN)
        """,
    )
    assert f"CAPS 0.163085 {4008 * 2**20}" in project.pytest("--gpu-share", "-rP").out
    off = project.pytest("--gpu-share", "-n1", "-rP", "-o", "gpu_share_cap_vram=false")
    assert "CAPS None None" in off.out
    mine = project.pytest("--gpu-share", "-rP", XLA_CLIENT_MEM_FRACTION=".1")
    assert f"CAPS .1 {4008 * 2**20}" in mine.out


HOOKS = """
    from dataclasses import replace
    from pytest_gpushare.gpu.devices import Device

    def pytest_gpushare_devices(config):
        gb = 2**30
        return [Device("NPU-0", "npu", "npu0", 16 * gb, 0, 16 * gb, variable="NPU_VISIBLE_DEVICES")]

    def pytest_gpushare_plan(config, plan):
        return replace(plan, slots=plan.slots[:3])
"""


def test_hooks(project: Project, machine: Machine) -> None:
    """A conftest adds a device that NVML does not know and has a last word on the plan."""
    project.write(
        conftest=HOOKS,
        test_project=SHOW_PLACE.replace('"CUDA_VISIBLE_DEVICES"', '"NPU_VISIBLE_DEVICES"'),
    )
    result = project.pytest("--gpu-share", "-o", "gpu_share_ollama_gpu=0")
    assert (result.code, result.workers) == (0, 3), result.out
    assert "  GPU npu0 npu: total 16.0 GB, available 16.0 GB" in result.said
    # The workers of GPU 0 do not see the other device.
    assert set(project.places().values()) == {"gpu ", "gpu NPU-0"}


ERRING = [
    ("def pytest_gpushare_plan(config, plan): return 3", "gave no plan but int"),
    ("def pytest_gpushare_devices(config): return ['0']", "something else than"),
    (
        "from dataclasses import replace\n"
        "def pytest_gpushare_plan(config, plan): return replace(plan, slots=plan.slots * 5)",
        "promises 45.0 GB on GPU 0, where 22.0 GB are free",
    ),
    (
        "from dataclasses import replace\n"
        "def pytest_gpushare_plan(config, plan):\n"
        "    return replace(plan, slots=(replace(plan.slots[0], vram=-5),))",
        "gave a slot of -5 bytes: give more than 0",
    ),
    (
        "from pytest_gpushare.gpu.devices import Device\n"
        "def pytest_gpushare_devices(config): return [Device('X', 'x', 'x', 16e9, 0, 16e9)]",
        "gave X with total, used, free = (16000000000.0, 0, 16000000000.0)",
    ),
    (
        "from pytest_gpushare.gpu.devices import Device\n"
        "def pytest_gpushare_devices(config): return [Device('X', 'x', 'x', 1, 0, 1)] * 2",
        "names X a second time",
    ),
]


def test_hooks_that_err(project: Project, machine: Machine) -> None:
    """What a hook gives is checked: an error names the hook, and no test is run."""
    cases = {message: Case({"conftest.py": hook}) for hook, message in ERRING}
    for message, result in run_all(cases, project.path, project.environment).items():
        assert (result.code, result.passed, result.places) == (4, 0, []), message
        assert message in result.err
        assert "Traceback" not in result.err


def test_hook_that_leaves_no_slot(project: Project, machine: Machine) -> None:
    """A last word without GPU workers means CPU workers, and says who decided."""
    project.write(
        conftest="""
            from dataclasses import replace

            def pytest_gpushare_plan(config, plan):
                return replace(plan, slots=())
        """,
        test_project=SHOW_PLACE,
    )
    result = project.pytest("--gpu-share", PYTEST_XDIST_AUTO_NUM_WORKERS="2")
    assert (result.code, result.workers) == (0, 2)
    assert result.said[0] == (
        "gpu-share: 2 CPU workers (a pytest_gpushare_plan hook left no GPU worker)"
    )
    assert set(project.places().values()) == {"cpu "}


def test_forked(project: Project, machine: Machine) -> None:
    """pytest-forked runs each test in a child of the worker, which sees the worker's device."""
    pytest.importorskip("pytest_forked", reason="pytest-forked is not installed here")
    project.write(test_project=SHOW_PLACE)
    if project.pytest("--forked", "-p", "no:randomly").code:
        pytest.skip("pytest-forked does not work with this pytest")
    result = project.pytest("--gpu-share", "--forked")
    assert (result.code, result.passed) == (0, 8), result.out
    assert set(project.places().values()) >= {f"gpu {machine.snapshot()[0].uuid}"}
