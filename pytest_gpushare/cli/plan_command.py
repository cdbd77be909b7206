"""pytest, asked what it would do: its own command line, files and plugins, but no test.

Precedence, root directory, `addopts` and other plugins are pytest's business; whoever read
the files anew would tell something else than a run does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

from pytest_gpushare.cli.terminal import OK, REFUSED, Piece, Row, show, show_json
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.header import header, left_out
from pytest_gpushare.report.summary import Line

if TYPE_CHECKING:
    import pytest


ALWAYS = (
    "-p",
    "pytest_gpushare.plugin",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
"""Loads the plugin also where entry points are switched off; a second time does no harm. This
program has imported the package before pytest could rewrite it, which pytest warns of: an
error in projects with `filterwarnings = error`."""

Look = Callable[[pytest.Config], int]


class _Stop:
    """Ends pytest at the moment when everything is decided and nothing has begun."""

    gpu_share_only_asks = True
    """Tells the plugin that no test will follow, for which Ollama should load anything."""

    def __init__(self, look: Look, cpus: int | None) -> None:
        self._look = look
        self._cpus = cpus
        self._stdout = sys.stdout

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        """Called within the plugin's wrapper: the plan is made by then."""
        _drop_captured(config)
        with contextlib.redirect_stdout(self._stdout):
            return self._look(config)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_auto_num_workers(self) -> int | None:
        """The CPUs of a what-if."""
        return self._cpus


def ask_pytest(arguments: Sequence[str], look: Look, cpus: int | None = None) -> int:
    """Let pytest read its configuration and plan; `look` sees it, and gives the exit code.

    What conftests and plugins print goes to standard error. pytest reports wrong settings
    itself, there, in one line, and the code is its own.
    """
    stop = _Stop(look, cpus)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return int(pytest.main([*ALWAYS, *arguments], plugins=[stop]))
    finally:
        sys.stderr.write(_short(said.getvalue()))


def _short(said: str) -> str:
    """What was said, but of pytest's usage the line with the error alone."""
    usage = re.search(r"(?ms)^ERROR: usage: .*?^\S+: error: ([^\n]*)", said)
    return f"ERROR: {usage[1]}\n" if usage else said


def _drop_captured(config: pytest.Config) -> None:
    """What conftests printed; pytest would show it when its capture ends without a run."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    with contextlib.suppress(Exception):
        if capture is not None:
            capture.read_global_capture()


def plan(options: argparse.Namespace) -> int:
    """Print the plan; the exit code."""

    def look(config: pytest.Config) -> int:
        from pytest_gpushare.plugin import LEFT_OUT, RUN

        run, reason = config.stash.get(RUN, None), config.stash.get(LEFT_OUT, "")
        if run is None and not reason:
            raise GpuShareError(
                "these arguments run no test under the plugin: take --no-gpu-share, "
                "--collect-only and their kind away"
            )
        if options.json:
            from pytest_gpushare.report.document import left_out_document, plan_document

            show_json(left_out_document(reason) if run is None else plan_document(run))
        else:
            show(_rows(left_out(reason) if run is None else header(run, options.verbosity)))
        return OK

    code = ask_pytest(_arguments(options), look, options.cpus)
    return code if code == OK else REFUSED


def _arguments(options: argparse.Namespace) -> list[str]:
    """What pytest is given: the options in its own words, then what follows `--`."""
    result = ["--gpu-share"]
    for name, values in (
        ("--gpu-share-simulate", options.simulate),
        ("--gpu-share-preset", options.preset),
        ("--gpu-share-config", [options.config] if options.config is not None else []),
        ("--override-ini", options.override),
    ):
        result += [f"{name}={value}" for value in values]
    if options.number is not None:
        result.append(f"-n{options.number}")
    return [*result, *options.pytest_arguments]


def _rows(lines: Iterable[Line]) -> Iterator[Row]:
    for line in lines:
        yield [Piece(line.text, "yellow" if line.problem else "")]
