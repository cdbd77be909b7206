"""Ollama, guarded while the tests run: it is asked what it holds, and never told anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.probe.address import Address
from pytest_gpushare.run.question import Question

if TYPE_CHECKING:
    from pytest_gpushare.run.neighbour import Neighbour


class Pace(NamedTuple):
    """How often Ollama is asked, and how long it may take; seconds."""

    every: float = 2.0
    later: float = 10.0
    """From `often` questions on."""
    often: int = 1800
    """An hour's worth."""
    most: int = 10_000
    """Questions of one run; then nobody is asked any more."""
    longest: float = 30.0
    """Between questions to a server that does not answer."""
    patience: float = 5.0
    """An answer may take so long: during an unload Ollama itself blocks."""
    last_patience: float = 1.0
    """The last answer, for which the end of the run waits."""
    sample: float = 0.2
    """Between looks at how much VRAM is held."""

    def pause(self, asked: int, failures: int) -> float:
        """Seconds until the next question: the more in vain, the longer."""
        usual = self.every if asked < self.often else self.later
        return min(max(usual, self.longest), usual * (1 << min(failures, 16)))


class Guard:
    """The service that asks, from before the first test to after the last."""

    def __init__(
        self, address: Address, open_book: Callable[[], Neighbour], pace: Pace | None = None
    ) -> None:
        """`open_book` makes what the answers are told to; it is called in the guard's thread."""
        self.asked = 0
        """Questions so far."""
        self.problem = ""
        """Why it ended before the tests did; empty where it did not."""
        self._address, self._open_book, self._pace = address, open_book, pace or Pace()
        self._book: Neighbour | None = None
        self._stop = threading.Event()
        self._question: Question | None = None
        """The one that is open."""
        self._heard: Question | None = None
        """The last one whose outcome was told."""
        self._thread = threading.Thread(target=self._run, name="gpu-share-guard", daemon=True)

    @property
    def book(self) -> Neighbour | None:
        """What is known so far; None before the first moment."""
        return self._book

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask once more and end, within the last answer's limit and a little."""
        self._stop.set()
        self._thread.join(self._pace.last_patience + 0.5)

    def resident(self) -> Mapping[str, int]:
        """UUID -> bytes that Ollama holds there now; empty before the first look."""
        return self._book.resident() if self._book is not None else {}

    def has_failed(self) -> bool:
        """Whether a part of a model is on the CPU because of the tests."""
        return self._book is not None and any(spill.is_ours for spill in self._book.spills)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            # Or pytest would report it as a warning of whatever test runs then.
            self.problem = f"{type(error).__name__}: {error}"[:200]

    def _watch(self) -> None:
        book = self._book = self._open_book()
        due = time.monotonic() + self._pace.every
        while not self._stop.wait(self._pace.sample):
            book.sample()
            self._take(book)
            if self._question is None and time.monotonic() >= due and self._may_ask():
                self._ask(self._pace.patience)
                due = time.monotonic() + self._pace.pause(self.asked, book.history.failures)
        self._finish(book)

    def _may_ask(self) -> bool:
        return self.asked < self._pace.most

    def _ask(self, patience: float) -> Question:
        self.asked += 1
        self._question = Question(self._address, patience)
        return self._question

    def _take(self, book: Neighbour) -> None:
        """Hand on the answer to the question that is open, if it came or never will."""
        question = self._question
        if question is None or not question.is_over:
            return
        if question is not self._heard:
            self._heard = question
            question.hang_up()
            if question.models is not None:
                book.answer(question.models)
            else:
                book.silence(question.problem, certain=question.is_refused)
        # A look-up of a name cannot be cancelled: until it ends, no other question is asked.
        if question.is_gone:
            self._question = None

    def _finish(self, book: Neighbour) -> None:
        """The last word: what Ollama holds now that the tests are over."""
        until = time.monotonic() + self._pace.last_patience
        book.sample()
        if self._question is not None:
            # Who did not answer before is not waited for: the end of the run is near.
            if book.is_worth_asking:
                self._question.wait(until - time.monotonic())
            self._take(book)
        if self._question is None and book.is_worth_asking and self._may_ask():
            last = self._ask(max(0.1, until - time.monotonic()))
            last.wait(until - time.monotonic())
            book.sample()
            self._take(book)
        book.end()
