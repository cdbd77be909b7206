"""The command line of `pytest-gpushare`, and its exit codes.

A subcommand's imports happen when it runs: `doctor` must be able to report that pytest or
httpx is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from pytest_gpushare.cli.terminal import INTERNAL, OK, REFUSED
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.text import one_line
from pytest_gpushare.units import MOST_VRAM, parse_size

TRACEBACK = "PYTEST_GPUSHARE_TRACEBACK"

COMPLETION = "--print-completion"
COMMANDS = {
    "plan": ("pytest_gpushare.cli.plan_command", "plan"),
    "doctor": ("pytest_gpushare.cli.doctor", "doctor"),
    "watch": ("pytest_gpushare.cli.watch", "watch"),
    "hold": ("pytest_gpushare.cli.hold", "hold"),
    "merge": ("pytest_gpushare.cli.report_files", "merge"),
    "compare": ("pytest_gpushare.cli.report_files", "compare"),
}
"""Command -> the module and the function that run it."""

_EPILOG = """\
exit codes:
  0  all is well
  1  doctor found something that is broken, an [x]
  2  this command was used wrongly
  3  an error of this program
  4  plan: the run would refuse to start, as pytest does with exit code 4
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default with the process's arguments. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(given)
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does; Python would report it again at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK


def _main(given: list[str]) -> int:
    own, pytest_arguments = _split(given)
    parser = make_parser()
    if not given:
        parser.print_help()
        sys.stdout.flush()
        return OK
    _check_command(parser, own)
    options = parser.parse_args(own)
    if pytest_arguments and options.command == "watch":
        parser.error("watch runs no pytest: nothing may follow --")
    options.pytest_arguments = pytest_arguments
    try:
        return _run(options)
    except GpuShareError as error:
        print(f"ERROR: {error}", file=sys.stderr)  # noqa: T201
        return REFUSED
    except KeyboardInterrupt:
        # Ctrl-C is how watch ends, perhaps before its first picture.
        return OK if options.command == "watch" else 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        hint = f"{TRACEBACK}=1 in the environment shows where"
        print(f"pytest-gpushare: internal error: {what}; {hint}", file=sys.stderr)  # noqa: T201
        return INTERNAL


def _run(options: argparse.Namespace) -> int:
    module, name = COMMANDS[options.command]
    run: Callable[[argparse.Namespace], int] = getattr(import_module(module), name)
    return run(options)


def _split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first `--`, and those after it, which are pytest's."""
    at = given.index("--") if "--" in given else len(given)
    return list(given[:at]), list(given[at + 1 :])


def _check_command(parser: argparse.ArgumentParser, own: Sequence[str]) -> None:
    """An error for a command that does not exist, with the one that was probably meant."""
    first = own[0] if own else "--"
    if first.startswith("-") or first in COMMANDS:
        return
    from difflib import get_close_matches

    near = get_close_matches(first.lower(), COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    parser.error(f"{one_line(first, 80)!r} is not a command: {hint}")


class _PrintCompletion(argparse.Action):
    """Prints the script that completes the command in a shell; shtab makes it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: object,
        shell: object,
        _flag: object = None,
    ) -> None:
        """See `argparse.Action`."""
        try:
            shtab = import_module("shtab")
        except ImportError:
            parser.error(f"{COMPLETION} needs shtab: pip install 'pytest-gpushare[completion]'")
        if shell not in shtab.SUPPORTED_SHELLS:
            parser.error(f"{COMPLETION}: allowed is {', '.join(shtab.SUPPORTED_SHELLS)}")
        print(shtab.complete(parser, shell=shell), flush=True)  # noqa: T201
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    from pytest_gpushare import __version__

    parser = argparse.ArgumentParser(
        prog="pytest-gpushare",
        description="Plan, check and watch test runs that share a GPU with Ollama.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pytest-gpushare {__version__}")
    parser.add_argument(
        COMPLETION,
        action=_PrintCompletion,
        metavar="SHELL",
        help="print the script that completes this command in a shell, such as bash or zsh",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    _add_plan(commands)
    _add_doctor(commands)
    _add_watch(commands)
    _add_hold(commands)
    _add_merge(commands)
    _add_compare(commands)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "plan",
        "show how many workers a run would start here, and why",
        "Show what `pytest --gpu-share` would do in this directory: the lines of its header, "
        "without running a test. Arguments after -- are passed to pytest.",
        "[-- PYTEST_ARGUMENT ...]",
    )
    parser.add_argument(
        "--simulate",
        action="append",
        default=[],
        metavar="SPEC",
        help="a hypothetical device, such as 24GB:used=2GB; repeat it for several devices",
    )
    parser.add_argument(
        "--preset", action="append", default=[], metavar="NAME", help="a preset; repeatable"
    )
    parser.add_argument("--config", metavar="FILE", help="a JSON file with settings")
    parser.add_argument(
        "-o",
        dest="override",
        action="append",
        default=[],
        metavar="gpu_share_KEY=VALUE",
        help="any setting, as with pytest's -o; repeatable",
    )
    parser.add_argument(
        "-n", dest="number", type=_number, metavar="N", help="as for pytest: at most N workers"
    )
    parser.add_argument(
        "--cpus", type=_positive, metavar="N", help="plan for N CPUs, as xdist's auto counts them"
    )
    parser.add_argument(
        "-v",
        dest="verbosity",
        action="count",
        default=0,
        help="one line per worker; -vv: the arithmetic too",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "doctor",
        "find what is wrong with this machine and project, and how to fix it",
        "Check packages, driver, devices, Ollama, settings and the project in this directory. "
        "Each finding is [ok], [!] (worth a look) or [x] (broken). Nothing is changed, and "
        "no secret is printed: the output can go into a bug report. Arguments after -- are "
        "passed to pytest.",
        "[-- PYTEST_ARGUMENT ...]",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_watch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "watch",
        "show devices, workers of running sessions and Ollama's models, live",
        "Show the VRAM of each device, the workers of your running sessions and what Ollama "
        "holds. A terminal is redrawn until Ctrl-C; a pipe or a file gets plain lines.",
        "",
    )
    parser.add_argument("--once", action="store_true", help="print once and exit")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="S",
        help="seconds between two updates, 0.2 to 3600 (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document per line")


def _add_hold(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "hold",
        "run any command while VRAM is leased for it",
        "Wait until the VRAM can be leased, run the command after --, and give the VRAM back. "
        "Test runs and other hold commands on this host leave it to the command and to what it "
        "starts. A test run inside plans with this VRAM. The exit code is the command's; 4: the "
        "VRAM is not available.",
        "--vram SIZE -- COMMAND",
    )
    parser.add_argument(
        "--vram", required=True, type=_vram, metavar="SIZE", help="such as 8GB; a number is MB"
    )
    parser.add_argument(
        "--device", default="0", metavar="DEVICE", help="index or UUID (default: 0)"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        metavar="SECONDS",
        help="how long to wait (default: 300 without progress of those who hold the VRAM)",
    )
    parser.add_argument(
        "--leases",
        default="",
        metavar="DIRECTORY",
        help="as gpu_share_leases (default: the directory that all users share)",
    )


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "merge",
        "make one report of those of several shards",
        "Read reports that --gpu-share-report FILE.json has written, one of each shard, and write "
        "one report of all. The files may come from others: they are checked, and their texts "
        "are escaped.",
        "REPORT.json ... -o FILE",
    )
    parser.add_argument("reports", nargs="+", metavar="REPORT.json", help="a report of a shard")
    parser.add_argument(
        "-o",
        dest="output",
        action="append",
        required=True,
        metavar="FILE",
        help="the file to write, .json or .html; repeatable",
    )


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "compare",
        "show what differs between the reports of two runs",
        "Compare two reports written by --gpu-share-report: VRAM peaks, durations, Ollama and "
        "settings. The exit code is 0 whatever differs.",
        "A.json B.json",
    )
    parser.add_argument("reports", nargs=2, metavar="FILE", help="the earlier, then the later one")
    parser.add_argument(
        "-o", dest="page", metavar="FILE.html", help="also write the comparison as a page"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    long: str,
    after: str,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=short,
        description=long,
        allow_abbrev=False,
        usage=f"pytest-gpushare {name} [OPTION ...] {after}".rstrip(),
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) < 7 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of CPUs: allowed is 1 to 999999")
    return int(text)


def _number(text: str) -> str:
    if text in ("auto", "logical", "gpu-auto") or (text.isascii() and text.isdigit()):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r}: allowed is a number of workers, auto, logical or gpu-auto"
    )


def _vram(text: str) -> int:
    try:
        size = int(parse_size(text, "MB"))
    except ValueError:
        size = 0
    if not 0 < size < MOST_VRAM:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: allowed is a size such as 8GB or 512MB")
    return size


def _seconds(text: str) -> float:
    return _seconds_between(text, 0, 604800)


def _interval(text: str) -> float:
    return _seconds_between(text, 0.2, 3600)


def _seconds_between(text: str, least: float, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r}: allowed is a number of seconds from {least:g} to {most:g}"
        )
    return number
