"""Private names of pytest's options and xdist's: only in `compat`, and not needed for a run."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pytest_gpushare
from pytest_gpushare.compat import pytest_options, xdist_options

PACKAGE = Path(pytest_gpushare.__file__).parent
COMPAT = sorted(path.stem for path in (PACKAGE / "compat").glob("[a-z]*.py"))

PRIVATE = {
    # pytest's parser and configuration
    "known_args_namespace", "inicfg", "extra_info", "optparser", "_option_string_actions",
    "override_ini",
    # pytest's items and session
    "_fixtureinfo", "_setupstate", "_request", "_initrequest", "_instance", "_obj", "_excinfo",
    "_arg2scope", "name2fixturedefs", "cached_result", "testscollected",
    # xdist's options and nodes
    "numprocesses", "tx", "px", "distload", "maxworkerrestart", "maxschedchunk",
    "loadscopereorder", "putevent", "notify_inproc", "send_runtest_some", "item_index",
}  # fmt: skip
MODULES = {"import _pytest", "import xdist", "import execnet"}


def private_names(tree: ast.AST) -> Iterator[str]:
    """Each use: as an attribute, by name in `getattr` and its like, or by an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            yield f"import {(node.module or '').partition('.')[0]}"
        elif isinstance(node, ast.Import):
            yield from (f"import {alias.name.partition('.')[0]}" for alias in node.names)


def test_private_names_are_found() -> None:
    """The check below can fail."""
    code = "import _pytest.main\nfrom xdist.remote import x\nconfig.inicfg\ngetattr(o, 'tx', 1)"
    assert set(private_names(ast.parse(code))) >= {"import _pytest", "import xdist", "inicfg", "tx"}


def test_private_names_stand_in_compat_alone() -> None:
    """No other module uses them, or imports from the packages themselves."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        used = set(private_names(ast.parse(path.read_text(encoding="utf-8"))))
        found[name] = used & (PRIVATE | MODULES)
    assert {n: u for n, u in found.items() if u and not n.startswith("compat/")} == {}


@pytest.mark.parametrize("module", COMPAT)
def test_modules_are_importable_alone(module: str) -> None:
    """They need nothing of the package but what every layer may use."""
    code = (
        f"import sys, pytest_gpushare.compat.{module}\n"
        "print(*(n for n in sys.modules if n.startswith('pytest_gpushare.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    low = {"errors", "units", "text", "timed"}
    names = {name.removeprefix("pytest_gpushare.") for name in done.stdout.split()}
    assert {name for name in names if not name.startswith("compat")} <= low


class Parser:
    """A parser with xdist's option, as far as the version has the names."""

    def __init__(self, *, has_action: bool = True, copies: bool = False) -> None:
        self.attributes: dict[str, Any] = {"type": int}
        self.action = argparse.Namespace(type=int)
        if has_action:
            names = {"--numprocesses": self.action}
            self.optparser = SimpleNamespace(_option_string_actions=names)
        self.copies = copies

    def getgroup(self, name: str) -> Any:
        assert name == "xdist"
        option = SimpleNamespace(
            names=lambda: ["-n", "--numprocesses"],
            attrs=lambda: dict(self.attributes) if self.copies else self.attributes,
        )
        return SimpleNamespace(options=[option])


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("has_action", [False, True])
def test_type_of_another_option(has_action: bool, copies: bool) -> None:
    """Changed wherever the version keeps it; a name that is missing is passed over."""
    parser: Any = Parser(has_action=has_action, copies=copies)
    xdist_options.accept_gpu_auto(parser)
    if not copies:
        assert parser.attributes["type"]("gpu-auto") == "gpu-auto"
    if has_action:
        assert parser.action.type("gpu-auto") == "gpu-auto"
        assert parser.action.type("3") == 3


@pytest.mark.parametrize(
    "group",
    [
        SimpleNamespace(),
        SimpleNamespace(options=[SimpleNamespace()]),
        SimpleNamespace(options=[SimpleNamespace(names=lambda: ["--numprocesses"])]),
    ],
)
def test_without_the_names_the_option_keeps_its_type(group: Any) -> None:
    """No group, no names, no attributes: xdist refuses the word itself."""
    parser: Any = SimpleNamespace(getgroup=lambda _: group)
    xdist_options.accept_gpu_auto(parser)


def test_configuration_file_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run there would read it; nothing where pytest lacks the name or cannot read the file."""
    (tmp_path / "pytest.ini").write_text("[pytest]\ngpu_share_wait = 7\n")
    found, path = pytest_options.ini_near(tmp_path)
    assert (found["gpu_share_wait"], path) == ("7", tmp_path / "pytest.ini")
    (tmp_path / "pytest.ini").write_text("[pytest\n")
    assert pytest_options.ini_near(tmp_path) == ({}, None)
    (tmp_path / "pytest.ini").write_text("[pytest]\ngpu_share_wait = 7\n")
    monkeypatch.setitem(sys.modules, "_pytest.config.findpaths", None)
    assert pytest_options.ini_near(tmp_path) == ({}, None)


def test_usage_hint() -> None:
    """Printed and taken back; without the dictionary nothing happens."""
    parser: Any = SimpleNamespace(extra_info={"other": "stays"})
    pytest_options.set_usage_hint(parser, "us", "needs xdist")
    assert parser.extra_info == {"other": "stays", "us": "needs xdist"}
    pytest_options.set_usage_hint(parser, "us", None)
    pytest_options.set_usage_hint(parser, "us", None)
    assert parser.extra_info == {"other": "stays"}
    without: Any = SimpleNamespace()
    pytest_options.set_usage_hint(without, "us", "needs xdist")
    assert vars(without) == {}


def test_without_early_options() -> None:
    """The options that are known later count."""
    option = SimpleNamespace(override_ini=["a=1=2", "b"])
    config: Any = SimpleNamespace(option=option)
    assert pytest_options.early_options(config) is None
    assert pytest_options.options_of(config) is option
    assert pytest_options.overrides(config) == [("a", "1=2"), ("b", "")]
    early = SimpleNamespace(override_ini=None)
    config = SimpleNamespace(option=option, known_args_namespace=early)
    assert pytest_options.options_of(config) is early
    assert pytest_options.overrides(config) == []
    assert pytest_options.overrides(SimpleNamespace(option=SimpleNamespace())) == []  # type: ignore[arg-type]


def test_without_ini_values() -> None:
    """Nothing was read; a deprecated attribute warns nobody."""
    config: Any = SimpleNamespace()
    assert pytest_options.ini_values(config) == {}

    class Deprecated:
        @property
        def inicfg(self) -> dict[str, str]:
            import warnings

            warnings.warn("use getini", DeprecationWarning, stacklevel=2)
            return {"gpu_share": "true"}

    deprecated: Any = Deprecated()
    assert pytest_options.ini_values(deprecated) == {"gpu_share": "true"}


def test_without_the_options_of_a_run() -> None:
    """An option that the version does not have was not given."""
    assert pytest_options.runs_tests(SimpleNamespace())
    assert not pytest_options.runs_tests(SimpleNamespace(collectonly=True))


def test_without_xdist() -> None:
    """The process itself runs the tests; nothing is asked for and nothing is written."""
    options = SimpleNamespace()
    assert not xdist_options.has_xdist(options)
    assert xdist_options.is_in_process(options)
    assert not xdist_options.asks_for_gpu_auto(options)
    assert xdist_options.given_number(options) is None
    assert xdist_options.given_most(options) is None
    assert not xdist_options.keeps_own_workers(options)
    assert not xdist_options.keeps_groups(options)
    assert not xdist_options.runs_each_test_everywhere(options)
    assert xdist_options.most_deaths(options) is None
    assert xdist_options.chunk_size(options) is None
    assert xdist_options.reorders_groups(options)
    xdist_options.distribute(options)
    assert vars(options) == {}
    workers = xdist_options.TxWorkers(options, ["CUDA_VISIBLE_DEVICES"])
    assert (workers.local, workers.with_devices) == (0, 0)


@pytest.mark.parametrize(
    ("specs", "local", "with_devices"),
    [
        (["2*popen"], 2, 0),
        (["popen", "3*popen//python=python3"], 4, 0),
        (["2*chdir=/x//popen"], 2, 0),
        (["+2*popen"], 2, 0),
        (["popen//env:CUDA_VISIBLE_DEVICES=0", "2*popen//env:CUDA_VISIBLE_DEVICES="], 0, 3),
        (["popen//env:OMP_NUM_THREADS=1"], 1, 0),
        (["ssh=user@box//chdir=/popen", "2*popen//via=box", "socket=h:1"], 0, 0),
        (["x*popen"], 0, 0),
    ],
)
def test_workers_of_tx(specs: list[str], local: int, with_devices: int) -> None:
    """Which of them are on this host, as xdist and execnet read the specs."""
    found = xdist_options.TxWorkers(SimpleNamespace(tx=specs), ["CUDA_VISIBLE_DEVICES"])
    assert (found.local, found.with_devices) == (local, with_devices)


def test_announcing_workers() -> None:
    """Other plugins see that there will be workers, and what was given stands."""
    plain = SimpleNamespace(numprocesses=None, tx=[], dist="no")
    xdist_options.announce_workers(plain)
    assert (plain.numprocesses, plain.dist) == ("gpu-auto", "no")
    own = SimpleNamespace(numprocesses=None, tx=["2*popen"], dist="no")
    xdist_options.announce_workers(own)
    assert (own.numprocesses, own.dist) == (None, "load")
    given = SimpleNamespace(numprocesses=3, tx=[], dist="no")
    xdist_options.announce_workers(given)
    assert given.numprocesses == 3


def test_count_of_auto_puts_the_option_back() -> None:
    """The hook reads the word; afterwards the option is what the user gave."""
    option = SimpleNamespace(numprocesses="logical")
    seen = []

    def count(config: Any) -> int:
        seen.append(config.option.numprocesses)
        return 6

    hook = SimpleNamespace(pytest_xdist_auto_num_workers=count)
    config: Any = SimpleNamespace(option=option, hook=hook)
    assert xdist_options.count_of_auto(config) == 6
    option.numprocesses = "gpu-auto"
    assert xdist_options.count_of_auto(config) == 6
    assert (seen, option.numprocesses) == (["logical", "auto"], "gpu-auto")
    hook.pytest_xdist_auto_num_workers = lambda **_: None
    assert xdist_options.count_of_auto(config) == 1
