"""`pytest-gpushare merge`: one report of those of several shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pytest_gpushare.cli.terminal import OK, REFUSED, encodable
from pytest_gpushare.config.sources import report_files
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.merge import merged, names_of
from pytest_gpushare.report.output import write_reports
from pytest_gpushare.report.reading import read_report
from pytest_gpushare.text import redacted, redactor
from pytest_gpushare.units import plural

MOST_REPORTS = 1000


def merge(options: argparse.Namespace) -> int:
    """Write the report. Returns the exit code."""
    paths = [Path(text) for text in options.reports]
    if len(paths) > MOST_REPORTS:
        raise GpuShareError(f"{len(paths)} reports: at most {MOST_REPORTS} are merged")
    files = report_files(options.output, Path.cwd(), "-o")
    redact = redactor()
    document = redacted(
        merged([read_report(path) for path in paths], names_of(paths)),
        # A foreign text may have halves of characters, which no file can hold.
        lambda text: redact(text.encode("utf-8", "replace").decode("utf-8")),
    )
    problems = list(write_reports(document, files))
    for text in problems:
        print(f"ERROR: {text}", file=sys.stderr)  # noqa: T201
    if problems:
        return REFUSED
    tests, shards = plural(len(document["tests"]), "test"), plural(len(paths), "report")
    text = f"gpu-share: {shards} with {tests} merged into {', '.join(p.name for p in files)}"
    print(encodable(text, sys.stdout.encoding))  # noqa: T201
    return OK
