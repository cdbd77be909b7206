"""Caps in the real frameworks, where they are installed (`tox -e frameworks`)."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import pytest
from simulator import Machine

from .conftest import Project

TORCH = """
    import os
    import torch

    def test_torch(gpu_share):
        assert not torch.cuda.is_initialized()
        queued = [str(call) for call in torch.cuda._queued_calls]
        print("QUEUED", sum("_cap_torch" in call for call in queued))
        names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
        print("CONF", *map(os.environ.get, names))
"""
JAX = """
    import os
    import jax

    def test_jax():
        assert int(jax.numpy.arange(4).sum()) == 6
        from jaxlib import xla_client
        options = xla_client.generate_pjrt_gpu_plugin_options()
        print("JAX", options["memory_fraction"], options["preallocate"])
"""


def test_torch_takes_the_allocator_setting(project: Project, machine: Machine) -> None:
    """The user's settings and ours in one variable, and torch imports under it."""
    version = importlib.metadata.version("torch") if _has("torch") else "0.0"
    if tuple(map(int, version.split(".")[:2])) < (2, 10):
        pytest.skip("torch 2.10 or newer is not installed here")
    project.write(test_project=TORCH)
    result = project.pytest(
        "--gpu-share", "-rP", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
    )
    assert (result.code, result.passed) == (0, 1), result.out
    assert (
        "CONF expandable_segments:True,per_process_memory_fraction:0.163085 "
        "expandable_segments:True" in result.out
    )
    assert f"capped: torch {version}: 3.91 GB" in project.pytest("--gpu-share", "-v").out


def test_torch_keeps_the_call_until_cuda_is_up(project: Project, machine: Machine) -> None:
    """The way of torch before 2.10, run on the torch that is installed; CUDA stays down."""
    pytest.importorskip("torch", reason="torch is not installed here", exc_type=ImportError)
    project.write(test_project=TORCH)
    result = project.pytest("-rP", PYTEST_GPUSHARE_TORCH_FRACTION="0.25")
    assert (result.code, result.passed) == (0, 1), result.out
    assert "QUEUED 1" in result.out


REAL = """
    import inspect
    import torch
    from pytest_gpushare.worker import counters, oom_retry

    def test_counters():
        cuda = torch.cuda
        assert torch.OutOfMemoryError.__module__ == "torch"
        assert oom_retry.ran_out(torch.cuda.OutOfMemoryError("x")) == "OutOfMemoryError: x"
        assert cuda.memory_stats_as_nested_dict() == {}
        for name, count in {
            "reset_peak_memory_stats": 1,
            "empty_cache": 0,
            "set_per_process_memory_fraction": 2,
            "get_per_process_memory_fraction": 1,
        }.items():
            assert len(inspect.signature(getattr(cuda, name)).parameters) == count
        counters.empty()
        assert counters.counts(reset=True) is None
        assert not cuda.is_initialized()
        try:
            torch.empty(1 << 50, dtype=torch.uint8)
        except RuntimeError as error:
            # The host's memory, in torch's own words.
            assert oom_retry.ran_out(error) == ""
"""


def test_torch_has_what_is_asked_of_it(project: Project, machine: Machine) -> None:
    """The names by which it counts, caps and fails; asking for them does not bring CUDA up."""
    if not _has("torch"):
        pytest.skip("torch is not installed here")
    project.write(test_project=REAL)
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed) == (0, 1), result.out


def test_jax_reads_the_fraction(project: Project, machine: Machine) -> None:
    """What JAX hands to its GPU plugin is the cap's fraction, without preallocation."""
    if not _has("jax"):
        pytest.skip("jax is not installed here")
    project.write(test_project=JAX)
    result = project.pytest("--gpu-share", "-rP")
    assert (result.code, result.passed) == (0, 1), result.out
    assert "JAX 0.163085 false" in result.out.replace("False", "false")


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_versions_are_read_without_importing(project: Project, machine: Machine) -> None:
    """By metadata alone: a torch whose import fails is told with its version all the same."""
    if _has("torch"):
        pytest.skip("a real torch is installed here")
    site = project.path / "site"
    for name, version in (("torch", "2.11.0"), ("cupy_cuda12x", "13.6.0")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
    for module in ("torch", "cupy"):
        (site / f"{module}.py").write_text("raise RuntimeError('imported')\n")
    path = f"{project.environment['PYTHONPATH']}:{site}"
    result = project.pytest("--gpu-share", "-v", PYTHONPATH=path)
    assert result.code == 0
    assert any(
        line.endswith("VRAM 4.5 GB, capped: torch 2.11.0: 3.91 GB, CuPy 13.6.0: 3.91 GB")
        for line in result.said
    ), (result.said, sys.version)


def test_tensorflow_is_capped_when_its_context_comes_up(project: Project, machine: Machine) -> None:
    """A stand-in of TensorFlow's shape: nothing at import, the limit before the first use."""
    package = project.path / "tensorflow" / "python" / "eager"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "context.py").write_text(
        "class Context:\n"
        "    def ensure_initialized(self): print('INITIALISED')\n"
        "_context = Context()\n"
        "def context(): return _context\n"
    )
    (project.path / "tensorflow" / "__init__.py").write_text(
        "class config:\n"
        "    class LogicalDeviceConfiguration:\n"
        "        def __init__(self, memory_limit): self.memory_limit = memory_limit\n"
        "    @staticmethod\n"
        "    def list_physical_devices(kind): return ['gpu']\n"
        "    @staticmethod\n"
        "    def get_logical_device_configuration(device): return None\n"
        "    @staticmethod\n"
        "    def set_logical_device_configuration(device, limits):\n"
        "        print('LIMIT', device, limits[0].memory_limit)\n"
    )
    project.write(
        test_project="""
            def test_tensorflow():
                # Libraries look for a spec to see what is installed; that is no import.
                from importlib.util import find_spec
                assert find_spec("tensorflow").loader.get_filename("tensorflow")
                import tensorflow
                from tensorflow.python.eager.context import context
                print("IMPORTED")
                context().ensure_initialized()
                context().ensure_initialized()
        """
    )
    result = project.pytest("-rP", PYTEST_GPUSHARE_TENSORFLOW_MB="4008")
    assert result.code == 0
    lines = [line for line in result.out.splitlines() if line.isupper() or "LIMIT" in line]
    assert lines[-4:] == ["IMPORTED", "LIMIT gpu 4008", "INITIALISED", "INITIALISED"]


HOLDS = """
    import os
    import torch

    kept = []

    def test_holds():
        kept.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
        print("CUPY", os.environ.get("CUPY_GPU_MEMORY_LIMIT"))
"""


def test_context_is_measured_without_workers(project: Project, machine: Machine) -> None:
    """A process that runs the tests itself keeps it for the next run, too."""
    project.with_frameworks()
    project.write(test_project=HOLDS)
    cached = ("--gpu-share", "-n0", "-p", "cacheprovider", "-o", "cache_dir=cache")
    assert project.pytest(*cached).passed == 1
    cache = json.loads((project.path / "cache/v/gpushare/contexts").read_text())
    assert cache == {"NVIDIA GeForce RTX 3090 Ti": 600 * 2**20}


def test_context_is_measured(project: Project, machine: Machine) -> None:
    """What NVML tells of a worker, less what torch counts, is the next run's allowance."""
    project.with_frameworks()
    project.write(test_project=HOLDS)
    cached = ("--gpu-share", "-rP", "-p", "cacheprovider", "-o", "cache_dir=cache")
    first = project.pytest(*cached)
    assert f"CUPY {(4608 - 600) * 2**20}" in first.out, first.out
    cache = json.loads((project.path / "cache/v/gpushare/contexts").read_text())
    assert cache == {"NVIDIA GeForce RTX 3090 Ti": 600 * 2**20}
    cache["NVIDIA GeForce RTX 3090 Ti"] = 500 * 2**20
    (project.path / "cache/v/gpushare/contexts").write_text(json.dumps(cache))
    assert f"CUPY {(4608 - 500) * 2**20}" in project.pytest(*cached).out
    (project.path / "cache/v/gpushare/contexts").write_text('{"NVIDIA GeForce RTX 3090 Ti": "x"}')
    assert f"CUPY {(4608 - 600) * 2**20}" in project.pytest(*cached).out
