"""Out of memory on the GPU, told from everything else that fails."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from pytest_gpushare.worker.oom_retry import ran_out, ran_out_by_text


def kind(module: str, name: str, base: type[BaseException] = RuntimeError) -> type[BaseException]:
    """An exception type as a framework defines it."""
    return type(name, (base,), {"__module__": module})


TORCH = kind("torch", "OutOfMemoryError")
ERRORS = {
    "torch": TORCH("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    "torch before 2.5": kind("torch.cuda", "OutOfMemoryError")("whatever it says"),
    "torch before 1.13": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "torch, at the context": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"),
    "torch on ROCm": RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "JAX": kind("jaxlib.xla_extension", "XlaRuntimeError")(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
    ),
    "JAX, with a note": kind("jax.errors", "JaxRuntimeError")(
        "RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB (2147483648B) on device"
    ),
    "CuPy": kind("cupy.cuda.memory", "OutOfMemoryError", MemoryError)("Out of memory allocating"),
    "CuPy's runtime": kind("cupy_backends.cuda.api.runtime", "CUDARuntimeError")(
        "cudaErrorMemoryAllocation: out of memory"
    ),
    "TensorFlow": kind("tensorflow.python.framework.errors_impl", "ResourceExhaustedError")(
        "{{function_node}} OOM when allocating tensor with shape[1024]"
    ),
    "TensorFlow, at the context": kind("tensorflow.errors", "InternalError")(
        "CUDA runtime implicit initialization on GPU:0 failed. Status: out of memory"
    ),
    "numba": kind("numba.cuda.cudadrv.driver", "CudaAPIError", Exception)(
        "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY"
    ),
    "pycuda": kind("pycuda._driver", "MemoryError", Exception)("cuMemAlloc failed: out of memory"),
    "RMM": MemoryError("std::bad_alloc: out_of_memory: CUDA error at: pool.hpp"),
    "ONNX runtime": kind("onnxruntime.capi", "RuntimeException", Exception)(
        "CUDA failure 2: out of memory ; GPU=0"
    ),
    "vLLM": ValueError(
        "Free memory on device (3.2/23.6 GiB) on startup is less than desired GPU memory"
    ),
    "a child process": kind("torch.multiprocessing.spawn", "ProcessRaisedException", Exception)(
        "\n\n-- Process 0 terminated with the following error:\n"
        "Traceback (most recent call last):\n  File 'a.py', line 1, in run\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    ),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
def test_recognised(error: BaseException) -> None:
    said = ran_out(error)
    assert said.startswith(type(error).__name__)
    assert "\n" not in said
    assert len(said) <= 200


OTHERS = {
    "an assertion": AssertionError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "an assertion on a log": AssertionError("assert 'CUDA_ERROR_OUT_OF_MEMORY' not in 'log'"),
    "pytest.fail": pytest.fail.Exception("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "pytest.skip": pytest.skip.Exception("RuntimeError: CUDA out of memory."),
    "the host's memory": MemoryError("Unable to allocate 14.9 GiB for an array"),
    "the host's memory, silent": MemoryError(),
    "the disk": OSError(28, "No space left on device"),
    "a quotation": ValueError("no handler for 'CUDA out of memory. Tried to allocate'"),
    "a key": KeyError("CUDA_ERROR_OUT_OF_MEMORY"),
    "a quota": kind("google.api_core", "ResourceExhausted", Exception)(
        "RESOURCE_EXHAUSTED: quota exceeded"
    ),
    "shared memory of a kernel": kind("triton.runtime.errors", "OutOfResources", Exception)(
        "out of resource: shared memory, Required: 131072, Hardware limit: 101376."
    ),
    "another CUDA error": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "a class of the suite's own": kind("tests.torch_like", "OutOfMemoryError")("pool is full"),
    "words": RuntimeError("this needs more memory on the GPU"),
    "a crash of ours": kind("builtins", "Broken", Exception)(),
}


@pytest.mark.parametrize("error", OTHERS.values(), ids=list(OTHERS))
def test_taken_for_what_it_is(error: BaseException) -> None:
    assert ran_out(error) == ""


def test_a_text_that_cannot_be_had() -> None:
    """An exception whose __str__ raises is no reason for another one."""

    class Odd(RuntimeError):
        def __str__(self) -> str:
            raise ValueError

    assert ran_out(Odd()) == ""


def raised_from() -> BaseException:
    try:
        try:
            raise TORCH("no room")
        except TORCH as error:
            raise ValueError("cannot load the model") from error
    except ValueError as error:
        return error


def raised_while_handling() -> BaseException:
    try:
        try:
            raise TORCH("no room")
        except TORCH:
            pytest.fail("cannot load the model")
    except BaseException as error:
        return error


def in_a_circle() -> BaseException:
    one, other = RuntimeError("one"), TORCH("no room")
    one.__cause__, other.__cause__ = other, one
    return one


@pytest.mark.parametrize("make", [raised_from, raised_while_handling, in_a_circle])
def test_chains(make: Callable[[], BaseException]) -> None:
    """What it was raised from, or while handling, counts; circles end."""
    assert ran_out(make()) == "OutOfMemoryError: no room"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups came with Python 3.11")
def test_groups() -> None:
    group = ExceptionGroup("two", [ValueError("x"), ExceptionGroup("one", [TORCH("no room")])])  # noqa: F821
    assert ran_out(group) == "OutOfMemoryError: no room"
    assert ran_out(ExceptionGroup("two", [ValueError("x")])) == ""  # noqa: F821


REPORT = """
    def test_it():
>       take(2)
test_it.py:3:
_ _ _ _
E   {}
E   and more of it

test_it.py:9: Error
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "OutOfMemoryError: CUDA out of"),
        ("torch.cuda.OutOfMemoryError: x", "OutOfMemoryError: x"),
        ("RuntimeError: CUDA out of memory. Tried to allocate 1 GiB", "RuntimeError: CUDA"),
        ("cupy.cuda.memory.OutOfMemoryError: Out of memory", "OutOfMemoryError: Out of"),
        ("AssertionError: CUDA out of memory", ""),
        ("Failed: CUDA out of memory. Tried to allocate 1 GiB", ""),
        ("ValueError: x", ""),
        ("MemoryError: Unable to allocate", ""),
        ("AssertionError: x\nE   torch.OutOfMemoryError: CUDA out of memory", ""),
    ],
)
def test_by_text(line: str, said: str) -> None:
    """Where only a report is there: what was raised counts, not what a message quotes."""
    found = ran_out_by_text(REPORT.format(line))
    assert found.startswith(said)
    assert bool(found) == bool(said)
