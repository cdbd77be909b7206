"""`--gpu-share-report`: which files a run writes when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_gpushare.errors import SettingsError

_FORMATS = (".json", ".html")


def report_files(given: Sequence[str] | None, directory: Path) -> tuple[Path, ...]:
    """The files, absolute, each once; relative ones are relative to `directory`.

    Raises `SettingsError` for a name that says no format.
    """
    found: dict[Path, None] = {}
    for text in given or ():
        shown = "".join(c if c.isprintable() else "?" for c in text)[-120:]
        if Path(text).suffix.lower() not in _FORMATS:
            raise SettingsError(
                f"--gpu-share-report {shown}: no format is known by this name: allowed is a "
                f"file that ends in {' or '.join(_FORMATS)}"
            )
        try:
            path = directory / Path(text).expanduser()
        except RuntimeError:
            raise SettingsError(
                f"--gpu-share-report {shown}: no such home directory: check the path"
            ) from None
        found[path] = None
    return tuple(found)
