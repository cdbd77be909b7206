"""Reports read from files, which may come from anybody: bounded, and checked by the schema.

Texts in them are foreign: whoever prints one makes it printable or escapes it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.document import SCHEMA
from pytest_gpushare.text import FileTooLargeError, NotRegularFileError, one_line, read_regular
from pytest_gpushare.units import MB

MOST_BYTES = 128 * MB
"""The largest report that is read: 100,000 tests and an hour of samples have less."""

_MOST_NAME = 120
_LARGEST = 2**63
"""No figure of a report comes near: sums of larger ones would be no figures any more."""


class ReportFileError(GpuShareError):
    """A file that is no report of this version: names the file and what is wrong with it."""


def read_report(path: Path) -> dict[str, Any]:
    """The report document in this file, with the schema's defaults for what earlier versions of
    this package did not write. Raises `ReportFileError`."""
    name = one_line(str(path), 4 * _MOST_NAME)[-_MOST_NAME:]
    found = _parsed(_content(path, name), name)
    if not isinstance(found, dict) or "schema" not in found:
        raise ReportFileError(
            f"{name}: is no report of pytest-gpushare: name a file that "
            "--gpu-share-report FILE.json has written"
        )
    if type(found["schema"]) is not int or found["schema"] != SCHEMA:
        raise ReportFileError(
            f"{name}: has version {one_line(str(found['schema']), 40)} of the report's schema, "
            f"this pytest-gpushare reads version {SCHEMA}: use the version that wrote it"
        )
    problem = difference(found, _schema(), "")
    if problem:
        raise ReportFileError(f"{name}: does not follow the report's schema: {problem}")
    _complete(found, _schema())
    return found


def _content(path: Path, name: str) -> bytes:
    try:
        return read_regular(path, MOST_BYTES)
    except NotRegularFileError:
        raise ReportFileError(f"{name}: is no regular file: name a JSON file") from None
    except FileTooLargeError as error:
        raise ReportFileError(
            f"{name}: has {error.size // MB} MB: a report of at most {MOST_BYTES // MB} MB is read"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReportFileError(f"{name}: cannot be read: {one_line(str(reason), 200)}") from None


def _parsed(content: bytes, name: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        problem = f"broken JSON at line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError:
        # NaN, Infinity, or an integer of thousands of digits.
        problem = "has a figure that is no number"
    raise ReportFileError(f"{name}: is no report: {problem}")


def _no_number(word: str) -> Any:
    raise ValueError(word)


@lru_cache(maxsize=1)
def _schema() -> Mapping[str, Any]:
    path = Path(__file__).with_name("report-schema.json")
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int and abs(value) < _LARGEST,
    "number": lambda value: (
        type(value) in (int, float) and math.isfinite(value) and abs(value) < _LARGEST
    ),
    "null": lambda value: value is None,
}


def difference(value: Any, schema: Mapping[str, Any], where: str) -> str:
    """The first place where a value differs from a JSON schema, in words; empty where none does.

    Knows the keywords that the report's schema uses; `where` is the path of the value.
    """
    return next(_differences(value, schema, where), "")


def _differences(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    if "type" in schema:
        allowed = schema["type"]
        names = [allowed] if isinstance(allowed, str) else allowed
        if not any(_TYPES[name](value) for name in names):
            yield f"{_place(where)} is not {' or '.join(names)}"
    if "const" in schema or "enum" in schema:
        ones = [schema["const"]] if "const" in schema else schema["enum"]
        # True equals 1 in Python, not in JSON.
        if not any(type(value) is type(one) and value == one for one in ones):
            yield f"{_place(where)} is not one of {', '.join(map(json.dumps, ones))}"
    if "minimum" in schema and type(value) in (int, float) and value < schema["minimum"]:
        yield f"{_place(where)} is below {schema['minimum']}"
    if isinstance(value, dict):
        yield from _differences_of_object(value, schema, where)
    elif isinstance(value, list) and "items" in schema:
        part = schema["items"]
        for index, each in enumerate(value):
            # The path costs more than the check: samples are long lists of figures.
            if difference(each, part, ""):
                yield from _differences(each, part, f"{where}[{index}]")
    if "anyOf" in schema:
        problems = [difference(value, part, where) for part in schema["anyOf"]]
        if "" not in problems:
            yield problems[-1]


def _differences_of_object(
    value: Mapping[str, Any], schema: Mapping[str, Any], where: str
) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{_place(f'{where}.{name}')} is missing"
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name, part in known.items():
        if name in value:
            yield from _differences(value[name], part, f"{where}.{name}")
    if isinstance(others, dict):
        for name, each in value.items():
            if name not in known:
                yield from _differences(each, others, f"{where}.{name}")


def _complete(value: Any, schema: Mapping[str, Any]) -> None:
    """Add the defaults of a schema to a value that follows it."""
    if isinstance(value, list) and "properties" in schema["items"]:
        for each in value:
            _complete(each, schema["items"])
    elif isinstance(value, dict):
        for form in (schema, *schema.get("anyOf", ())):
            for name, part in form.get("properties", {}).items():
                if "default" in part:
                    value.setdefault(name, copy.copy(part["default"]))
                if name in value:
                    _complete(value[name], part)


def _place(where: str) -> str:
    return one_line(where.lstrip("."), _MOST_NAME) or "the document"
