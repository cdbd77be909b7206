"""Projects drawn by a seed: tests and fixtures of all kinds, hostile conftests, options.

The same seed always draws the same project, on every version of pytest that has what it draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from textwrap import indent

import pytest

from .hostile import HOSTILE

SUBTESTS = pytest.version_tuple >= (9, 0)
"""Whether pytest has subtests itself."""

ODD_IDS = (
    *(
        "a b",
        "[x]",
        "a/b",
        "a\\b",
        "::",
        "a::b",
        "@gpu",
        "-",
        "--",
        "ü",
        "日本",
        "a,b",
        "%s",
        "{x}",
    ),
    *("💥", "a\tb", "a\nb", "\x00", "'", '"', "*", "?", "..", "#", "a]", "=", " ", "a" * 70),
)

_FIXTURES = """
import json, os
import pytest

FAIL_UP, FAIL_DOWN = {failing!r}

def make(name, scope, params, needs):
    @pytest.fixture(scope=scope, name=name, params=params)
    def fixture(request):
        if needs:
            request.getfixturevalue(needs)
        if [name, request.node.name] in FAIL_UP:
            raise RuntimeError(f"set-up of {{name}}")
        yield getattr(request, "param", name)
        if [name, request.node.name] in FAIL_DOWN:
            raise RuntimeError(f"teardown of {{name}}")
    return fixture

"""

_ENDS = {
    "exit": "pytest.exit('enough')",
    "exit with a code": "pytest.exit('enough', returncode=7)",
    "interrupt": "raise KeyboardInterrupt",
    "shouldstop": "request.session.shouldstop = 'enough'",
    "shouldfail": "request.session.shouldfail = 'enough'",
}

_BODIES = (
    *["pass"] * 9,
    "assert False, 'no'",
    "raise ValueError('wrong')",
    "raise SystemExit(3)",
    "pytest.skip('now')",
    "pytest.xfail('known')",
    "pytest.fail('plainly', pytrace=False)",
    "pytest.importorskip('no_such_module')",
    "print('said'); import sys; print('shouted', file=sys.stderr)",
    "import warnings; warnings.warn('careful')",
    "request.node.user_properties.append(('noted', 1))",
    "request.addfinalizer(lambda: print('finalized'))",
    "request.addfinalizer(lambda: 1 / 0)",
    "request.getfixturevalue('tmp_path').joinpath('x').write_text('x')",
    "import logging; logging.getLogger('x').warning('logged')",
)

_MARKS = (
    *[None] * 8,
    "skip(reason='never')",
    "skipif(True, reason='not here')",
    "xfail",
    "xfail(strict=True)",
    "xfail(raises=ValueError)",
    "xfail(run=False)",
    "usefixtures('tmp_path')",
    "filterwarnings('ignore')",
)

_UNITTEST = """
class Test{name}(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        {up}

    @classmethod
    def tearDownClass(cls):
        {down}

    def setUp(self):
        self.thing = 1

    def test_one(self):
        {body}

    @unittest.skip("not this one")
    def test_skipped(self):
        pass

    @unittest.expectedFailure
    def test_expected(self):
        self.assertEqual(self.thing, 2)

    def test_parts(self):
        for i in range(3):
            with self.subTest(i=i):
                self.assertNotEqual(i, {fails})
"""

_SUBTESTS = """
def test_subtests{number}(subtests):
    for i in range(3):
        with subtests.test("part", i=i):
            assert i != {fails}
    {body}
"""

_DOCTEST = '''
def double{number}(x):
    """
    >>> double{number}(2)
    {result}
    """
    return 2 * x
'''


@dataclass
class Case:
    """What a seed stands for."""

    seed: int
    workers: int = 1
    files: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    """Options for both sides."""
    ours: list[str] = field(default_factory=list)
    """Options for our side alone, beside those that turn the plugin on."""
    steps: list[list[str]] = field(default_factory=list)
    """Options of one run after the other in the same directory."""
    hostile: list[str] = field(default_factory=list)
    cut_short: bool = False
    crashes: bool = False
    another_scheduler: bool = False
    distribution: bool = False
    """Whether reports say which worker ran what."""
    fits: bool = True
    """Whether all needs fit at once."""

    @property
    def dist(self) -> str:
        """How stock distributes the tests; empty where a hook of the project does."""
        given = [it.partition("=")[2] for it in self.arguments if it.startswith("--dist=")]
        return "" if self.another_scheduler else (given or ["load"])[-1]

    def write(self, path: Path) -> None:
        for name, text in self.files.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        words = [f"seed {self.seed}: -n {self.workers}", *self.arguments, *self.ours]
        return " ".join([*words, f"steps={self.steps}" if self.steps else "", str(self.hostile)])


def draw(seed: int) -> Case:
    """Draw the case of this seed."""
    return _Drawing(seed).case


class _Drawing:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.case = Case(seed)
        self.fixtures: list[str] = []
        self.parametrised: set[str] = set()
        self.names: list[str] = []
        """Names of nodes for which fixtures may be told to fail."""
        self.tests = 0
        self.crash_left = self.chance(0.15)
        self.end_left = self.chance(0.2)
        self.case.workers = self.random.choice([1, 1, 2, 2, 2, 3])
        self.pause = self.random.choice([0, 0, 0.01, 0.03])
        lines = self.draw_fixtures()
        self.draw_modules()
        self.draw_conftest(lines)
        self.draw_needs()
        self.draw_options()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # Fixtures

    def draw_fixtures(self) -> list[str]:
        lines = []
        scopes = ("session", "package", "module", "class", "function")
        for number, scope in enumerate(scopes):
            for copy in range(self.random.choice([0, 1, 1, 2])):
                name = f"{scope}{copy}"
                plain = [it for it in self.fixtures if it not in self.parametrised]
                needs = self.random.choice(plain) if plain and self.chance(0.3) else None
                params = [1, 2] if 1 < number < 4 and self.chance(0.25) else None
                if params:
                    self.parametrised.add(name)
                self.fixtures.append(name)
                lines.append(f"{name} = make({name!r}, {scope!r}, {params}, {needs!r})")
        return lines

    # Modules

    def draw_modules(self) -> None:
        folders = ["", *(f"package{n}/" for n in range(self.random.choice([0, 0, 1])))]
        for folder in folders:
            if folder:
                self.case.files[f"{folder}__init__.py"] = ""
            for number in range(self.random.randint(1, 2)):
                self.draw_module(f"{folder}test_m{number}.py")
        if self.chance(0.15):
            self.case.files["test_text.txt"] = ">>> 1 + 1\n2\n\n>>> 1 + 2\n4\n"
        if self.chance(0.04):
            self.case.files["test_broken.py"] = "def test_x(:\n"
        if self.chance(0.04):
            skip = "import pytest\npytest.skip('all', allow_module_level=True)\n"
            self.case.files["test_skipped_module.py"] = skip

    def draw_module(self, path: str) -> None:
        random = self.random
        self.names += [path.rpartition("/")[2], path]
        lines = ["import os, time, unittest", "import pytest", ""]
        if self.chance(0.12):
            lines += [f"def {random.choice(['setup', 'teardown'])}_module():", "    1 / 0", ""]
        for number in range(random.randint(2, 4)):
            kind = random.choice(["function", "function", "class", "class", "unittest", "sub"])
            if kind == "function":
                lines += self.draw_test(f"test_{number}", ())
            elif kind == "class":
                lines += self.draw_class(number)
            elif kind == "unittest":
                words = {
                    "name": f"Case{number}",
                    "up": "1 / 0" if self.chance(0.1) else "pass",
                    "down": "1 / 0" if self.chance(0.2) else "pass",
                    "body": random.choice(["pass", "self.fail('no')", "self.skipTest('now')"]),
                    "fails": random.choice([1, 5]),
                }
                lines += [_UNITTEST.format(**words)]
            elif SUBTESTS:
                body = random.choice(["pass", "assert 0"])
                fails = random.choice([1, 5])
                lines += [_SUBTESTS.format(number=number, fails=fails, body=body)]
        if self.chance(0.2):
            lines += [_DOCTEST.format(number=0, result=random.choice([4, 5]))]
        self.case.files[path] = "\n".join(lines) + "\n"

    def draw_class(self, number: int) -> list[str]:
        random = self.random
        self.names.append(f"Test{number}")
        lines = [f"class Test{number}:"]
        if self.chance(0.2):
            method = random.choice(["setup_class", "teardown_class", "teardown_class"])
            lines += ["    @classmethod", f"    def {method}(cls):", "        1 / 0", ""]
        if self.chance(0.1):
            method = random.choice(["setup_method", "teardown_method"])
            lines += [f"    def {method}(self):", "        1 / 0", ""]
        for inner in range(random.randint(1, 3)):
            lines += [indent(line, "    ") for line in self.draw_test(f"test_{inner}", ("self",))]
        if self.chance(0.15):
            lines += ["    class TestInner:"]
            lines += [indent(line, "        ") for line in self.draw_test("test_in", ("self",))]
        return lines

    def draw_test(self, name: str, first: tuple[str, ...]) -> list[str]:
        random = self.random
        self.tests += 1
        self.names.append(name)
        wanted = random.sample(self.fixtures, min(len(self.fixtures), random.randint(0, 3)))
        lines = []
        mark = random.choice(_MARKS)
        if mark:
            lines.append(f"@pytest.mark.{mark}")
        if self.chance(0.2):
            lines.append(f"@pytest.mark.xdist_group({random.choice(['one', 'two'])!r})")
        lines.append("#need#")
        if self.chance(0.25):
            ids = random.sample(ODD_IDS, random.randint(2, 3))
            lines.append(f"@pytest.mark.parametrize('p', {list(range(len(ids)))}, ids={ids!r})")
            wanted.append("p")
        body = [random.choice(_BODIES)]
        if self.pause and self.chance(0.6):
            body.insert(0, f"time.sleep({self.pause})")
        special = self.draw_special()
        where = "call"
        if special:
            where = random.choice(["call", "call", "setup", "teardown"])
            body = [special] if where == "call" else ["pass"]
        fixture = []
        if where != "call":
            wanted.append(f"special{self.tests}")
            up, down = (special, "pass") if where == "setup" else ("pass", special)
            scope = random.choice(["function", "class", "module"])
            fixture = [
                f"@pytest.fixture(scope={scope!r})",
                f"def special{self.tests}({', '.join([*first, 'request'])}):",
                f"    {up}",
                "    yield",
                f"    {down}",
                "",
            ]
        arguments = ", ".join([*first, "request", *wanted])
        return [*fixture, *lines, f"def {name}({arguments}):", *(f"    {x}" for x in body), ""]

    def draw_special(self) -> str | None:
        """Code that kills the worker, or ends the run; at most one of each in a project."""
        if self.crash_left and self.chance(0.2):
            self.crash_left = False
            self.case.crashes = True
            return "os._exit(3)"
        if self.end_left and self.chance(0.2):
            self.end_left = False
            self.case.cut_short = True
            return _ENDS[self.random.choice(sorted(_ENDS))]
        return None

    # Conftests

    def draw_conftest(self, lines: list[str]) -> None:
        failing: list[list[list[str]]] = [[], []]
        for which, chance in ((0, 0.08), (1, 0.3)):
            for name in self.fixtures:
                if self.chance(chance):
                    failing[which].append([name, self.random.choice(["", *self.names])])
        text = _FIXTURES.format(failing=tuple(failing)) + "\n".join(lines) + "\n"
        if self.chance(0.6):
            self.case.hostile = self.random.sample(
                sorted(HOSTILE), self.random.choice([1, 1, 2, 3])
            )
        names = []
        for number, name in enumerate(self.case.hostile):
            hostile = HOSTILE[name]
            self.case.files[f"hostile_{number}.py"] = hostile.text
            names.append(f"hostile_{number}")
            self.case.cut_short |= hostile.cuts_short
            self.case.another_scheduler |= hostile.another_scheduler
            self.case.distribution |= hostile.distribution
            self.case.crashes |= "os._exit" in hostile.text
        text += f"\npytest_plugins = {names!r}\n"
        self.case.files["conftest.py"] = text

    # Needs and options

    def draw_needs(self) -> None:
        random, case = self.random, self.case
        kind = random.choice(["uniform", "uniform", "tight", "mixed", "pool", "rules"])
        marks: list[str | None] = [None]
        if kind == "uniform":
            case.ours += ["-o", "gpu_share_vram=* = 1GB"]
        elif kind == "tight":
            case.ours += ["-o", "gpu_share_vram=* = 8GB"]
            case.fits = case.workers < 3
        elif kind == "mixed":
            case.ours += ["-o", "gpu_share_vram=* = 2GB"]
            marks = [None, "gpu(vram='9GB')", "gpu(vram='4GB')", "gpu"]
            case.fits = False
        elif kind == "rules":
            case.ours += ["-o", "gpu_share_vram=*test_0* = 9GB\n*Test* = 3GB\n* = 1GB"]
            case.fits = case.workers < 3
        elif case.workers > 1:
            # Fewer GPU workers than the number of -n: the CPU worker is one of them.
            most = f"gpu_share_max_workers_per_gpu={case.workers - 1}"
            case.ours += ["-o", "gpu_share_cpu_workers=1", "-o", most]
            marks = [None, "gpu", "gpu(vram='3GB')"]
            case.fits = False
        else:
            case.ours += ["-o", "gpu_share_vram=* = 1GB"]
            marks = [None, "gpu", "gpu(vram='3GB')"]
        for name, text in case.files.items():
            while "#need#" in text:
                mark = random.choice(marks)
                line = f"@pytest.mark.{mark}" if mark else "# no need of its own"
                text = text.replace("#need#", line, 1)
            case.files[name] = text

    def draw_options(self) -> None:
        random, case = self.random, self.case
        options = case.arguments
        stop = random.choice([None] * 17 + ["-x", "--maxfail=2", "--maxfail=4"])
        if stop:
            options.append(stop)
            case.cut_short = True
        restarts = random.choice([None] * 4 + ["0", "1", "1000"])
        if case.crashes and restarts:
            options.append(f"--max-worker-restart={restarts}")
            case.cut_short |= restarts in "01"
        dist = random.choice(
            [None] * 8 + ["load", "loadscope", "loadfile", "loadgroup", "worksteal"]
        )
        if dist:
            options.append(f"--dist={dist}")
        options += random.choice([[], [], [], ["-q"], ["-v"], ["-vv"], ["--tb=short"], ["--tb=no"]])
        rare = [
            *(["--setup-show"], ["--setup-only"], ["--runxfail"], ["-k", "test_0 or Test1"]),
            *(["-k", "nothing_of_that_name"], ["-W", "error"], ["-o", "junit_family=xunit1"]),
            *(["--import-mode=importlib"], ["--maxschedchunk=1"], ["--capture=sys"]),
            *(["--show-capture=no"], ["--deselect", "test_m0.py::test_0"], ["--strict-markers"]),
            *(["--junit-prefix=pre"], ["-p", "no:logging"], ["--capture=no"]),
        ]
        if self.chance(0.35):
            options += random.choice(rare)
        if any("Doctest" in x or ">>>" in x for x in case.files.values()) and self.chance(0.7):
            options.append("--doctest-modules")
        if self.chance(0.1) and not case.cut_short:
            last = random.choice(["--lf", "--ff", "--nf", "--sw", "--lf"])
            case.steps = [[], [last]]
            # Whom the error of a wider teardown falls on decides what failed last.
            case.cut_short |= last == "--sw" or case.workers > 1
        else:
            options += ["-p", "no:cacheprovider"]
