"""One question to Ollama, in a thread of its own: a server that hangs holds up nobody."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from pytest_gpushare.probe.address import Address
from pytest_gpushare.probe.facts import LoadedModel

if TYPE_CHECKING:
    from pytest_gpushare.probe.exchange import Connection


class Question:
    """`GET /api/ps`, asked as soon as this is made."""

    def __init__(self, address: Address, patience: float) -> None:
        """`patience` is how many seconds an answer may take."""
        self.models: tuple[LoadedModel, ...] | None = None
        """The answer; None where none came that makes sense."""
        self.problem = f"no answer within {patience:g} s"
        """Why there is none."""
        self.is_refused = False
        """Whether nothing listens there."""
        self._address = address
        self._deadline = time.monotonic() + patience
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._ask, name="gpu-share-ollama", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether there is an answer, or will be none."""
        return self.is_gone or time.monotonic() >= self._deadline

    @property
    def is_gone(self) -> bool:
        """Whether its thread has ended, so that the next question overlaps with nothing."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the answer, at most for so many seconds."""
        self._thread.join(max(0.0, seconds))

    def hang_up(self) -> None:
        """Want no answer any more: one whose head drips would never end by itself."""
        if self._connection is not None and not self.is_gone:
            with contextlib.suppress(Exception):
                self._connection.close()

    def _ask(self) -> None:
        try:
            self._exchange()
        except Exception as error:
            self.problem = _line(f"cannot be asked: {type(error).__name__}: {error}")

    def _exchange(self) -> None:
        # Imported here, where it delays nobody: the workers are being started meanwhile.
        from pytest_gpushare.probe.exchange import NonsenseError, UnreachableError, connect
        from pytest_gpushare.probe.ollama import loaded_models

        try:
            connection = connect(self._address, self._opened)
            try:
                self.models = loaded_models(connection, self._deadline)
            finally:
                connection.close()
        except TimeoutError:
            pass
        except UnreachableError as error:
            self.is_refused = True
            self.problem = _line(f"cannot be reached: {error}") if str(error) else "nothing listens"
        except NonsenseError as odd:
            self.problem = _line(f"answers nonsense: {odd}")

    def _opened(self, connection: Connection) -> None:
        self._connection = connection


def _line(text: str) -> str:
    """A text from outside, fit for one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:200])
