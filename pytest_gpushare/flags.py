"""What the plugin adds to pytest's command line and configuration file.

Imported in every run of pytest, so only what an idle run needs is imported at the top.
"""

from __future__ import annotations

import pytest

from pytest_gpushare.settings.gpu_auto import accept_gpu_auto
from pytest_gpushare.settings.options import OPTIONS


class _NumprocessesType:
    """Teaches xdist's `-n` the word `gpu-auto`, whichever of the two plugins loads first."""

    def __init__(self, parser: pytest.Parser) -> None:
        self._parser = parser

    def pytest_plugin_registered(self, plugin: object) -> None:
        if getattr(plugin, "__name__", None) == "xdist.plugin":
            accept_gpu_auto(self._parser)
            self._parser.extra_info.pop("pytest-gpushare", None)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the options of the table; all are unset by default, so that precedence holds."""
    group = parser.getgroup("gpu-share", "GPU workers beside Ollama (pytest-gpushare)")
    group.addoption(
        "--gpu-share",
        action="store_true",
        default=None,
        dest="gpu_share",
        help="size the xdist workers by the VRAM that Ollama and others leave (also: -n gpu-auto)",
    )
    group.addoption(
        "--no-gpu-share",
        action="store_false",
        default=None,
        dest="gpu_share",
        help="do not, whatever the ini file says; -n gpu-auto then means -n auto",
    )
    group.addoption(
        "--gpu-share-strict",
        action="store_true",
        default=False,
        dest="gpu_share_strict",
        help="fail the run (exit code 1) where a worker's placement was changed behind the plan, "
        "or the tests drove a part of a model of Ollama's off the GPU",
    )
    group.addoption(
        "--gpu-share-simulate",
        action="append",
        default=None,
        metavar="SPEC",
        dest="gpu_share_simulate",
        help="a what-if device in place of the real ones, such as 24GB:used=2GB (repeatable)",
    )
    group.addoption(
        "--gpu-share-report",
        action="append",
        default=None,
        metavar="FILE",
        dest="gpu_share_report",
        help="write what happened to FILE.json or FILE.html after the tests (repeatable)",
    )
    parser.addini("gpu_share", "size the xdist workers by VRAM (pytest-gpushare)", default=None)
    for option in OPTIONS:
        parser.addini(option.ini, option.meaning, default=None)
        if option.flag:
            group.addoption(
                option.flag,
                action="append" if option.kind == "words" else "store",
                default=None,
                metavar=option.metavar,
                dest=option.ini,
                help=option.meaning.replace("%", "%%"),
            )
    # pytest prints this under "unrecognized arguments", which is what -n is without xdist.
    parser.extra_info["pytest-gpushare"] = "-n gpu-auto needs pytest-xdist"
    pluginmanager.register(_NumprocessesType(parser), "gpu-share-numprocesses-type")


def told_of_report(config: pytest.Config) -> list[str] | None:
    """A report that was asked for in a run that did not ask for the plugin."""
    options = config.option
    if not options.gpu_share_report or getattr(options, "collectonly", False):
        return None
    return ["gpu-share: no report is written: it needs --gpu-share"]
