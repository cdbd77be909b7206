"""`pytest-gpushare doctor`: what is wrong here, and how to fix it."""

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
    """The run works, but something needs a look, or can go wrong later."""
    BROKEN = "x"


@dataclass(frozen=True)
class Finding:
    """One line of doctor, with the fix where something is wrong."""

    level: Level
    fact: str
    code: str = ""
    """The name of its section in the documentation; empty for an [ok]."""
    fix: str = ""
    """The command or the setting that fixes it."""


class Section(NamedTuple):
    """The findings about one subject."""

    title: str
    findings: tuple[Finding, ...]


def ok(fact: str) -> Finding:
    """A finding that needs nothing."""
    return Finding(Level.OK, safe(fact))


def look(code: str, fact: str, fix: str) -> Finding:
    """A finding that needs a look."""
    return Finding(Level.LOOK, safe(fact), code, safe(fix))


def broken(code: str, fact: str, fix: str) -> Finding:
    """A finding of something broken: doctor's exit code is 1."""
    return Finding(Level.BROKEN, safe(fact), code, safe(fix))


def safe(text: str) -> str:
    """Foreign text on one line, without the passwords and query values of URLs."""
    text = re.sub(r"://[^/\s@]*@", "://***@", text)
    text = re.sub(r"([?&][^=\s&]{1,40}=)[^\s&]+", r"\1***", text)
    return one_line(text, 600)
