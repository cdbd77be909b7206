"""The project's English: words that readers of the field would not use, or not in this sense.

Checked are the documentation, the changelog fragments, and the docstrings and comments of
the package. Code is not: a block of a page or a literal shows what a program prints.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_gpushare.config.options import OPTIONS, SWITCHES

ROOT = Path(__file__).parents[2]
PROSE = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "changelog.d").glob("*.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
)
MODULES = sorted((ROOT / "pytest_gpushare").rglob("*.py"))

UNWANTED = {
    r"mend(s|ed|ing)?": "fix",
    r"whom(ever)?": "which process; counting every process",
    r"of our business": "ignored",
    r"forgiven": "validated strictly",
    r"costs? no(thing)? (test|else)": "never fails the run",
    r"for want of": "for lack of",
    r"told|tells?": "reports, says, shows",
    r"hears?|heard": "receives; is called",
    r"for ever": "forever; without a limit",
    r"heed(s|ed|ing)?": "respect",
    r"hung(ry|riest)": "with the highest peaks",
    r"(can|could) be had": "is available",
    r"anew": "again",
    r"aright|unaided|hitherto|thereof|betwixt|whence": "a plain word",
    r"crews?|rooms? of the house": "worker; package",
    r"(takes|laid|puts?) (hold|to heart)": "a plain word",
    r"(stands?|hangs?) (on the ground|from the ceiling)": "from the bottom; from the top",
}
"""Pattern -> what to write. Each matches whole words, whatever their case."""

ONLY_IN_PAGES = {
    r"nobody|somebody": "no process; another process",
    r"beside": "next to; in addition to",
    r"guard(s|ed|ing)?": "monitor",
}
"""The same, for what users read."""


def prose_of(page: str) -> Iterator[tuple[int, str]]:
    """(line, text) of a page in Markdown, without blocks of code, literals and targets of links."""
    fence = ""
    for number, line in enumerate(page.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif fence:
            fence = "" if line.strip() == fence else fence
        elif not re.match(r"(% |<!-- |:)", line):
            yield number, re.sub(r"`+[^`]*`+|\]\([^)]*\)", " ", line)


def comments_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of the docstrings and comments of a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        # A docstring, or the text under a field.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                for offset, line in enumerate(text.splitlines()):
                    yield node.lineno + offset, re.sub(r"`+[^`]*`+", " ", line)


def unwanted(lines: Iterator[tuple[int, str]], words: dict[str, str]) -> Iterator[str]:
    """`LINE: word: what to write` for each unwanted word."""
    for number, text in lines:
        for pattern, better in words.items():
            for found in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE):
                yield f"{number}: {found[0]!r}: {better}"


@pytest.mark.parametrize(
    "path",
    PROSE,
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_pages(path: Path) -> None:
    """The documentation and the changelog fragments."""
    lines = prose_of(path.read_text(encoding="utf-8"))
    assert list(unwanted(lines, UNWANTED | ONLY_IN_PAGES)) == []


def test_package() -> None:
    """The docstrings and comments of the package."""
    assert len(MODULES) > 90
    found = [
        f"{path.relative_to(ROOT)}:{problem}"
        for path in MODULES
        for problem in unwanted(comments_of(path.read_text(encoding="utf-8")), UNWANTED)
    ]
    assert found == []


def test_options_that_the_package_names_exist() -> None:
    """Messages, docstrings and comments name options, and the switches of the command line."""
    known = {option.ini for option in OPTIONS}
    known |= {flag.strip("-").replace("-", "_") for flag, *_ in SWITCHES}
    # Where `config.option` keeps that a command of our own asks for a plan.
    known.add("gpu_share_only_asks")
    named = {
        (name, path.name)
        for path in MODULES
        for name in re.findall(r"\bgpu_share_[a-z_]*[a-z]\b", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 50
    assert sorted(each for each in named if each[0] not in known) == []


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("It mends\nthe run.", ["1: 'mends': fix"]),
        ("```text\nmend\n```\nSee {doc}`mend` and [this](mend.md).", []),
        ("in use, by Whomever", ["1: 'Whomever': which process; counting every process"]),
        ("recommend, amendment", []),
    ],
)
def test_what_is_found_in_a_page(page: str, found: list[str]) -> None:
    """Words in the text, whatever their case, but none in code and in links."""
    assert list(unwanted(prose_of(page), UNWANTED)) == found


def test_what_is_found_in_a_module() -> None:
    """Docstrings, texts of fields and comments, but no names and no other strings."""
    source = '"""Mend."""\nmend = "mend"\n"""To mend it: `mend`."""\n# Mended.\n'
    found = sorted(unwanted(comments_of(source), UNWANTED))
    assert found == ["1: 'Mend': fix", "3: 'mend': fix", "4: 'Mended': fix"]
