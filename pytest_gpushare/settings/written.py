"""From pytest's configuration to what the user wrote, on every pytest from 8.0.

Typed values of pytest 9's TOML files are accepted beside quoted ones: `getini` refuses a
number where a string is registered, so there the raw value is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.settings.load import SWITCH, Written
from pytest_gpushare.settings.options import INI_PREFIX, OPTIONS
from pytest_gpushare.settings.wording import shown

if TYPE_CHECKING:
    import pytest

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
    value = _read(config, SWITCH, None)
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise SettingsError(f"{_ini_file(config)}: {SWITCH} = {shown(value)}: allowed is true or false")


def _ini_values(config: pytest.Config) -> dict[str, object]:
    raw = _raw(config)
    names = {name for name in raw if name.startswith(INI_PREFIX)} | _override_names(config)
    return {name: _read(config, name, raw) for name in sorted(names)}


def _read(config: pytest.Config, name: str, raw: Mapping[str, object] | None) -> object:
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
