"""What the markers of a test say; most say nothing, and every worker loads this."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytest_gpushare.settings.lines import Alias


class Declared(NamedTuple):
    """What a test's markers say; builtin values, so that a worker can send it."""

    route: str = ""
    """`gpu`, `cpu`, or empty where no marker tells."""
    vram: int | None = None
    devices: int | None = None
    exclusive: bool = False
    required: bool = False
    refusal: str = ""
    """Why the test fails without being run: a marker that cannot be understood."""

    def asks(self) -> bool:
        """Whether the markers ask for more than to be run on a GPU worker."""
        several = self.devices is not None and self.devices > 1
        return self.vram is not None or several or self.exclusive or bool(self.refusal)


def means_cpu(aliases: Iterable[Alias]) -> bool:
    """Whether a marker of the suite tells the CPU tests, so that all others are GPU tests."""
    return any(name == "cpu" for alias in aliases for name, _ in alias.meanings)
