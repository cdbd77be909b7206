"""Many runs of pytest in one process, for what is decided before a worker starts.

Starting processes is nearly all that a short run takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from inner_pytest import left_out

from .conftest import Project, Result, clean_environment

STOP = """
import pytest

places = []

@pytest.hookimpl(optionalhook=True, trylast=True)
def pytest_xdist_setupnodes(specs):
    seen = ("PYTEST_GPUSHARE_ROLE", "CUDA_VISIBLE_DEVICES")
    places.extend(" ".join(spec.env.get(name, "unset") for name in seen) for spec in specs)
    pytest.exit("before the first worker", returncode=0)
"""
"""A plugin that ends a run when its first worker would start, and knows where each was placed."""

_MANY = """
import contextlib, io, json, os, sys
from pathlib import Path
import pytest, stop

root, answers = Path.cwd(), []
for number, case in enumerate(json.loads(Path("cases.json").read_text(encoding="utf-8"))):
    here = root / f"case-{number}"
    here.mkdir()
    (here / f"test_{number}.py").write_text("def test_it():\\n    pass\\n")
    for name, content in case["files"].items():
        (here / name).write_text(content, encoding="utf-8")
    # What is written depends on the encoding of the output.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    stop.places = []
    os.chdir(here)
    before = dict(os.environ)
    os.environ.update(case["variables"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = pytest.main([*sys.argv[1:], *case["arguments"]], [stop])
    os.environ.clear()
    os.environ.update(before)
    os.chdir(root)
    loaded = sorted({"pynvml", "httpx"} & set(sys.modules))
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    texts[1] = texts[1].replace("Exit: before the first worker\\n", "")
    answers.append([int(code), *texts, stop.places, loaded])
Path("answers.json").write_text(json.dumps(answers), encoding="utf-8")
"""


@dataclass(frozen=True)
class Case:
    """What the user wrote: the project's files, the command line, and variables."""

    files: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ("--gpu-share",)
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended(Result):
    """How a run ended, or what it would have started."""

    places: list[str] = field(default_factory=list)
    """The "role CUDA_VISIBLE_DEVICES" of each worker that was about to start."""
    loaded: list[str] = field(default_factory=list)
    """Which of pynvml and httpx had been imported when it ended, by it or a run before it."""


def run_all(
    cases: Mapping[str, Case], path: Path, environment: Mapping[str, str] | None = None
) -> dict[str, Ended]:
    """Run pytest once for each case, in its order; a run with workers ends before they start."""
    project = Project(path, environment or clean_environment())
    project.write(stop=STOP)
    (path / "cases.json").write_text(json.dumps([asdict(case) for case in cases.values()]))
    done = project.command([sys.executable, "-c", _MANY, *left_out()])
    assert (done.code, done.out, done.err) == (0, "", "")
    answers = json.loads((path / "answers.json").read_text())
    return {name: Ended(*answer) for name, answer in zip(cases, answers, strict=True)}


def arguments(*parts: str) -> Case:
    """The case of a command line alone."""
    return Case({}, parts)
