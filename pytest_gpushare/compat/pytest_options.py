"""Private and undocumented names of pytest's parser, configuration and reporter.

Idle runs import it: no imports at the top. Each function says what it uses and since which
version of pytest that exists; without the name it does what its docstring says, never fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

_NOT_A_RUN = (
    "collectonly",
    "help",
    "version",
    "markers",
    "showfixtures",
    "show_fixtures_per_test",
    "cacheshow",
)
"""Where pytest's own options are stored that run no test; each exists in all versions."""


def runs_tests(options: Any) -> bool:
    """Whether tests are run: `--collect-only`, `--help` and the like need no plan.

    Without one of the names the option counts as not given.
    """
    return not any(getattr(options, name, None) for name in _NOT_A_RUN)


def change_type(
    parser: pytest.Parser, group: str, flag: str, change: Callable[[Any], Callable[[str], Any]]
) -> None:
    """Replace the type of another plugin's option by what `change` makes of it.

    Uses `OptionGroup.options`, `Argument.names()` and `attrs()` (pytest 2), and
    `Parser.optparser._option_string_actions` (pytest 9). Up to pytest 8.4 the arguments of
    argparse are made later, from `attrs()`; 9.0 has made them already, so there the action of
    argparse counts; from 9.1 on `attrs()` is the action's own dictionary. Without the names the
    option keeps its type.
    """
    for option in getattr(parser.getgroup(group), "options", ()):
        if flag not in _called(option, "names", ()):
            continue
        attributes = _called(option, "attrs", {})
        changed = change(attributes.get("type", int))
        attributes["type"] = changed
        actions = getattr(getattr(parser, "optparser", None), "_option_string_actions", {})
        if flag in actions:
            actions[flag].type = changed


def _called(thing: object, name: str, default: Any) -> Any:
    method = getattr(thing, name, None)
    return default if method is None else method()


def set_usage_hint(parser: pytest.Parser, name: str, hint: str | None) -> None:
    """Print `name: hint` below the error for an unrecognised argument; None takes it back.

    Uses `Parser.extra_info` (pytest 2). Without it the hint is not printed.
    """
    hints = getattr(parser, "extra_info", None)
    if isinstance(hints, dict):
        hints.pop(name, None)
        if hint is not None:
            hints[name] = hint


def early_options(config: pytest.Config) -> Any | None:
    """The options as they are known before conftests are loaded.

    Uses `Config.known_args_namespace` (pytest 3). None without it: nothing is decided before
    conftests are loaded, and a run without workers is placed when they are.
    """
    return getattr(config, "known_args_namespace", None)


def options_of(config: pytest.Config) -> Any:
    """The options, whether or not conftests are loaded; `early_options` says what is used."""
    early = early_options(config)
    return config.option if early is None else early


def ini_values(config: pytest.Config) -> Mapping[str, object]:
    """The configuration file as pytest read it: `getini` neither lists names nor keeps types.

    Uses `Config.inicfg` (pytest 2, deprecated in 9). Empty without it: unknown keys are not
    found, and keys of ini files are not read.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(config, "inicfg", None)
        return {name: found[name] for name in found} if found else {}


def ini_near(directory: Path) -> tuple[Mapping[str, object], Path | None]:
    """What pytest would read as its configuration file in this directory, and that file.

    Uses `_pytest.config.findpaths.determine_setup` (pytest 3; its keywords changed in 8.0 and
    9.0). Empty without it, and where the file cannot be read.
    """
    from contextlib import suppress

    with suppress(Exception):
        import inspect

        from _pytest.config.findpaths import determine_setup

        given: dict[str, Any] = {"args": [str(directory)], "invocation_dir": directory}
        known = inspect.signature(determine_setup).parameters
        given = {name: given.get(name) for name in known}
        _, path, found, *_ = determine_setup(**given)
        values = {name: getattr(value, "value", value) for name, value in found.items()}
        return values, path
    return {}, None


def overrides(config: pytest.Config) -> list[tuple[str, str]]:
    """Name and value of each `-o`, in their order.

    Uses `override_ini`, where `-o` is stored (pytest 3). Empty without it: values after `-o`
    count as values of the configuration file.
    """
    texts = getattr(options_of(config), "override_ini", None) or ()
    parts = [text.partition("=") for text in texts]
    return [(name, value) for name, _, value in parts]


_ADDS_LINES = "pytest_instafail"
"""A plugin whose reporter writes more lines, in the way of pytest's own."""


def reporter_file(config: pytest.Config) -> TextIO | None:
    """The file of pytest's own reporter, where that is a terminal.

    Uses `TerminalWriter._file` (pytest 5.4), and the module of the reporter's class, which is not
    public in pytest 8.0. None without them, and where another plugin has put a reporter that moves
    the cursor in the place of pytest's, as pytest-sugar does: no line is drawn then.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if type(reporter).__module__ not in ("_pytest.terminal", _ADDS_LINES):
        return None
    file = getattr(config.get_terminal_writer(), "_file", None)
    try:
        return file if file is not None and file.isatty() else None
    except ValueError:
        # It is closed.
        return None


def shows_progress(config: pytest.Config) -> bool:
    """Whether pytest shows its progress in the terminal's title or tab.

    Uses the name under which that plugin is registered (pytest 9). False without it.
    """
    return bool(config.pluginmanager.hasplugin("terminalprogress-plugin"))


def captures_output(config: pytest.Config) -> bool:
    """Whether the output of tests is captured: not with `-s` and `-p no:capture`.

    Uses the name under which the option is stored (pytest 2). False without it.
    """
    return getattr(config.option, "capture", "no") != "no"
