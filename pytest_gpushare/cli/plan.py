"""`pytest-gpushare plan`: the header of a run, without the run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_gpushare.cli.asking import ask_pytest, recall
from pytest_gpushare.cli.main import OK, REFUSED
from pytest_gpushare.cli.output import Piece, Row, show, show_json
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.terminal import header
from pytest_gpushare.run.started import LeftAlone, Started

if TYPE_CHECKING:
    import pytest


def plan(options: argparse.Namespace) -> int:
    """Print the plan; the exit code."""

    def look(config: pytest.Config) -> int:
        from pytest_gpushare.plugin import STARTED

        started = config.stash.get(STARTED, None)
        if started is None:
            raise GpuShareError(
                "these arguments run no test under the plugin: take --no-gpu-share, "
                "--collect-only and their kind away"
            )
        started.recall(recall(config))
        if options.json:
            from pytest_gpushare.cli.document import plan_document

            show_json(plan_document(started))
        else:
            show(_rows(started, options.verbosity))
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


def _rows(started: Started | LeftAlone, verbosity: int) -> Iterator[Row]:
    for line in header(started, verbosity):
        yield [Piece(line.text, "yellow" if line.problem else "")]
