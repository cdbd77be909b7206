"""A run that asked for the plugin and is left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.run.links import Links

if TYPE_CHECKING:
    import pytest


class LeftAlone(NamedTuple):
    """A run that asked, but whose workers are the user's own; nothing is probed."""

    why: str
    links: Links = Links()
    """Never opened."""

    def close(self) -> None:
        """Nothing is held."""

    def recall(self, _contexts: Mapping[str, int]) -> None:
        """Nothing is capped."""

    def keep_what_it_saw(self, _config: pytest.Config) -> None:
        """Nothing was looked at."""

    def place(self, _specs: Sequence[Any]) -> None:
        """Nothing is placed."""

    def message_to(self, _spec: Any) -> None:
        """Nothing is told."""

    def message_to_itself(self) -> None:
        """Nothing is told."""

    def joined(self, worker: str, message: Mapping[str, Any]) -> None:
        """Nobody shares anything."""

    def gone(self, worker: str) -> None:
        """Nobody shares anything."""

    def begin(self) -> None:
        """Nothing runs beside the tests."""

    def look_again(self) -> None:
        """Nothing was looked at."""

    def end(self) -> None:
        """Nothing ran beside the tests."""

    def has_failed(self) -> bool:
        """Nothing is judged."""
        return False
