"""The command `pytest` as the tests start it: without the plugins that come with our own tests.

Those take 40 % of the CPU time of a short run with two workers. That which reports unraisable
exceptions collects garbage twice when a process ends, which takes a tenth: without it, Python
writes them on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

LEFT_OUT = ("cacheprovider", "hypothesispytest", "anyio", "platformdirs", "pytest_cov",
            "rerunfailures", "timeout", "unraisableexception")  # fmt: skip
"""As `-p` names them. The cache is pytest's own, and would stay in the project."""


def left_out(beside: Collection[str] = ()) -> list[str]:
    """The options that leave the plugins out, but for those that are to run *beside* ours."""
    return [part for name in LEFT_OUT if name not in beside for part in ("-p", f"no:{name}")]


def inner_command(*arguments: str, beside: Collection[str] = ()) -> list[str]:
    """Pytest with these arguments, and with the plugins *beside* ours."""
    return [sys.executable, "-m", "pytest", *left_out(beside), *arguments]
