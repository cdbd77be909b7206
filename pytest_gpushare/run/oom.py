"""Out of memory on the GPU, told from other failures: by type, else by words of a machine.

No framework is imported: types are known by their names. Words count only in errors of kinds
that frameworks and drivers raise, so that a test which speaks of memory in its own words, in an
assertion or in `pytest.fail`, is taken for what it is. The host's own memory is not meant: a
plain MemoryError is no reason to run a test again alone on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_gpushare.run.caches import errors_of

_TYPES = {
    # torch >= 2.5; before, torch.cuda.OutOfMemoryError lay in torch.cuda.
    ("torch", "OutOfMemoryError"),
    ("cupy", "OutOfMemoryError"),
    ("tensorflow", "ResourceExhaustedError"),
    ("pycuda", "MemoryError"),
}
"""(first part of the module, name) of errors that mean it whatever they say."""

_WORDS = re.compile(
    r"""
    CUDA_ERROR_OUT_OF_MEMORY | cudaErrorMemoryAllocation | hipErrorOutOfMemory
    | CUBLAS_STATUS_ALLOC_FAILED | CUDNN_STATUS_ALLOC_FAILED | CUSOLVER_STATUS_ALLOC_FAILED
    | CUFFT_ALLOC_FAILED | CUSPARSE_STATUS_ALLOC_FAILED | HIPBLAS_STATUS_ALLOC_FAILED
    | \b(?:CUDA|HIP)\ (?:error:\ )?out\ of\ memory\b
    | \bRESOURCE_EXHAUSTED:\ .{0,200}?(?:out\ of\ memory|failed\ to\ allocate|allocating)
    | \bRMM\ failure\b | \bout_of_memory:\s
    | \bOOM\ when\ allocating\ tensor\b
    | \bcuMem(?:Alloc|Create)\w*\ failed:\ out\ of\ memory
    | \bCUDA\ failure\ 2:\ out\ of\ memory | \bStatus:\ out\ of\ memory
    | \bFree\ memory\ on\ device\ .{0,80}on\ startup\ is\ less\ than\ desired
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""What drivers, libraries and frameworks write, and people hardly do."""

_OWN_WORDS = (AssertionError, LookupError, TypeError, AttributeError, NameError, Warning)
"""Errors whose text is the test's own, or that of its mistake."""

_OWN_NAMES = {"AssertionError", "Failed", "KeyError", "IndexError", "TypeError", "AttributeError"}

_RAISED = re.compile(
    r"^(?:E\s{1,3})?(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exhausted\w*|OutOfMemory\w*))"
    r":\ (?P<said>.*)",
)
_MOST_TEXT = 200_000


def ran_out(error: BaseException | None) -> str:
    """What the failure says, on one line, if it ran out of memory on a GPU; else empty.

    The error itself, what it was raised from or while handling, and the members of a group are
    looked at; the texts of tracebacks that other processes sent are read.
    """
    for each in errors_of(error):
        if _means_it(each):
            return _one_line(f"{type(each).__qualname__}: {_text(each)}")
    return ""


def ran_out_by_text(text: str) -> str:
    """The same of a failure's report, where only its text is there; else empty.

    Only lines count that name what was raised, the first of each block that pytest marks.
    """
    for kind, said in _raised(text[-_MOST_TEXT:]):
        module, _, name = kind.rpartition(".")
        if name in _OWN_NAMES:
            continue
        if (module.partition(".")[0], name) in _TYPES or _WORDS.search(said):
            return _one_line(f"{name}: {said}")
    return ""


def _means_it(error: BaseException) -> bool:
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if names & _TYPES:
        return True
    if not isinstance(error, Exception) or isinstance(error, _OWN_WORDS):
        # pytest.fail and pytest.skip raise no Exception: their words are the test's own.
        return False
    text = _text(error)
    if "Traceback (most recent call last)" in text:
        # What a child process failed with, such as torch.multiprocessing's.
        return bool(ran_out_by_text(text))
    return _WORDS.search(text) is not None and not _is_plain(error)


def _is_plain(error: BaseException) -> bool:
    """Whether it is an error of Python's own kind that says so in a quotation of somebody else."""
    return type(error) in (ValueError, OSError) and not _WORDS.match(_text(error).lstrip())


def _raised(text: str) -> Iterator[tuple[str, str]]:
    marked = False
    for line in text.splitlines():
        first_of_block = not (marked and line.startswith("E "))
        marked = line.startswith("E ")
        if first_of_block and (match := _RAISED.match(line)):
            yield match["type"], match["said"]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MOST_TEXT]
    except Exception:
        return ""


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:199]}…"
