"""Needs of VRAM with real workers: admitted, refused by name, packed, waited for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from simulator import Device, Machine

from .conftest import Project

GB = 2**30
NO_OLLAMA = ("--gpu-share", "--gpu-share-preset=no-ollama")
ONE = ("-o", "gpu_share_max_workers_per_gpu=1")
PACKED = (*NO_OLLAMA, "--gpu-share-preset=packed", "-o", "gpu_share_safety_buffer_mb=0")

REFUSED = """
    import gpusim
    import pytest

    @pytest.mark.gpu(vram="30GB")
    def test_huge():
        raise AssertionError("never run")

    @pytest.mark.gpu(vram="2GB", devices=2)
    def test_pair():
        raise AssertionError("never run")

    @pytest.mark.xfail
    @pytest.mark.gpu(vram="40GB")
    def test_expected_to_fail():
        raise AssertionError("never run")

    @pytest.mark.gpu(vram="4GB")
    @pytest.mark.parametrize("i", range(3))
    def test_fits(i):
        with gpusim.alloc("3GB"):
            pass

    @pytest.mark.gpu(required=True)
    def test_required():
        pass

    def test_plain():
        pass
"""


def test_refused_by_name(project: Project, machine_with: Callable[..., Machine]) -> None:
    """What never fits fails at its place with the reason; others run."""
    machine_with(Device(total="24GB", used="2GB"), Device(total="24GB", used="2GB"))
    project.write(test_project=REFUSED)
    result = project.pytest("--gpu-share", "-v", "--junitxml=junit.xml")
    assert (result.code, result.passed) == (1, 5), result.out
    assert "scheduling tests via GpuShareScheduling" in result.out
    assert "3 failed" in result.out
    told = re.findall(r"^FAILED test_project\.py::(\w+)", result.out, re.M)
    assert set(told) == {"test_huge", "test_pair", "test_expected_to_fail"}
    assert "30.0 GB" in result.out
    assert "9.0 GB" in result.out
    assert "gpu_share_visible_devices" in result.out
    junit = Path(project.path, "junit.xml").read_text()
    assert 'failures="3"' in junit
    assert "never run" not in junit


def test_refused_in_the_process_itself(project: Project, machine: Machine) -> None:
    """Without workers the same tests fail by name, and the others run."""
    project.write(test_project=REFUSED)
    result = project.pytest("--gpu-share", "-n", "0")
    assert (result.code, result.passed) == (1, 5), result.out
    assert "3 failed" in result.out
    assert "needs 30.0 GB of VRAM (by marker), and the budget is 9.0 GB" in result.out
    assert "needs 2 devices, and this process sees 1 device" in result.out


WRONG_IN_CLASS = """
    import pytest

    class TestWrong:
        @pytest.mark.gpu(memory="2GB")
        @pytest.mark.parametrize("i", range(3))
        def test_keyword(self, i):
            raise AssertionError("never run")
"""

WRONG = """
    import pytest

    @pytest.mark.gpu(vram=6)
    def test_without_unit():
        raise AssertionError("never run")

    def test_plain():
        pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_wrong_markers(workers: str, project: Project, machine: Machine) -> None:
    """Errors of the collection, one for each marker; the code is pytest's for any such error."""
    project.write(test_project=WRONG, test_in_class=WRONG_IN_CLASS)
    result = project.pytest("--gpu-share", "-n", workers)
    assert result.passed == 0
    assert "2 errors" in result.out
    assert result.out.count(": @pytest.mark.gpu(memory='2GB'): unknown keyword memory") == 1
    assert "gpu-share: test_project.py::test_without_unit: @pytest.mark.gpu(vram=6): " in result.out
    project.write(test_project="1 / 0", test_in_class="1 / 0")
    assert result.code == project.pytest("-n", workers).code


def test_wrong_markers_of_a_hook(project: Project, machine: Machine) -> None:
    """A marker that is added after the collection fails its test alone."""
    project.write(
        test_project="def test_a():\n    pass\n\ndef test_b():\n    pass\n",
        conftest="""
            import pytest

            def pytest_collection_modifyitems(items):
                items[0].add_marker(pytest.mark.gpu(vram=6))
        """,
    )
    result = project.pytest("--gpu-share", "-n1")
    assert (result.code, result.passed) == (1, 1), result.out
    assert "@pytest.mark.gpu(vram=6): " in result.out


@pytest.mark.parametrize(
    ("setting", "outcomes"),
    [
        ("run", "1 failed, 6 passed, 1 xpassed"),
        ("skip", "1 failed, 1 passed, 6 skipped"),
        ("fail", "7 failed, 1 passed"),
    ],
)
def test_without_any_gpu(
    setting: str, outcomes: str, project: Project, machine_with: Callable[..., Machine]
) -> None:
    """The fall-back does with GPU tests as `without_gpu` says; required ones fail always."""
    machine_with(Device(total="10GB", used="0.5GB"))
    text = REFUSED.replace("raise AssertionError", "print").replace(
        "with gpusim.alloc", "with open(__file__) or "
    )
    project.write(test_project=text)
    result = project.pytest("--gpu-share", "-n", "1", "-o", f"gpu_share_without_gpu={setting}")
    assert result.code == 1, result.out
    assert outcomes in result.out
    assert "it requires a GPU: insufficient VRAM per worker: 0.0 GB usable" in result.out


PACKING = """
    import time
    import gpusim
    import pytest

    SIZES = [2, 3, 9, 4, 12, 2, 5, 3, 7, 2, 10, 4]

    @pytest.mark.parametrize(
        "size",
        [pytest.param(s, marks=pytest.mark.gpu(vram=f"{s}GB")) for s in SIZES],
    )
    def test_pack(size):
        start = time.time()
        with gpusim.alloc(f"{size}GB"):
            time.sleep(0.3)
        with open("spans.txt", "a") as file:
            print(start, time.time(), size, file=file)
"""


def most_at_once(spans: list[tuple[float, float, float]]) -> tuple[int, float]:
    """The most tests, and the most GB, that ran at one moment."""
    moments = [start for start, _, _ in spans]
    running = [[size for start, end, size in spans if start <= at < end] for at in moments]
    return max(map(len, running)), max(map(sum, running))


def test_packed(project: Project, machine_with: Callable[..., Machine]) -> None:
    """The preset packs tests by their needs, and never beyond the card."""
    machine = machine_with(Device(total="24GB", used="0GB"), context="0MB")
    project.write(test_project=PACKING)
    result = project.pytest(*PACKED, "-n", "6")
    assert (result.code, result.passed, result.workers) == (0, 12, 6), result.out
    state = machine.snapshot()[0]
    assert state.oom_count == 0
    assert state.peak_used <= 24 * GB
    spans = [
        tuple(map(float, line.split()))
        for line in Path(project.path, "spans.txt").read_text().splitlines()
    ]
    count, size = most_at_once(spans)  # type: ignore[arg-type]
    assert count >= 3
    assert size > 12


PAIRS = """
    import os, time
    import gpusim
    import pytest

    @pytest.mark.gpu(vram="4GB", devices=2)
    @pytest.mark.parametrize("i", range(3))
    def test_pair(i):
        seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(seen) == 2
        with gpusim.alloc("3GB", device=0), gpusim.alloc("3GB", device=1):
            time.sleep(0.05)

    @pytest.mark.gpu(vram="3GB")
    @pytest.mark.parametrize("i", range(6))
    def test_one(i):
        with gpusim.alloc("2GB"):
            time.sleep(0.05)
"""


def test_several_devices(project: Project, machine_with: Callable[..., Machine]) -> None:
    """Under `visible_devices = all` a test gets all its devices at once."""
    machine = machine_with(
        Device(total="8GB", used="0GB"), Device(total="8GB", used="0GB"), context="100MB"
    )
    project.write(test_project=PAIRS)
    result = project.pytest(*PACKED, "-n", "4", "-o", "gpu_share_visible_devices=all")
    assert (result.code, result.passed) == (0, 9), result.out
    assert [state.oom_count for state in machine.snapshot()] == [0, 0]


GROUPED = """
    import os, time
    import pytest

    def note():
        with open("log.txt", "a") as log:
            role, worker = os.environ["PYTEST_GPUSHARE_ROLE"], os.environ["PYTEST_XDIST_WORKER"]
            test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
            print(test, role, worker, file=log)

    class TestA:
        def test_one(self): note()
        def test_two(self): note()
        @pytest.mark.gpu
        def test_gpu(self): note()
        @pytest.mark.gpu
        def test_gpu_too(self): note()

    @pytest.mark.xdist_group("together")
    def test_b(): note()

    @pytest.mark.gpu
    @pytest.mark.xdist_group("together")
    def test_gpu_b(): note()

    @pytest.mark.gpu
    @pytest.mark.xdist_group("together")
    def test_gpu_c(): note()
"""


@pytest.mark.parametrize("dist", ["loadscope", "loadfile", "loadgroup", "worksteal"])
def test_dist_within_each_kind(dist: str, project: Project, machine: Machine) -> None:
    """What xdist keeps on one worker stays on one worker of each kind."""
    (project.path / "test_project.py").unlink()
    project.write(**{f"test_{name}": GROUPED for name in ("one", "two", "three")})
    result = project.pytest("--gpu-share", "-o", "gpu_share_cpu_workers=2", "--dist", dist)
    assert (result.code, result.passed) == (0, 21), result.out
    places: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for line in Path(project.path, "log.txt").read_text().splitlines():
        test, role, worker = line.split()
        marked = "gpu" in test
        assert role == "gpu" or not marked
        key = {
            "loadscope": test.rpartition("::")[0],
            "loadfile": test.partition("::")[0],
            # Node ids tell of no groups in pytest 9.2.
            "loadgroup": "together" if "_b" in test or "_c" in test else test,
            "worksteal": test,
        }[dist]
        places[key, marked].add(worker)
    assert {len(workers) for workers in places.values()} == {1}, places


ORDERED = """
    import pytest

    def note(name):
        with open("order.txt", "a") as file:
            print(name, file=file)

    class TestSmall:
        def test_one(self): note("small")
        @pytest.mark.gpu(vram="1GB")
        def test_gpu(self): note("gpu small")

    class TestLarge:
        def test_one(self): note("large")
        def test_two(self): note("large")
        @pytest.mark.gpu(vram="2GB")
        def test_gpu(self): note("gpu large")
"""


def test_groups_in_the_order_of_collection(project: Project, machine: Machine) -> None:
    """xdist's --no-loadscope-reorder holds for both kinds of worker."""
    project.write(test_project=ORDERED)
    options = ("--dist=loadscope", "-o", "gpu_share_cpu_workers=1", *ONE, "--no-loadscope-reorder")
    result = project.pytest("--gpu-share", *options)
    if "unrecognized arguments: --no-loadscope-reorder" in result.err:
        pytest.skip("this xdist always reorders")
    assert (result.code, result.passed) == (0, 5), result.out
    order = (project.path / "order.txt").read_text().splitlines()
    assert [name for name in order if "gpu" not in name] == ["small", "large", "large"]
    assert [name for name in order if "gpu" in name] == ["gpu small", "gpu large"]


PRESSURE = """
    import pathlib, time
    import gpusim
    import pytest

    # It gives back less than the others lack, so that they do not wait for that to come.
    @pytest.mark.gpu(vram="1GB")
    def test_before():
        pathlib.Path("started").touch()
        while not pathlib.Path("taken").exists():
            time.sleep(0.02)
        # Free VRAM is read every 50 ms.
        time.sleep(0.2)

    @pytest.mark.gpu(vram="4GB")
    @pytest.mark.parametrize("i", range(3))
    def test_gpu(i):
        with gpusim.alloc("2GB"):
            pass
"""
TAKING = """
    import os, pathlib, threading, time
    from simulator import Machine

    def take():
        while not pathlib.Path("started").exists():
            time.sleep(0.02)
        machine = Machine.open()
        machine.set_used(0, "22GB")
        pathlib.Path("taken").touch()
        if os.environ.get("FOR"):
            time.sleep(float(os.environ["FOR"]))
            machine.set_used(0, "2GB")

    def pytest_sessionstart(session):
        # Another program on this machine takes VRAM while the tests run.
        if not hasattr(session.config, "workerinput"):
            threading.Thread(target=take, daemon=True).start()
"""


def test_pressure_is_waited_out(project: Project, machine: Machine) -> None:
    """While others hold the VRAM no GPU test starts; when it comes back, all run."""
    project.write(test_project=PRESSURE, conftest=TAKING)
    result = project.pytest(*NO_OLLAMA, *ONE, FOR="1.5")
    assert (result.code, result.passed) == (0, 4), result.out
    assert machine.snapshot()[0].oom_count == 0


@pytest.mark.parametrize(
    ("setting", "outcome"), [("fail", "3 failed, 1 passed"), ("skip", "1 passed, 3 skipped")]
)
def test_pressure_that_lasts(
    setting: str, outcome: str, project: Project, machine: Machine
) -> None:
    """After the limit the run goes on as `without_gpu` says, with the figures."""
    project.write(test_project=PRESSURE, conftest=TAKING)
    options = ("-o", "gpu_share_pressure_timeout_s=1", "-o", f"gpu_share_without_gpu={setting}")
    result = project.pytest(*NO_OLLAMA, *ONE, *options, "-rs")
    assert outcome in result.out, result.out
    assert "4.0 GB" in result.out


KEEPING = """
    import os, time
    import gpusim
    import pytest

    @pytest.fixture(scope="{scope}")
    def model():
        with gpusim.alloc("5GB"):
            yield

    @pytest.mark.gpu(vram="6GB")
    @pytest.mark.parametrize("i", range(2))
    def test_keeps(model, i):
        time.sleep(0.1)
"""
LARGE = """
    import time
    import gpusim
    import pytest

    @pytest.mark.gpu(vram="7GB")
    @pytest.mark.parametrize("i", range(2))
    def test_large(i):
        with gpusim.alloc("6GB"):
            time.sleep(0.1)
"""


APART = """
    import os

    def pytest_collection_modifyitems(items):
        # Each worker knows the tests of one module alone.
        own = {"gw0": "test_a", "gw1": "test_b"}.get(os.environ.get("PYTEST_XDIST_WORKER"), "")
        items[:] = [item for item in items if item.nodeid.startswith(own)]
"""


def test_workers_of_one_kind_that_collect_different_tests(
    project: Project, machine: Machine
) -> None:
    """An error, as under xdist's own scheduler; between the kinds it is none."""
    (project.path / "test_project.py").unlink()
    project.write(test_a=KEEPING.format(scope="module"), test_b=LARGE, conftest=APART)
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed) == (1, 0), result.out
    assert re.search("Different tests were collected between gw[01] and gw[01]", result.out)
    project.write(test_b="def test_one(): pass\ndef test_two(): pass\n")
    one_of_each = ("-o", "gpu_share_max_workers_per_gpu=1", "-o", "gpu_share_cpu_workers=1")
    result = project.pytest("--gpu-share", *one_of_each)
    assert (result.code, result.passed) == (0, 4), result.out


@pytest.mark.parametrize("scope", ["module", "session"])
def test_what_fixtures_keep(scope: str, project: Project, machine: Machine) -> None:
    """VRAM of a fixture that lives on is no room for others; it is given back in their favour."""
    (project.path / "test_project.py").unlink()
    project.write(test_a=KEEPING.format(scope=scope), test_b=LARGE)
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed, result.workers) == (0, 4, 2), result.out
    assert machine.snapshot()[0].oom_count == 0


UNKNOWN_NEEDS = """
    import time
    import gpusim
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(8))
    def test_unknown(i):
        start = time.time()
        with gpusim.alloc("3GB"):
            time.sleep(0.4)
        with open("spans.txt", "a") as file:
            print(start, time.time(), 3, file=file)
"""


@pytest.mark.parametrize("marked", [True, False])
def test_packed_takes_an_unknown_need_for_a_slot(
    marked: bool, project: Project, machine: Machine
) -> None:
    """Tests that declare nothing, on the first run: no more at once than without the preset.

    4 workers share 9 GB, but a test may hold the 4.5 GB that a slot would be.
    """
    text = UNKNOWN_NEEDS if marked else UNKNOWN_NEEDS.replace("@pytest.mark.gpu\n    ", "")
    project.write(test_project=text)
    result = project.pytest(
        "--gpu-share", "--gpu-share-preset=packed", PYTEST_XDIST_AUTO_NUM_WORKERS="4"
    )
    assert (result.code, result.passed, result.workers) == (0, 8, 4), result.out
    lines = (project.path / "spans.txt").read_text().splitlines()
    count, size = most_at_once([tuple(map(float, line.split())) for line in lines])
    assert (count, size) == (2, 6)
    assert machine.snapshot()[0].oom_count == 0
