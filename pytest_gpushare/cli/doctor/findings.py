"""What doctor says: a fact, how bad it is, and what mends it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.text import one_line


class Level(str, Enum):
    """How bad a finding is; the values are the marks that are printed."""

    OK = "ok"
    LOOK = "!"
    """The run works, but something is not as it should be, or a trap lies open."""
    BROKEN = "x"


@dataclass(frozen=True)
class Finding:
    """One line of doctor, and for what is not well the mend."""

    level: Level
    fact: str
    code: str = ""
    """Names its section in the documentation; empty for what is well."""
    mend: str = ""
    """The command or the setting that mends it."""


class Section(NamedTuple):
    """Findings about one thing."""

    title: str
    findings: tuple[Finding, ...]


def ok(fact: str) -> Finding:
    """Something that is well, or simply so."""
    return Finding(Level.OK, safe(fact))


def look(code: str, fact: str, mend: str) -> Finding:
    """Something to look at."""
    return Finding(Level.LOOK, safe(fact), code, safe(mend))


def broken(code: str, fact: str, mend: str) -> Finding:
    """Something that is broken: doctor's exit code is 1."""
    return Finding(Level.BROKEN, safe(fact), code, safe(mend))


def safe(text: str) -> str:
    """A text from anywhere, on one line, without what a URL may hold of secrets."""
    text = re.sub(r"://[^/\s@]*@", "://***@", text)
    text = re.sub(r"([?&][^=\s&]{1,40}=)[^\s&]+", r"\1***", text)
    return one_line(text, 600)
