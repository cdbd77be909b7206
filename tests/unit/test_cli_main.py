"""The command line of `pytest-gpushare`: what it accepts, and how errors end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_gpushare.cli import main as command
from pytest_gpushare.cli.main import main
from pytest_gpushare.errors import GpuShareError


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("doktor",), 2, "'doktor' is not a command: did you mean doctor?"),
        (("Plan",), 2, "did you mean plan?"),
        (("xyz\x1b[2J",), 2, "the commands are plan, doctor, watch, hold, merge, compare"),
        (("compare", "a.json"), 2, "the following arguments are required: FILE"),
        (("--print-completion", "basic"), 2, "--print-completion: allowed is bash, zsh"),
        (("plan", "-n", "many"), 2, "allowed is a number of workers"),
        (("plan", "--cpus", "0"), 2, "is no number of CPUs"),
        (("plan", "--sim", "24GB"), 2, "unrecognized arguments: --sim 24GB"),
        (("watch", "--interval", "0"), 2, "allowed is a number of seconds from 0.2 to 3600"),
        (("watch", "--interval", "nan"), 2, "allowed is a number of seconds from 0.2 to 3600"),
        (("watch", "--interval", "soon"), 2, "allowed is a number of seconds from 0.2 to 3600"),
        (("watch", "--", "x"), 2, "nothing may follow --"),
        (("--help",), 0, "exit codes:"),
        (("plan", "--help"), 0, "without running a test"),
        (("doctor", "--help"), 0, "Nothing is changed"),
        (("watch", "--help"), 0, "redrawn until Ctrl-C"),
        (("--version",), 0, "pytest-gpushare "),
    ],
)
def test_command_line(
    arguments: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong use is told in argparse's manner."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == code
    assert words in " ".join((said.out + said.err).split())


def test_alone_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr()
    assert "exit codes:" in said.out
    assert said.err == ""


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    """shtab's script names each command."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(name in script for name in command.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hold", "--vram", "8GB"], "hold runs a command: write it after --"),
        (["merge", *["a.json"] * 1001, "-o", "b.json"], "1001 reports: at most 1000 are merged"),
    ],
)
def test_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 4
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--print-completion", "bash"]], ids=["help", "script"])
def test_a_reader_that_is_gone(arguments: list[str]) -> None:
    """As with `| head`: no traceback, whichever output it is."""
    pytest.importorskip("shtab")
    line = [sys.executable, "-m", "pytest_gpushare", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run(line, stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_completion_without_shtab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert "pip install 'pytest-gpushare[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "arguments", "code", "words"),
    [
        (GpuShareError("fact: remedy"), "plan", 4, "ERROR: fact: remedy\n"),
        (KeyboardInterrupt(), "plan", 130, ""),
        (KeyboardInterrupt(), "watch", 0, ""),
        (
            ValueError("two\nlines"),
            "doctor",
            3,
            "pytest-gpushare: internal error: ValueError: two lines; "
            "PYTEST_GPUSHARE_TRACEBACK=1 in the environment shows where\n",
        ),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    arguments: str,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever happens ends with a code and at most one line."""

    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(command, "_run", fail)
    assert main([arguments]) == code
    assert capsys.readouterr().err == words


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reports the error can have all of it."""

    def fail(_: object) -> int:
        raise ValueError("here")

    monkeypatch.setattr(command, "_run", fail)
    monkeypatch.setenv("PYTEST_GPUSHARE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="here"):
        main(["plan"])
