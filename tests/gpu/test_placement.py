"""Each worker sees its device and no other: as CUDA's driver says, and as frameworks say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Project, bare, needs

DRIVER = """
    import inside, pytest

    @pytest.mark.parametrize("i", range(4))
    def test_place(i):
        inside.note(**inside.placement())
"""
TORCH = """
    import inside, os, pytest, torch

    @pytest.mark.parametrize("i", range(4))
    def test_place(i):
        assert torch.cuda.is_available()
        properties = torch.cuda.get_device_properties(0)
        inside.note(count=torch.cuda.device_count(), visible=os.environ["CUDA_VISIBLE_DEVICES"],
                    uuid=str(getattr(properties, "uuid", "")))
"""
JAX = """
    import inside, jax, pytest

    @pytest.mark.parametrize("i", range(4))
    def test_place(i):
        inside.note(count=len(jax.devices("gpu")), **inside.placement())
"""


def test_driver_sees_the_slot(project: Project, figure: Callable[[str], None]) -> None:
    """The CUDA driver shows each of 2 workers one device, the one of its variable."""
    notes = project.pytest(DRIVER, "-n2").passed().notes
    assert {note["worker"] for note in notes} == {"gw0", "gw1"}
    for note in notes:
        assert (note["role"], note["visible"]) == ("gpu", project.card.uuid)
        assert note["seen"] == [bare(project.card.uuid)]
    figure(f"slots of {notes[0]['slot'] / 1024**3:.2f} GB")


def test_torch_sees_the_slot(project: Project) -> None:
    """Torch counts one device in each of 2 workers, with the UUID of CUDA_VISIBLE_DEVICES."""
    needs("torch")
    notes = project.pytest(TORCH, "-n2").passed().notes
    assert {note["worker"] for note in notes} == {"gw0", "gw1"}
    assert {(note["count"], note["visible"]) for note in notes} == {(1, project.card.uuid)}
    if not notes[0]["uuid"]:
        pytest.skip("this torch tells one device, but not its UUID")
    assert {note["uuid"] for note in notes} == {bare(project.card.uuid)}


def test_jax_sees_the_slot(project: Project) -> None:
    """JAX counts one device in each of 2 workers."""
    needs("jax")
    notes = project.pytest(JAX, "-n2").passed().notes
    assert {(note["count"], note["role"]) for note in notes} == {(1, "gpu")}


def test_several_devices(project: Project) -> None:
    """With several devices, workers are dealt over them, one device each."""
    everything = (project.card.uuid, *project.card.others)
    if len(everything) < 2:
        pytest.skip("one device only")
    notes = project.pytest(DRIVER, "-n2", CUDA_VISIBLE_DEVICES=",".join(everything)).passed().notes
    by_worker = {note["worker"]: (note["device"], tuple(note["seen"])) for note in notes}
    assert len(set(by_worker.values())) == 2
    assert all(seen == (bare(device),) for device, seen in by_worker.values())


def test_without_workers(project: Project) -> None:
    """With -n 0 the process itself is placed, and CUDA shows it one device."""
    notes = project.pytest(DRIVER, "-n0").passed().notes
    assert {(n["worker"], n["role"], n["visible"]) for n in notes} == {
        ("main", "gpu", project.card.uuid)
    }
    assert notes[0]["seen"] == [bare(project.card.uuid)]


def test_index_names(project: Project) -> None:
    """A device that is named by its index is the device of the plan."""
    if project.card.uuid.startswith("MIG-"):
        pytest.skip("MIG instances have no index that CUDA knows")
    notes = project.pytest(DRIVER, "-n2", "-o", "gpu_share_device_names=index").passed().notes
    assert all(note["visible"].isdigit() for note in notes)
    assert {(note["device"], *note["seen"]) for note in notes} == {
        (project.card.uuid, bare(project.card.uuid))
    }


def test_cpu_workers_see_nothing(project: Project) -> None:
    """Where no slot fits, CUDA shows the workers no device."""
    huge = f"gpu_share_min_vram_per_worker_gb={project.card.total // 1024**3 + 1}"
    notes = project.pytest(DRIVER, "-n2", "-o", huge).passed().notes
    assert {(note["role"], note["visible"]) for note in notes} == {("cpu", "")}
    assert [note["seen"] for note in notes] == [[]] * 4


CRASH = """
    import inside, os, pytest, signal

    @pytest.mark.parametrize("i", range(4))
    def test_crash(i):
        context = inside.Context()
        if i == 0:
            before = context.free()
            context.take(512 * 1024**2)
            inside.note(pid=os.getpid(), took=before - context.free(), **inside.placement())
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        inside.note(pid=os.getpid(), free=context.free(), **inside.placement())
"""


def test_crash(project: Project, figure: Callable[[str], None]) -> None:
    """A worker killed while it holds VRAM is replaced by one on the same device."""
    result = project.pytest(CRASH, "-n1")
    assert "replacing crashed worker" in result.text
    assert "1 failed, 3 passed" in result.text
    first, *later = result.notes
    assert {note["pid"] for note in later} - {first["pid"]}
    assert {(n["device"], n["slot"], *n["seen"]) for n in result.notes} == {
        (first["device"], first["slot"], bare(project.card.uuid))
    }
    assert first["took"] >= 512 * 1024**2
    figure(f"{later[-1]['free'] // 1024**2} MB free after the replacement's context")
