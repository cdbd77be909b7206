"""What workers measure on a real GPU, the cap of one test, and out of memory in its real words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import MB, Project, needs

HEAD = """
    import inside
    import pytest
    import pytest_gpushare

    SLOT = pytest_gpushare.current().vram
    MB = 1024**2
"""

# The conftest of each: what workers tell is noted in the controller.
LISTEN = """
import inside
from pytest_gpushare import plugin

def pytest_sessionstart(session):
    run = session.config.stash.get(plugin.RUN, None)
    if run is not None and not hasattr(session.config, "workerinput"):
        run.links.on("test", lambda worker, told: inside.note(**{**told, "worker": worker}))
"""

PEAKS = {
    "torch": """
    import torch

    def take(size):
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def test_up():
        take(1)

    def test_peak():
        part = take(600 * MB)
        del part
        take(200 * MB)

    def test_after_the_peak():
        take(200 * MB)
""",
    "cupy": """
    import cupy

    def test_up():
        cupy.empty(1, dtype="uint8")

    def test_peak():
        cupy.empty(600 * MB, dtype="uint8")

    def test_after_the_peak():
        cupy.empty(600 * MB, dtype="uint8")
""",
    "jax": """
    import jax

    def take(size):
        return jax.numpy.ones(size, dtype="uint8").block_until_ready()

    def test_up():
        take(1)

    def test_peak():
        take(600 * MB)

    def test_after_the_peak():
        take(200 * MB)
""",
}


@pytest.mark.parametrize("framework", PEAKS)
def test_peaks(framework: str, project: Project, figure: Callable[[str], None]) -> None:
    """A test's peak by the framework's own counters, and not that of the test before."""
    needs(framework)
    (project.path / "conftest.py").write_text(LISTEN)
    result = project.pytest(HEAD + PEAKS[framework], "-n1").passed()
    told = {note["nodeid"].rpartition("::")[2]: note for note in result.notes}
    peak = told["test_peak"]
    assert 600 * MB <= peak["peak"] <= 700 * MB, told
    assert peak["exact"]
    assert told["test_after_the_peak"]["peak"] <= peak["peak"]
    assert peak["left"] <= 16 * MB
    figure(f"{peak['peak'] // MB} MB told of 600 MB taken")


NEED = """
    import torch

    @pytest.mark.gpu
    def test_up():
        torch.empty(1, device="cuda")
        inside.note(what="usual", share=torch.cuda.get_per_process_memory_fraction())

    @pytest.mark.gpu(vram="1300MB")
    def test_small():
        torch.empty(300 * MB, dtype=torch.uint8, device="cuda")
        torch.cuda.empty_cache()
        refused = ""
        try:
            torch.empty(1000 * MB, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError as error:
            refused = str(error)
        share = torch.cuda.get_per_process_memory_fraction()
        inside.note(what="small", share=share, refused=refused)

    @pytest.mark.gpu
    def test_back():
        inside.note(what="back", share=torch.cuda.get_per_process_memory_fraction())
"""


def test_cap_of_one_test(project: Project, figure: Callable[[str], None]) -> None:
    """The share of torch follows a test's need, bites, and is back after it."""
    needs("torch")
    packed = ("--gpu-share-preset=packed", "-o", "gpu_share_min_vram_per_worker_gb=1.5")
    result = project.pytest(HEAD + NEED, "-n1", *packed).passed()
    found = {note["what"]: note for note in result.notes}
    assert "out of memory" in found["small"]["refused"]
    assert found["small"]["share"] < found["usual"]["share"]
    assert found["back"]["share"] == pytest.approx(found["usual"]["share"], abs=1e-4)
    figure(f"share {found['small']['share']:.3f} of {found['usual']['share']:.3f}")


ERRORS = {
    "torch": """
    import torch

    def fails():
        torch.empty(2**44, dtype=torch.uint8, device="cuda")
""",
    "torch's own count": """
    import torch

    def fails():
        kept = []
        while True:
            kept.append(torch.empty(512 * MB, dtype=torch.uint8, device="cuda"))
""",
    "cupy": """
    import cupy

    def fails():
        cupy.empty(2**44, dtype="uint8")
""",
    "jax": """
    import jax

    def fails():
        jax.numpy.ones(2**40, dtype="uint8").block_until_ready()
""",
    "tensorflow": """
    import tensorflow as tf

    def fails():
        with tf.device("GPU:0"):
            tf.zeros([2**40], dtype=tf.uint8)
""",
}
RECOGNISE = """
    from pytest_gpushare.worker.oom_retry import ran_out

    def test_recognised():
        said = None
        try:
            fails()
        except Exception as error:
            said = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
            inside.note(said=said[:300], recognised=ran_out(error))
        assert said is not None
"""


@pytest.mark.parametrize("what", ERRORS)
def test_out_of_memory(what: str, project: Project, figure: Callable[[str], None]) -> None:
    """What the framework raises on this GPU is taken for out of memory."""
    needs(what.partition("'")[0])
    note = project.pytest(HEAD + ERRORS[what] + RECOGNISE, "-n1").passed().note
    assert note["recognised"], note["said"]
    figure(note["said"].split("\n")[0][:100])


ALONE = """
    import pathlib, time
    import torch

    def meet(name, other):
        pathlib.Path(name).touch()
        end = time.monotonic() + 60
        while not pathlib.Path(other).exists() and time.monotonic() < end:
            time.sleep(0.01)

    def most():
        # Two of these do not fit at once.
        return torch.cuda.get_device_properties(0).total_memory * FREE // 1000 * 6 // 10

    def test_holds():
        torch.empty(1, device="cuda")
        held = torch.empty(most(), dtype=torch.uint8, device="cuda")
        meet("one", "other")
        time.sleep(3)

    def test_needs_as_much():
        torch.empty(1, device="cuda")
        meet("other", "one")
        torch.empty(most(), dtype=torch.uint8, device="cuda")
"""


def test_alone(project: Project) -> None:
    """Two tests that do not fit together: one runs out of memory, and passes alone."""
    needs("torch")
    card = project.card
    body = ALONE.replace("FREE", str(card.free * 1000 // card.total))
    uncapped = ("-o", "gpu_share_cap_vram=false", "-o", "gpu_share_safety_buffer_mb=0")
    result = project.pytest(HEAD + body, "-n2", *uncapped).passed()
    assert "passed alone" in result.text, result.text
