"""The places where a user writes settings: command line, ini file, JSON file and presets.

The command line ranks above the ini file, that above the JSON file, that above the defaults; a
preset ranks where it is named.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.compat.pytest_options import (
    ini_near,
    ini_values,
    options_of,
    overrides,
)
from pytest_gpushare.config.kinds import Boolean, defaults, read
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
from pytest_gpushare.text import (
    FileTooLargeError,
    NotRegularFileError,
    printable,
    read_regular,
    shown_value,
)
from pytest_gpushare.units import MB

if TYPE_CHECKING:
    import pytest


SWITCH = "gpu_share"
"""The ini key that switches the plugin on."""

MOST_BYTES = MB
"""The largest file that is read: a settings file of more than this is some other file."""

_DEFAULT, _JSON, _INI, _COMMAND_LINE = range(4)
_REPORT_FORMATS = (".json", ".html")


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
    value: Any
    level: int
    origin: str


def load(written: Written) -> Settings:
    """The settings in force. Raises `SettingsError` for anything that cannot be used."""
    entries = {key: _Entry(value, _DEFAULT, "default") for key, value in defaults(OPTIONS).items()}
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
        value = read(option, raw, "command line", written=option.flag)
        result[key] = _Entry(value, _COMMAND_LINE, f"command line, {option.flag}")
    return result


def _prefixed(found: Mapping[str, object], where: str, level: int) -> dict[str, _Entry]:
    result = {}
    for name, raw in found.items():
        if name == SWITCH:
            continue
        key = name.removeprefix(INI_PREFIX)
        if key not in BY_KEY:
            raise _unknown(name, where, [SWITCH, *(option.ini for option in OPTIONS)])
        result[key] = _Entry(read(BY_KEY[key], raw, where, written=name), level, where)
    return result


def _json_level(written: Written, config: _Entry) -> dict[str, _Entry]:
    named: str = config.value
    base = written.invocation_directory if config.level == _COMMAND_LINE else written.ini_directory
    if named:
        name = _shown_path(named)
        try:
            path = base / Path(named).expanduser()
        except RuntimeError:
            raise SettingsError(f"{name}: no such home directory: check the path") from None
    elif config.level != _DEFAULT:
        # `-o gpu_share_config=` with nothing after it: no JSON file at all.
        return {}
    else:
        path, name = written.root / JSON_FILE, JSON_FILE
    section = read_section(path, name, required=bool(named))
    if section is None:
        return {}
    return {
        key: _Entry(read(BY_KEY[key], raw, name, typed=True), _JSON, name)
        for key, raw in section.items()
    }


def _unknown(name: str, where: str, names: Iterable[str]) -> SettingsError:
    """The error for a name that does not exist, with the nearest that does."""
    import difflib

    # Without a cutoff there always is a nearest one; a list of all would fill the screen.
    near = difflib.get_close_matches(name[:80], sorted(names), 1, 0.0)
    return SettingsError(
        f"{where}: unknown key {shown_value(name)}: the nearest known one is {near[0]}"
    )


def _shown_path(path: str) -> str:
    """A path on one line; of a long one the end, which says more."""
    text = printable(path)
    return text if len(text) <= 120 else f"...{text[-117:]}"


def _apply_presets(entries: dict[str, _Entry]) -> None:
    presets = entries["preset"]
    for key, (raw, name) in merged(presets.value).items():
        if entries[key].level < presets.level:
            value = read(BY_KEY[key], raw, f"preset {name}")
            entries[key] = _Entry(value, presets.level, f"preset {name}")


def read_section(path: Path, name: str, *, required: bool) -> Mapping[str, object] | None:
    """The section `gpu_resource_management` of the file, its keys checked.

    `name` is the path as messages show it. A file that nobody named (`required` is
    false) counts only where it exists and has the section: None otherwise.
    Raises `SettingsError`.
    """
    text = _read(path, name, required=required)
    if text is None:
        return None
    document = _parse(text, name)
    if not isinstance(document, dict):
        raise SettingsError(
            f"{name}: is {_type_name(document)}: allowed is an object with a section "
            f'"{JSON_SECTION}"'
        )
    if JSON_SECTION not in document:
        if not required:
            return None
        raise SettingsError(
            f'{name}: no section "{JSON_SECTION}": add it, or name another file'
            + _near_section(document)
        )
    section = document[JSON_SECTION]
    if not isinstance(section, dict):
        raise SettingsError(
            f"{name}: {JSON_SECTION} is {_type_name(section)}: allowed is an object of settings"
        )
    known = {option.key for option in OPTIONS if option.in_json}
    for key in section:
        if key not in known:
            raise _unknown(key, f"{name}, section {JSON_SECTION}", known)
    return section


def _read(path: Path, name: str, *, required: bool) -> str | None:
    try:
        content = read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        if not required:
            return None
        raise SettingsError(
            f"{name}: no such file: check --gpu-share-config or gpu_share_config"
        ) from None
    except NotRegularFileError:
        kind = "a directory" if path.is_dir() else "not a regular file"
        remedy = "name a JSON file" if required else "rename it, or name a JSON file"
        raise SettingsError(f"{name}: is {kind}: {remedy}") from None
    except FileTooLargeError as error:
        raise SettingsError(
            f"{name}: has {error.size / MB:.1f} MB: a settings file may have "
            f"{MOST_BYTES // MB} MB; name another file with --gpu-share-config"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{name}: cannot be read: {reason}; check the path") from None
    try:
        # Windows editors and shells write a byte order mark, and UTF-16.
        encoding = json.detect_encoding(content)
        return content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{name}: is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None


def _parse(text: str, name: str) -> object:
    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in items:
            if key in result:
                raise SettingsError(f"{name}: the key {shown_value(key)} occurs twice: keep one")
            result[key] = value
        return result

    def number(digits: str) -> Decimal:
        # Exact, and of any length: Python refuses integers of more than 4300 digits without
        # naming the file. NaN and Infinity too, so that who refuses them can name their key.
        try:
            return Decimal(digits)
        except InvalidOperation:
            raise SettingsError(
                f"{name}: {shown_value(digits)} is beyond all bounds: write a smaller number"
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
            f"{name}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise SettingsError(
            f"{name}: is nested too deeply: settings are one flat section"
        ) from None


def _near_section(document: Mapping[str, object]) -> str:
    if {option.key for option in OPTIONS} & document.keys():
        return f"; its settings stand at the top level: put them under {JSON_SECTION}"
    import difflib

    near = difflib.get_close_matches(JSON_SECTION, document)
    return f"; the nearest to it is {shown_value(near[0])}" if near else ""


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def gather(config: pytest.Config) -> Written:
    """All that stands on the command line and in the configuration file, unparsed."""
    options = options_of(config)
    overridden = {name for name, _ in overrides(config) if name.startswith(INI_PREFIX)}
    in_file = ini_values(config)
    names = {name for name in in_file if name.startswith(INI_PREFIX)} | overridden
    found = {name: _read_ini(config, name, in_file) for name in sorted(names)}
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


def gather_near(directory: Path) -> Written:
    """The same for a process that is no run of pytest: what one in this directory would read."""
    in_file, path = ini_near(directory)
    found = {name: value for name, value in in_file.items() if name.startswith(INI_PREFIX)}
    root = directory if path is None else path.parent
    name = "configuration" if path is None else str(path)
    return Written({}, {}, found, name, root, root, directory)


def switched_on(config: pytest.Config) -> bool:
    """Whether the ini key `gpu_share` asks for the plugin. Raises `SettingsError`."""
    value = _read_ini(config, SWITCH, ini_values(config))
    if value is None or (isinstance(value, str) and not value.strip()):
        return False
    return bool(Boolean().read_or_explain(value, f"{_ini_file(config)}: {SWITCH}"))


def _read_ini(config: pytest.Config, name: str, in_file: Mapping[str, object]) -> object:
    try:
        return config.getini(name)
    except Exception:
        # ValueError: no such key is registered; TypeError, in 9.2 UsageError: a typed value.
        if name in in_file:
            return in_file[name]
        return dict(overrides(config)).get(name)


def _ini_file(config: pytest.Config) -> str:
    if config.inipath is None:
        return "configuration"
    try:
        return os.path.relpath(config.inipath, config.invocation_params.dir)
    except ValueError:
        # Another drive on Windows.
        return str(config.inipath)


def unused_options(config: pytest.Config) -> str:
    """Which options were typed without the switch that they need; empty where none was.

    Those that stand in `addopts` wait for the switch, as keys of the ini file do. Raises
    `SettingsError` where the run would not be what was meant: a what-if is no real run.
    """
    flags = ["--gpu-share-simulate", "--gpu-share-report", "--gpu-share-strict"]
    flags += [option.flag for option in OPTIONS if option.flag]
    typed = {str(text).partition("=")[0] for text in config.invocation_params.args}
    unused = [flag for flag in flags if flag in typed]
    if not unused:
        return ""
    verb = "has" if len(unused) == 1 else "have"
    text = f"{' and '.join(unused)} {verb} no effect without --gpu-share or -n gpu-auto"
    if flags[0] in unused:
        raise SettingsError(f"{text}: add one of them")
    return text


_JOBS = (
    ("SLURM_JOB_ID", "SLURM_PROCID"),
    ("JOB_COMPLETION_INDEX",),
    ("BUILDKITE_JOB_ID",),
    ("CI_JOB_ID",),
    ("GITHUB_RUN_ID", "GITHUB_JOB", "RUNNER_NAME"),
)
"""The variables by which an engine names one job among those that run at the same time."""


def job_name(environment: Mapping[str, str] = os.environ) -> str:
    """A name for the job or shard that this process runs in; outside of one, its PID."""
    for names in _JOBS:
        values = [environment.get(name, "") for name in names]
        if values[0]:
            return _file_name("-".join(filter(None, values)))
    return str(os.getpid())


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text)[:80].strip(".") or "unknown"


def _filled(text: str) -> str:
    """A name of a report with this host and job in it, so that shards write different files."""
    if "{" not in text:
        return text
    host = _file_name(platform.node().partition(".")[0])
    return text.replace("{host}", host).replace("{job}", job_name())


def report_files(
    given: Sequence[str] | None, directory: Path, flag: str = "--gpu-share-report"
) -> tuple[Path, ...]:
    """The files that an option names, absolute, each once; relative to `directory`.

    Raises `SettingsError` for a name whose suffix is no format.
    """
    found: dict[Path, None] = {}
    for text in given or ():
        if Path(text).suffix.lower() not in _REPORT_FORMATS:
            raise SettingsError(
                f"{flag} {_shown_path(text)}: no format is known by this name: allowed is a "
                f"file that ends in {' or '.join(_REPORT_FORMATS)}"
            )
        try:
            path = directory / Path(_filled(text)).expanduser()
        except RuntimeError:
            raise SettingsError(
                f"{flag} {_shown_path(text)}: no such home directory: check the path"
            ) from None
        found[path] = None
    return tuple(found)
