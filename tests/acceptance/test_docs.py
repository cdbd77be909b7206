"""What the documentation shows is what happens: every block of every page is run or read.

- A `console` block is run, in a project that has the files shown above it in the section,
  and the plugin's lines must be those in the block. `...` stands for lines left out.
- An `ini`, `toml` or `json` block must hold settings that the plugin accepts.
- A table under `plan-table` names options and the plan that they give.
- Any other block needs a reason not to be run.

Comments steer this (`% key: value`; in pages for GitHub `<!-- key: value -->`): `on` names
the machine for the rest of the section, `file` the next block's file, `refused` marks
settings that are wrong on purpose, `not-run` gives the reason, and a block with
`pytest-from` is true from that version of pytest on. `UPDATE_GOLDEN=1` writes
the plugin's lines into the pages.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine

from pytest_gpushare.config.kinds import read
from pytest_gpushare.config.options import BY_KEY, JSON_SECTION, OPTIONS, PRESETS, Option
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.gpu.nvml import _REMEDIES

from .conftest import Project, Result
from .in_one_process import STOP

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if "_build" not in path.parts
}
CONFIGURATION = ("pytest.ini", "pyproject.toml", "pytest.toml", "tox.ini", "setup.cfg")
COMMANDS = {"pytest", "pytest-gpushare", "grep"}
KEYS = {"on", "file", "refused", "not-run", "pytest-from", "plan-table"}


@dataclass
class Block:
    """A fenced block of code, or a table under `plan-table`."""

    line: int
    """Of its first line of content, from 1."""
    language: str
    lines: list[str]
    section: int
    marks: dict[str, str] = field(default_factory=dict)
    file: str = ""
    on: str = ""


def blocks_of(path: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return list(_blocks(path.read_text(encoding="utf-8").splitlines()))


def _blocks(lines: list[str]) -> Iterator[Block]:
    section, on, marks, at = 0, "", {}, 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("## "):
            section, on = section + 1, ""
        mark = re.fullmatch(r"(?:%|<!--) ([a-z-]+)(?:: (.*?))?(?: -->)?", line)
        if mark and mark[1] in KEYS:
            if mark[1] == "on":
                on = mark[2]
            elif mark[1] == "plan-table":
                start_at = at + next(i for i, x in enumerate(lines[at:]) if x.startswith("|"))
                end = start_at + next(
                    i for i, x in enumerate([*lines[start_at:], ""]) if not x.startswith("|")
                )
                yield Block(start_at + 1, "plan-table", lines[start_at:end], section)
                at = end
            else:
                marks[mark[1]] = mark[2] or ""
            continue
        fence = re.fullmatch(r"(\s*)(`{3,}|~{3,}|:{3,})\s*(\{[\w:-]+\})?\s*(.*)", line)
        if fence is None:
            continue
        indent, ticks, directive, rest = fence.groups()
        content: list[str] = []
        first = at + 1
        while lines[at].strip() != ticks:
            content.append(lines[at].removeprefix(indent))
            at += 1
        at += 1
        if directive and directive != "{code-block}":
            assert not any("```" in text for text in content), f"line {first}: a block in a block"
            continue
        file = marks.pop("file", "")
        while content and content[0].startswith(":"):
            option = content.pop(0)
            first += 1
            if option.startswith(":caption:"):
                file = option.removeprefix(":caption:").strip()
        if content and directive and not content[0]:
            content.pop(0)
            first += 1
        yield Block(first, rest.strip(), content, section, marks, file, on)
        marks = {}


@pytest.mark.parametrize("page", PAGES)
def test_page(
    page: str,
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
) -> None:
    """Every block of the page is true."""
    path = PAGES[page]
    project.environment.update(
        PYTEST_XDIST_AUTO_NUM_WORKERS="8",
        OLLAMA_HOST="127.0.0.1:9",
        # Plugins of the test environment that take a third of the time of a short run.
        PYTEST_ADDOPTS="-p no:hypothesispytest -p no:anyio",
    )
    outside = dict(project.environment)
    keep = "/tutorial/" in page
    section, on = 0, ""
    updates: list[tuple[Block, list[str]]] = []
    for block in blocks_of(path):
        place = f"{page}:{block.line}"
        if block.section != section and not keep:
            for name in (*CONFIGURATION, "performance_config.json"):
                (project.path / name).unlink(missing_ok=True)
        section = block.section
        if block.on != on:
            on = block.on
            project.environment.clear()
            project.environment.update(outside)
            if on:
                set_up(on, project, machine_with, ollama_with)
        if "not-run" in block.marks:
            assert len(block.marks["not-run"]) > 10, f"{place}: not-run needs a reason"
            continue
        oldest = tuple(int(part) for part in block.marks.get("pytest-from", "0").split("."))
        if pytest.version_tuple[: len(oldest)] < oldest:
            continue
        if block.file:
            place_file(project, block)
        if block.language == "console":
            updates.append((block, run_console(block, project, place)))
        elif block.language in ("ini", "toml", "json"):
            check_settings(block, place)
        elif block.language == "plan-table":
            check_plans(block, project, page)
        elif not (block.language == "python" and block.file):
            pytest.fail(f"{place}: a {block.language or 'bare'} block needs a not-run reason")
    if os.environ.get("UPDATE_GOLDEN"):
        write_back(path, updates)


def set_up(
    text: str,
    project: Project,
    machine_with: Callable[..., Machine],
    ollama_with: Callable[..., Any],
) -> None:
    """The machine that `on` names: `gpu=TOTAL,USED[,NAME]`, `ollama=MODEL,SIZE`, `cpus=N`.

    `nvml=NUMBER` is an NVML that fails with this error; `idle-ollama` has nothing loaded.
    """
    words = [word.partition("=")[::2] for word in shlex.split(text)]
    devices = [
        Device(**dict(zip(("total", "used", "name"), value.split(","), strict=False)))
        for key, value in words
        if key == "gpu"
    ]
    given = dict(words)
    assert given.keys() <= {"gpu", "ollama", "cpus", "nvml", "idle-ollama"}, text
    if devices or "nvml" in given:
        machine = machine_with(*devices or [Device()])
        if "nvml" in given:
            machine.inject("nvmlInit*", code=int(given["nvml"]))
    if "ollama" in given:
        name, size = given["ollama"].split(",")
        ollama_with({name: size}, load=name)
    elif "idle-ollama" in given:
        ollama_with({"qwen2.5:14b": "10.8GB"})
    project.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = given.get("cpus", "8")


def place_file(project: Project, block: Block) -> None:
    """Write the block's file; a project has one configuration file at a time."""
    if block.file in CONFIGURATION:
        for name in CONFIGURATION:
            (project.path / name).unlink(missing_ok=True)
    if block.language == "python" and block.file.startswith("test_"):
        (project.path / "test_project.py").unlink(missing_ok=True)
    project.file(block.file, "\n".join(block.lines) + "\n")


# --- console blocks ---


def run_console(block: Block, project: Project, place: str) -> list[str]:
    """Run each command and compare; returns the block as it should be."""
    wanted = list(block.lines)
    parts: list[tuple[str, list[str]]] = []
    for line in block.lines:
        if line.startswith("$ "):
            parts.append((line, []))
        else:
            assert parts, f"{place}: output before the first command"
            parts[-1][1].append(line)
    made: list[str] = []
    for command, expected in parts:
        # Of a command alone without output the options are tried: no worker need start.
        whole = len(block.lines) > 1 and not only_header(expected)
        result = run(command[2:], project, place, whole=whole)
        made += [command, *rewritten(expected, result)]
        if not os.environ.get("UPDATE_GOLDEN"):
            compare(command, expected, result, place)
    return made if os.environ.get("UPDATE_GOLDEN") else wanted


def only_header(expected: list[str]) -> bool:
    """Whether a block shows the plugin's part of the header, which comes before the workers."""
    shown = [line for line in expected if line != "..."]
    return (
        len(shown) > 1
        and expected[0].startswith("gpu-share: ")
        and all(line.startswith("  ") for line in shown[1:])
    )


def run(command: str, project: Project, place: str, *, whole: bool) -> Result:
    words = shlex.split(command)
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    assert words[0] in COMMANDS, f"{place}: {words[0]} cannot be run here: give a not-run reason"
    if words[0] == "pytest":
        if not whole:
            project.write(stop=STOP)
            words += ["-p", "stop"]
        return project.pytest(*words[1:], **environment)
    if words[0] == "pytest-gpushare":
        words[:1] = [sys.executable, "-m", "pytest_gpushare"]
    return project.command(words, **environment)


def compare(command: str, expected: list[str], result: Result, place: str) -> None:
    """The plugin's lines and errors are exactly the block's; its other lines occur."""
    told = f"{place}: {command}\n{result.out}\n{result.err}"
    errors = [line for line in plain(result.err) if line.startswith("ERROR: ")]
    shown = plain("\n".join(expected))
    failed = any(" failed" in line or "[x]" in line for line in shown)
    code = 4 if errors else 1 if failed else 0
    assert result.code == code, told
    if expected:
        assert said(expected) == plain("\n".join(result.said)), told
        assert [line for line in shown if line.startswith("ERROR: ")] == errors, told
        output = plain(result.out + result.err)
        assert [line for line in shown if line not in output and line != "..."] == [], told


def rewritten(expected: list[str], result: Result) -> list[str]:
    """The block's output with the plugin's lines and errors as they are now."""
    if not expected:
        return []
    errors = [line for line in plain(result.err) if line.startswith("ERROR: ")]
    now = [*plain("\n".join(result.said)), *errors]
    old = [
        i
        for i, line in enumerate(expected)
        if line.startswith("ERROR: ") or plain(line)[0] in said(expected)
    ]
    if not old:
        start_at = 1 if expected[:1] == ["..."] else 0
        return [*expected[:start_at], *now, *expected[start_at:]]
    return [*expected[: old[0]], *now, *expected[old[-1] + 1 :]]


def said(lines: list[str]) -> list[str]:
    return plain("\n".join(Result(0, "\n".join(lines), "").said))


def plain(text: str) -> list[str]:
    """The lines without what differs between runs."""
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:11434", text)
    text = re.sub(r"\bin \d+\.\d+s\b", "in 0.50s", text)
    text = re.sub(r"(?m)^=+ (.*?) =+$", r"== \1 ==", text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def write_back(path: Path, updates: list[tuple[Block, list[str]]]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for block, made in reversed(updates):
        lines[block.line - 1 : block.line - 1 + len(block.lines)] = made
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- settings ---


def check_settings(block: Block, place: str) -> None:
    """The block's settings are accepted, or refused where the page says so."""
    text = "\n".join(block.lines)
    ini: dict[str, object] = {}
    found = {"ini": _from_ini, "toml": _from_toml, "json": _from_json}[block.language](text)
    assert found is not None, f"{place}: no settings of pytest in it: give a not-run reason"
    problems = []
    for name, value in found.items():
        if name == "gpu_share":
            assert str(value).lower() in ("true", "false"), place
        elif name.startswith("gpu_share_"):
            ini[name] = value
        elif block.language == "json":
            ini[f"gpu_share_{name}"] = value
    try:
        load(written(ini=ini))
    except SettingsError as error:
        problems.append(str(error))
    assert bool(problems) == ("refused" in block.marks), f"{place}: {problems}"


def _from_ini(text: str) -> dict[str, object] | None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    for name in ("pytest", "tool:pytest"):
        if parser.has_section(name):
            return dict(parser[name])
    return None


def _from_toml(text: str) -> dict[str, object] | None:
    document = tomllib.loads(text)
    tool = document.get("tool", {}).get("pytest", document.get("pytest"))
    return None if tool is None else tool.get("ini_options", tool)


def _from_json(text: str) -> dict[str, object] | None:
    section = json.loads(text).get(JSON_SECTION)
    return section if isinstance(section, dict) else None


def written(**given: Any) -> Written:
    here = Path("/nowhere")
    defaults = {"flags": {}, "overrides": {}, "ini": {}, "ini_file": "pytest.ini"}
    places = {"root": here, "ini_directory": here, "invocation_directory": here}
    return Written(**{**defaults, **places, **given})


# --- tables of plans ---

# The header of many runs, in one process: everything up to the moment when xdist would start.
HEADERS = """
import json, sys
import pytest

class Stop:
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session):
        hook = session.config.hook.pytest_report_header
        self.parts = hook(config=session.config, start_path=session.config.rootpath)
        pytest.exit("seen", returncode=0)

for arguments in json.load(sys.stdin):
    stop = Stop()
    assert pytest.main(["--gpu-share", *arguments], plugins=[stop]) == 0
    said = next(part for part in stop.parts if part[0].startswith("gpu-share: "))
    # The first line of a what-if says that it is one.
    print("HEADLINE", said[1])
"""


def check_plans(block: Block, project: Project, page: str) -> None:
    """In each row the last code is the plan that the codes before it, as options, give.

    On a machine with 64 CPUs.
    """
    rows = [re.findall(r"`([^`]+)`", row) for row in block.lines[2:]]
    done = subprocess.run(
        [sys.executable, "-c", HEADERS],
        input=json.dumps([shlex.split(" ".join(options)) for *options, _ in rows]),
        cwd=project.path,
        env={**project.environment, "PYTEST_XDIST_AUTO_NUM_WORKERS": "64"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    headlines = re.findall(r"^HEADLINE gpu-share: (.*)", done.stdout, re.MULTILINE)
    for row, headline in zip(rows, headlines, strict=True):
        assert headline.startswith(f"{row[-1]} ("), f"{page}:{block.line}: {row}: {headline}"


# --- the pages as a whole ---


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page: str) -> None:
    """A page names only options that exist: what is planned is told without names."""
    text = PAGES[page].read_text(encoding="utf-8")
    known = {option.ini for option in OPTIONS} | {"gpu_share"}
    named = set(re.findall(r"\bgpu_share(?:_\w+)?\b", text)) - {"gpu_share_KEY"}
    refused = {
        name
        for block in blocks_of(PAGES[page])
        if "refused" in block.marks
        for name in re.findall(r"\bgpu_share_\w+", "\n".join(block.lines))
    }
    assert named - known <= refused
    flags = {option.flag for option in OPTIONS if option.flag}
    flags |= {"--gpu-share", "--no-gpu-share", "--gpu-share-simulate", "--gpu-share-strict"}
    flags |= {"--gpu-share-report"}
    assert set(re.findall(r"--(?:no-)?gpu-share[\w-]*", text)) <= flags


def test_reference_lists_every_option(project: Project) -> None:
    """All that `pytest --help` shows of the plugin, and every key of the table."""
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    try:
        import gpushare_reference
    finally:
        sys.path.pop(0)
    path = PAGES["docs/reference/options.md"]
    page = path.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_GOLDEN"):
        rows = gpushare_reference.table()
        page = re.sub(r"\| key \|.*?\n\n", lambda _: f"{rows}\n", page, count=1, flags=re.DOTALL)
        path.write_text(page, encoding="utf-8")
    assert gpushare_reference.table() in page
    assert "{gpu-share-options}" in page
    assert "{gpu-share-presets}" in page
    text = page + gpushare_reference.options() + gpushare_reference.presets()
    text += PAGES["docs/reference/command-line.md"].read_text(encoding="utf-8")
    for option in OPTIONS:
        assert f"{{confval}} {option.ini}" in text
        assert option.meaning[1:] in gpushare_reference.options()
    assert all(f"`{name}`" in text for name in PRESETS)
    helped = project.pytest("--help").out
    for name in re.findall(r"^ +(--(?:no-)?gpu-share[\w-]*)", helped, re.MULTILINE):
        assert f"`{name}" in text, name


def test_messages_exist() -> None:
    """Each message of the reference is made of words that stand in the package."""
    texts = [
        node.value
        for path in sorted((ROOT / "pytest_gpushare").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    source = "\n".join(texts)
    page = PAGES["docs/reference/messages.md"].read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    # Placeholders, and what the plugin puts together from parts.
    between = r"^gpu-share: |CUDA_VISIBLE_DEVICES|\.\.\.|\b[A-Z]+\b|\b[0-9.]+\b|[×=(),;\"]| worker"
    between += "|selected tests|was not preloaded: "
    for message in messages:
        for part in (piece.strip(" s:") for piece in re.split(between, message)):
            assert part in source, f"{message}: {part}"
    assert len(messages) > 20


def test_every_message_is_in_the_reference() -> None:
    """Of each text in the package that begins with `gpu-share: `, the longest fixed part."""
    page = PAGES["docs/reference/messages.md"].read_text(encoding="utf-8")
    texts = []
    for path in (ROOT / "pytest_gpushare").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            parts = [str(v.value) for v in values if isinstance(v, ast.Constant)]
            if parts and parts[0].startswith("gpu-share: "):
                parts[0] = parts[0].removeprefix("gpu-share: ")
                texts.append(max(parts, key=len).strip(" :;(=\n"))
    assert [text for text in texts if len(text) > 14 and text not in page] == []
    assert len(texts) > 30


def test_remedies_are_in_the_reference() -> None:
    """Every error of NVML that has a remedy of its own."""
    page = PAGES["docs/reference/messages.md"].read_text(encoding="utf-8")
    for code, remedy in _REMEDIES.items():
        assert f"`{remedy} (NVML error {code})`" in page


def test_default_preset_is_the_defaults() -> None:
    """What the reference says of `conservative`."""
    for key, value in PRESETS["conservative"].items():
        option = BY_KEY[key]
        assert read(option, value, "preset") == read(option, option.default, "default")


def test_places_in_the_code_exist() -> None:
    """CONTRIBUTING.md names modules, and classes, methods and names in them, that are there."""
    text = PAGES["CONTRIBUTING.md"].read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", text)
    for name, inside in named:
        path = ROOT / "pytest_gpushare" / name
        path = path if path.exists() else ROOT / name
        body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
        for part in inside.split(".") if inside else ():
            found = [node for node in body if part in _names_of(node)]
            assert found, f"{name} has no {inside}"
            body = getattr(found[0], "body", [])
    assert len(named) > 30


def test_example_options_are_accepted() -> None:
    """The options that CONTRIBUTING.md adds as an example, and the fields that it names."""
    (block,) = [b for b in blocks_of(PAGES["CONTRIBUTING.md"]) if "Option(" in b.lines]
    entries, _, fields = "\n".join(block.lines).partition("# config/settings.py")
    written = ast.parse(entries).body
    added = [eval(ast.unparse(entry), {"Option": Option}) for entry in written]
    named = dict(re.findall(r"^(\w+): (\w+)$", fields, re.M))
    values = {option.attribute: read(option, option.default, "default") for option in added}
    assert {name: type(value).__name__ for name, value in values.items()} == named
    assert not BY_KEY.keys() & {option.key for option in added}
    assert list(Settings._fields)[-1] == "origins"


def test_every_package_is_described() -> None:
    """CONTRIBUTING.md has a row for each package and each module at the top."""
    text = PAGES["CONTRIBUTING.md"].read_text(encoding="utf-8")
    package = ROOT / "pytest_gpushare"
    names = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    names += [path.name for path in package.glob("[a-z]*.py")]
    assert len(names) > 15
    assert [name for name in names if not re.search(rf"^\|.*`{name}`.*\|$", text, re.M)] == []


def _names_of(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_links_of_pages_for_github() -> None:
    """Relative links lead to files."""
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name}: {target}"


def test_links_inside_of_contributing() -> None:
    """Links to a heading lead to one, by the name that GitHub gives it."""
    text = PAGES["CONTRIBUTING.md"].read_text(encoding="utf-8")
    headings = [re.sub(r"[^\w -]", "", h).lower() for h in re.findall(r"^#+ (.*)$", text, re.M)]
    links = re.findall(r"\]\(#([^)]+)\)", text)
    assert len(links) > 5
    assert set(links) <= {heading.replace(" ", "-") for heading in headings}
