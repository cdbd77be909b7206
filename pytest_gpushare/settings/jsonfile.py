"""The JSON file: read with bounds, refused with the place and the reason."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.settings.options import JSON_SECTION, OPTIONS
from pytest_gpushare.settings.wording import shown as shown_value
from pytest_gpushare.settings.wording import unknown
from pytest_gpushare.units import MB

MOST_BYTES = MB
"""The largest file that is read: a settings file of more than this is some other file."""


def read_section(path: Path, shown: str, *, required: bool) -> Mapping[str, object] | None:
    """The section `gpu_resource_management` of the file, its keys checked.

    `shown` is the path as messages name it. A file that nobody named (`required` is
    false) counts only where it exists and has the section: None otherwise.
    Raises `SettingsError`.
    """
    text = _read(path, shown, required=required)
    if text is None:
        return None
    document = _parse(text, shown)
    if not isinstance(document, dict) or JSON_SECTION not in document:
        if not required:
            return None
        raise SettingsError(
            f'{shown}: no section "{JSON_SECTION}": add it, or name another file'
            + _near_section(document)
        )
    section = document[JSON_SECTION]
    if not isinstance(section, dict):
        raise SettingsError(
            f"{shown}: {JSON_SECTION} is {_type_name(section)}: allowed is an object of settings"
        )
    known = {option.key for option in OPTIONS if option.in_json}
    for key in section:
        if key not in known:
            raise unknown(key, f"{shown}, section {JSON_SECTION}", known)
    return section


def _read(path: Path, shown: str, *, required: bool) -> str | None:
    try:
        status = path.stat()
        # Opening a named pipe would wait for its writer for ever.
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            if not required:
                return None
            raise SettingsError(f"{shown}: is {kind}: name a JSON file")
        if status.st_size > MOST_BYTES:
            raise SettingsError(
                f"{shown}: has {status.st_size / MB:.1f} MB: a settings file may have "
                f"{MOST_BYTES // MB} MB; name another file with --gpu-share-config"
            )
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        if not required:
            return None
        raise SettingsError(
            f"{shown}: no such file: check --gpu-share-config or gpu_share_config"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{shown}: cannot be read: {reason}; check the path") from None
    try:
        # Windows editors and shells write a byte order mark, and UTF-16.
        encoding = json.detect_encoding(content)
        return content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{shown}: is no text in UTF-8 (byte {error.start}): save it as UTF-8"
        ) from None


def _parse(text: str, shown: str) -> object:
    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in items:
            if key in result:
                raise SettingsError(
                    f"{shown}: the key {shown_value(key)} stands there twice: keep one"
                )
            result[key] = value
        return result

    def number(digits: str) -> Decimal:
        # Exact, and of any length: Python refuses integers of more than 4300 digits without
        # naming the file. NaN and Infinity too, so that who refuses them can name their key.
        try:
            return Decimal(digits)
        except InvalidOperation:
            raise SettingsError(
                f"{shown}: {shown_value(digits)} is beyond all bounds: write a smaller number"
            ) from None

    try:
        return json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=number,
            parse_int=number,
            parse_float=number,
        )
    except json.JSONDecodeError as error:
        raise SettingsError(
            f"{shown}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise SettingsError(
            f"{shown}: is nested too deeply: settings are one flat section"
        ) from None


def _near_section(document: object) -> str:
    if isinstance(document, dict) and {option.key for option in OPTIONS} & document.keys():
        return f"; its settings stand at the top level: put them under {JSON_SECTION}"
    import difflib

    near = difflib.get_close_matches(JSON_SECTION, document if isinstance(document, dict) else ())
    return f"; the nearest to it is {shown_value(near[0])}" if near else ""


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
