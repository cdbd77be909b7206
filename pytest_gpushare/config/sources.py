"""The JSON file: read with bounds, refused with the place and the reason."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.config.kinds import Value, parse, shown, unknown
from pytest_gpushare.config.kinds import shown as shown_value
from pytest_gpushare.config.options import (
    BY_KEY,
    INI_PREFIX,
    JSON_FILE,
    JSON_SECTION,
    OPTIONS,
    merged,
)
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.text import printable
from pytest_gpushare.units import MB

if TYPE_CHECKING:
    import pytest


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


SWITCH = "gpu_share"
_DEFAULT, _JSON, _INI, _COMMAND_LINE = range(4)


class Written(NamedTuple):
    """What stands in the places where a user can write settings, unparsed."""

    flags: Mapping[str, object]
    """Key -> value of the command line's own options, unset ones left out."""
    overrides: Mapping[str, object]
    """ini name -> value after `-o`, the names with their prefix."""
    ini: Mapping[str, object]
    """ini name -> value in the configuration file, the names with their prefix."""
    ini_file: str
    """The configuration file as messages name it."""
    root: Path
    """pytest's root directory: where `performance_config.json` is looked for."""
    ini_directory: Path
    """What a path in the configuration file is relative to."""
    invocation_directory: Path
    """What a path on the command line is relative to."""


class _Entry(NamedTuple):
    value: Value
    level: int
    origin: str
    explicit: bool = True


def load(written: Written) -> Settings:
    """The settings in force. Raises `SettingsError` for anything that cannot be used."""
    entries: dict[str, _Entry] = {}
    for option in OPTIONS:
        entries[option.key] = _Entry(parse(option, option.default, "default"), _DEFAULT, "default")
    explicit = _ini_level(written)
    explicit.update(_command_line_level(written))
    config_entry = explicit.get("config", entries["config"])
    for key, entry in _json_level(written, config_entry).items():
        explicit.setdefault(key, entry)
    entries.update(explicit)
    _apply_presets(entries)
    values: dict[str, Any] = {BY_KEY[key].attribute: entry.value for key, entry in entries.items()}
    origins = {key: entry.origin for key, entry in entries.items()}
    settings = Settings(**values, origins=origins)
    if settings.ollama_vram_reservation is None and not settings.ollama_models:
        key = "ollama_vram_reservation_mb"
        raise SettingsError(
            f"{origins[key]}: {key} = auto: needs the names of models: set "
            "gpu_share_ollama_models, or give a number of MB"
        )
    return settings


def _ini_level(written: Written) -> dict[str, _Entry]:
    return _prefixed(written.ini, written.ini_file, _INI)


def _command_line_level(written: Written) -> dict[str, _Entry]:
    result = _prefixed(written.overrides, "command line, -o", _COMMAND_LINE)
    for key, raw in written.flags.items():
        option = BY_KEY[key]
        if isinstance(raw, list) and len(raw) == 1:
            # A repeatable flag that was given once: shown as it was written.
            raw = raw[0]
        value = parse(option, raw, "command line", option.flag)
        result[key] = _Entry(value, _COMMAND_LINE, f"command line, {option.flag}")
    return result


def _prefixed(found: Mapping[str, object], where: str, level: int) -> dict[str, _Entry]:
    result = {}
    for name, raw in found.items():
        if name == SWITCH:
            continue
        key = name.removeprefix(INI_PREFIX)
        if key not in BY_KEY:
            raise unknown(name, where, [SWITCH, *(option.ini for option in OPTIONS)])
        result[key] = _Entry(parse(BY_KEY[key], raw, where, name), level, where)
    return result


def _json_level(written: Written, config: _Entry) -> dict[str, _Entry]:
    named = str(config.value)
    base = written.invocation_directory if config.level == _COMMAND_LINE else written.ini_directory
    if named:
        shown = _shown_path(named)
        try:
            path = base / Path(named).expanduser()
        except RuntimeError:
            raise SettingsError(f"{shown}: no such home directory: check the path") from None
    elif config.level != _DEFAULT:
        # `-o gpu_share_config=` with nothing after it: no JSON file at all.
        return {}
    else:
        path, shown = written.root / JSON_FILE, JSON_FILE
    section = read_section(path, shown, required=bool(named))
    if section is None:
        return {}
    return {
        key: _Entry(parse(BY_KEY[key], raw, shown), _JSON, shown) for key, raw in section.items()
    }


def _shown_path(path: str) -> str:
    """A path on one line; of a long one the end, which tells more."""
    text = printable(path)
    return text if len(text) <= 120 else f"...{text[-117:]}"


def _apply_presets(entries: dict[str, _Entry]) -> None:
    presets = entries["preset"]
    names = presets.value
    if not isinstance(names, tuple):
        raise SettingsError(
            f"{presets.origin}: preset = {names!r}: allowed is one or several names"
        )
    for key, (raw, name) in merged([str(name) for name in names]).items():
        if entries[key].level < presets.level:
            entries[key] = _Entry(
                parse(BY_KEY[key], raw, f"preset {name}"), presets.level, f"preset {name}", False
            )


_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off", ""}


def gather(config: pytest.Config) -> Written:
    """All that stands on the command line and in the configuration file, unparsed."""
    options = config.known_args_namespace
    overridden = _override_names(config)
    found = _ini_values(config)
    root = Path(config.rootpath)
    return Written(
        flags={
            option.key: value
            for option in OPTIONS
            if option.flag and (value := getattr(options, option.ini, None)) is not None
        },
        overrides={name: value for name, value in found.items() if name in overridden},
        ini={name: value for name, value in found.items() if name not in overridden},
        ini_file=_ini_file(config),
        root=root,
        ini_directory=config.inipath.parent if config.inipath else root,
        invocation_directory=Path(config.invocation_params.dir),
    )


def switched_on(config: pytest.Config) -> bool:
    """Whether the ini key `gpu_share` asks for the plugin. Raises `SettingsError`."""
    value = _read_ini(config, SWITCH, None)
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise SettingsError(f"{_ini_file(config)}: {SWITCH} = {shown(value)}: allowed is true or false")


def _ini_values(config: pytest.Config) -> dict[str, object]:
    raw = _raw(config)
    names = {name for name in raw if name.startswith(INI_PREFIX)} | _override_names(config)
    return {name: _read_ini(config, name, raw) for name in sorted(names)}


def _read_ini(config: pytest.Config, name: str, raw: Mapping[str, object] | None) -> object:
    try:
        return config.getini(name)
    except Exception:
        # ValueError: no such key is registered; TypeError, in 9.2 UsageError: a typed value.
        raw = _raw(config) if raw is None else raw
        if name in raw:
            return raw[name]
        return _override(config, name)


def _raw(config: pytest.Config) -> Mapping[str, object]:
    """The configuration file as pytest read it; `getini` neither lists names nor gives types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(config, "inicfg", None)
        return {name: found[name] for name in found} if found else {}


def _override_names(config: pytest.Config) -> set[str]:
    return {name for name, _ in _overrides(config) if name.startswith(INI_PREFIX)}


def _override(config: pytest.Config, name: str) -> object:
    return next((value for key, value in reversed(list(_overrides(config))) if key == name), None)


def _overrides(config: pytest.Config) -> Iterable[tuple[str, str]]:
    for text in getattr(config.known_args_namespace, "override_ini", None) or ():
        name, _, value = text.partition("=")
        yield name, value


def _ini_file(config: pytest.Config) -> str:
    if config.inipath is None:
        return "configuration"
    try:
        return os.path.relpath(config.inipath, config.invocation_params.dir)
    except ValueError:
        # Another drive on Windows.
        return str(config.inipath)
