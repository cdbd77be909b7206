"""Settings that would have served this run better, computed from what it measured."""

from __future__ import annotations

from typing import NamedTuple

from pytest_gpushare.run.started import Started


class Hint(NamedTuple):
    """One sentence, with what to type."""

    text: str


def hints(_started: Started) -> list[Hint]:
    """What to change; nothing where nothing is known to be better."""
    return []
