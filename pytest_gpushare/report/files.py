"""Writes the reports: whole or not at all, and never at the cost of the run's result."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_reports(document: Mapping[str, Any], files: Sequence[Path]) -> Iterator[str]:
    """Write the document to each file; yields a sentence for each that could not be written."""
    for path in files:
        try:
            write_whole(path, _text(document, path))
        except Exception as error:
            # A full disk, or whatever else: the tests have their results all the same.
            yield f"no report in {path.name}: {why(error)}"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever opens it finds all of it, or what was there before."""
    if path.is_dir():
        raise IsADirectoryError(f"{path.name} is a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path.parent.name} is not a directory") from None
    # In the same directory: a file can be renamed only within its file system.
    scratch = path.with_name(f".{path.name[:100]}-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with scratch.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def _text(document: Mapping[str, Any], path: Path) -> str:
    if path.suffix.lower() == ".html":
        from pytest_gpushare.report.page import page

        return page(document)
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def why(error: Exception) -> str:
    """A reason in a few words, without the path, which may be long and nobody's business."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)[:200] or type(error).__name__
