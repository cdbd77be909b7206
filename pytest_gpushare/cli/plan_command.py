"""`pytest-gpushare plan`: pytest starts with its own configuration and plugins, and runs no test.

pytest itself resolves precedence, root directory, `addopts` and other plugins, so that the plan
is the one of a real run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest

from pytest_gpushare.cli.terminal import (
    OK,
    REFUSED,
    Piece,
    Row,
    show,
    show_json,
    terminal_width,
)
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.header import Line, header, left_out
from pytest_gpushare.report.output import laid_out

ALWAYS = (
    "-p",
    "pytest_gpushare.plugin",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
"""Arguments that load the plugin also where entry points are switched off; loading it twice is
harmless. pytest warns that the package was imported before it could be rewritten, which is an
error under `filterwarnings = error`: that warning is ignored."""

Look = Callable[[pytest.Config], int]


class _Stop:
    """Ends pytest once the plan is made, before a session starts."""

    gpu_share_only_asks = True
    """Read by the plugin: no test will follow, so Ollama loads no model."""

    def __init__(self, look: Look, cpus: int | None) -> None:
        self._look = look
        self._cpus = cpus
        self._stdout = sys.stdout

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        """Call `look` inside the plugin's own wrapper of this hook: the plan is made by then."""
        _drop_captured(config)
        with contextlib.redirect_stdout(self._stdout):
            return self._look(config)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_auto_num_workers(self) -> int | None:
        """The number of CPUs given by --cpus."""
        return self._cpus


def ask_pytest(arguments: Sequence[str], look: Look, cpus: int | None = None) -> int:
    """Start pytest up to the plan and call `look` with its config. Returns the exit code.

    Output of conftests and plugins goes to standard error. There pytest reports wrong settings
    in one line; the exit code is then pytest's.
    """
    stop = _Stop(look, cpus)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return int(pytest.main([*ALWAYS, *arguments], plugins=[stop]))
    finally:
        sys.stderr.write(_without_usage(output.getvalue()))


def _without_usage(output: str) -> str:
    """The output; where pytest printed its usage, the line with the error alone."""
    usage = re.search(r"(?ms)^ERROR: usage: .*?^\S+: error: ([^\n]*)", output)
    return f"ERROR: {usage[1]}\n" if usage else re.sub(r"\n+\Z", "\n", output)


def _drop_captured(config: pytest.Config) -> None:
    """Discard what conftests printed; pytest would show it when its capture ends without a run."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    with contextlib.suppress(Exception):
        if capture is not None:
            capture.read_global_capture()


def plan(options: argparse.Namespace) -> int:
    """Print the plan. Returns the exit code."""

    def look(config: pytest.Config) -> int:
        from pytest_gpushare.plugin import LEFT_OUT, RUN

        run, reason = config.stash.get(RUN, None), config.stash.get(LEFT_OUT, "")
        if run is None and not reason:
            raise GpuShareError(
                "these arguments run no test under the plugin: remove --no-gpu-share, "
                "--collect-only and the like"
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
    """pytest's arguments: the options under pytest's names, then those after `--`."""
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


def _rows(lines: Sequence[Line]) -> Iterator[Row]:
    width = terminal_width()
    for line in lines if width is None else laid_out(lines, width):
        yield [Piece(line.text, line.colour)]
