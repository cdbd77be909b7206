"""Precedence, resolved once: command line > ini > JSON > default.

A preset ranks at the level that names it: explicit keys at that level or above beat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.settings.jsonfile import read_section
from pytest_gpushare.settings.options import BY_KEY, INI_PREFIX, JSON_FILE, OPTIONS
from pytest_gpushare.settings.parse import Value, parse
from pytest_gpushare.settings.presets import merged
from pytest_gpushare.settings.values import Settings
from pytest_gpushare.settings.wording import unknown

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
    text = "".join(c if c.isprintable() else "?" for c in path)
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
