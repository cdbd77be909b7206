"""Where xdist stores its options, and the word `gpu-auto`. Idle runs import it: keep it light.

xdist documents its command line and its hooks, not the names under which the options are
stored. All that are used here exist in xdist 3.6.1 and later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from pytest_gpushare.compat.pytest_options import change_type

if TYPE_CHECKING:
    import pytest


GPU_AUTO = "gpu-auto"


def accept_gpu_auto(parser: pytest.Parser) -> None:
    """Let `-n gpu-auto` parse; xdist's own type refuses it.

    Uses the group "xdist" and its option `--numprocesses` (xdist 1). Without them `gpu-auto` is
    refused as any other word.
    """
    change_type(parser, "xdist", "--numprocesses", _accepting)


def _accepting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    # argparse names the type in its message: "invalid parse_numprocesses value".
    def parse_numprocesses(text: str) -> Any:
        if text == GPU_AUTO:
            return text
        word = text.lower().replace("_", "-")
        if word in ("gpu", GPU_AUTO, "gpuauto", "auto-gpu"):
            from argparse import ArgumentTypeError

            raise ArgumentTypeError(f"{text!r} is not a number of workers: did you mean gpu-auto?")
        return parse(text)

    return parse_numprocesses


def has_xdist(options: Any) -> bool:
    """Whether xdist is loaded, under whatever name.

    Uses `numprocesses`, where `-n` is stored (xdist 1). Without it the process itself runs the
    tests, as in a run without xdist.
    """
    return hasattr(options, "numprocesses")


def is_in_process(options: Any) -> bool:
    """Whether the process itself runs the tests: `-n 0`, `--pdb`, or no xdist.

    With `--pdb` xdist refuses a number of workers, and those that `--tx` names.
    """
    number = getattr(options, "numprocesses", 0)
    if isinstance(number, int):
        return number <= 0
    return bool(getattr(options, "usepdb", False)) and not _starts_own_workers(options)


def keeps_groups(options: Any) -> bool:
    """In a worker: whether `--dist loadgroup` was given.

    Uses `loadgroup`, which xdist sets in its workers (2.5). Without it groups are known from what
    xdist writes behind node ids.
    """
    return bool(getattr(options, "loadgroup", False))


def asks_for_gpu_auto(options: Any) -> bool:
    """Whether `-n gpu-auto` was given."""
    return getattr(options, "numprocesses", None) == GPU_AUTO


def given_number(options: Any) -> int | str | None:
    """The value of `-n`: a number, `auto`, `logical` or `gpu-auto`; None where there is none."""
    number: int | str | None = getattr(options, "numprocesses", None)
    return number


def given_most(options: Any) -> int | None:
    """The value of `--maxprocesses` (xdist 1.23); None where there is none, or no such option."""
    return getattr(options, "maxprocesses", None) or None


def set_number(options: Any, number: int | str) -> None:
    """Write the number of workers as if `-n` had been given."""
    options.numprocesses = number


def announce_workers(options: Any) -> None:
    """Record in the early options that there will be workers, though `-n` was not given.

    pytest-cov looks there, before the number is known, and must start as in any run with `-n`.
    """
    if keeps_own_workers(options):
        distribute(options)
    elif given_number(options) is None:
        set_number(options, GPU_AUTO)


def keeps_own_workers(options: Any) -> bool:
    """Whether `--tx` alone names the workers; with a number xdist overwrites it.

    Uses `tx` (xdist 1). Without it no worker is named.
    """
    return bool(getattr(options, "tx", None)) and given_number(options) is None


def _starts_own_workers(options: Any) -> bool:
    """Whether xdist starts those of `--tx`: as `--dist` says, or `-d` (`distload`, xdist 1)."""
    is_asked = getattr(options, "distload", False) or getattr(options, "dist", "no") != "no"
    return keeps_own_workers(options) and is_asked


def asks_for_hosts(options: Any) -> bool:
    """Whether `--tx gpu-auto*...` asks for as many workers as a host has room for."""
    return any(text.startswith(f"{GPU_AUTO}*") for text in getattr(options, "tx", None) or ())


def distribute(options: Any) -> None:
    """Make `--tx` start its workers where `--dist` was not given, as `-n` does.

    Uses `dist` (xdist 1). Without it nothing is changed.
    """
    if getattr(options, "dist", None) == "no":
        options.dist = "load"


def runs_each_test_everywhere(options: Any) -> bool:
    """Whether `--dist=each` was given."""
    return getattr(options, "dist", None) == "each"


def most_deaths(options: Any) -> int | None:
    """How many workers that die xdist replaces; None: any number.

    Uses `maxworkerrestart` (xdist 1.12). Without it four for each worker, as xdist's default is.
    """
    given = getattr(options, "maxworkerrestart", None)
    if given is not None:
        return int(given)
    number = given_number(options)
    return number * 4 if isinstance(number, int) and number else None


def chunk_size(options: Any) -> int | None:
    """The value of `--maxschedchunk` (xdist 3.2); None where there is none, or no such option."""
    return getattr(options, "maxschedchunk", None)


def reorders_groups(options: Any) -> bool:
    """Whether groups start with the largest.

    Uses `loadscopereorder` (xdist 3.8). Without it they do, as in every xdist before.
    """
    return bool(getattr(options, "loadscopereorder", True))


class TxWorkers:
    """The workers that the specs of `--tx` list, such as `3*popen`."""

    def __init__(self, options: Any, variables: Collection[str]) -> None:
        """`variables` are those by which a process is shown devices."""
        self.local = 0
        """Workers on this host that see what the plan gives them."""
        self.with_devices = 0
        """Workers on this host to which the user gave devices."""
        for text in getattr(options, "tx", None) or ():
            number, spec = _multiplied(text)
            parts = [part.partition("=")[0] for part in spec.split("//")]
            if "popen" not in parts or "via" in parts:
                continue
            if any(f"env:{name}" in parts for name in variables):
                self.with_devices += number
            else:
                self.local += number


def _multiplied(text: str) -> tuple[int, str]:
    # As xdist reads it.
    number, star, spec = text.partition("*")
    try:
        return (int(number), spec) if star else (1, text)
    except ValueError:
        return 1, text


def count_of_auto(config: pytest.Config) -> int:
    """The number of workers that `-n auto` would start, by xdist's hook; `logical` where given.

    The hook reads the word from the option, so it is written there for the call.
    """
    given = given_number(config.option)
    set_number(config.option, "logical" if given == "logical" else "auto")
    try:
        count = config.hook.pytest_xdist_auto_num_workers(config=config)
    finally:
        config.option.numprocesses = given
    return max(1, count) if isinstance(count, int) else 1
