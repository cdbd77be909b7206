"""A server that tests of several sessions use: whose turn it is, and how many tests at once.

Sessions with different models take turns, in the order in which they asked: loading one may evict
the other. Sessions with the same model share its places: no more of their tests use it at once
than the server answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.leases.claims import TICKET_LIFE, Naming
from pytest_gpushare.leases.ledger import GateHeldError, LedgerError, LiveSession
from pytest_gpushare.leases.records import ModelTurn

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.leases.lessee import Lessee
    from pytest_gpushare.ollama.models import RunModel
    from pytest_gpushare.scheduler.model_dispatch import ModelDispatch


class Queue(NamedTuple):
    """The turns of the other sessions on one server."""

    turns: tuple[ModelTurn, ...] = ()
    sessions: tuple[LiveSession, ...] = ()
    """Those that have a model open there."""

    @classmethod
    def of(cls, sessions: Iterable[LiveSession], server: str, now: float) -> Queue:
        """A ticket that nobody renews counts for nothing: a stopped session blocks nobody."""
        turns, holders = [], []
        for session in sessions:
            record = session.record
            for turn in record.turns:
                if turn.server != server:
                    continue
                if abs(now - record.renewed) > TICKET_LIFE:
                    turn = turn._replace(ticket=0)
                turns.append(turn)
                if turn.is_open:
                    holders.append(session)
        return cls(tuple(turns), tuple(holders))

    @property
    def next_ticket(self) -> int:
        """One behind all others."""
        return max((turn.ticket for turn in self.turns), default=0) + 1

    def sharing(self, model: str) -> Sequence[ModelTurn]:
        """Those that use this model, or wait for it."""
        return [t for t in self.turns if t.model == model and (t.places or t.ticket or t.is_open)]

    def may_open(self, own: ModelTurn) -> bool:
        """Whether the session may have its model loaded now."""
        opened = [turn for turn in self.turns if turn.is_open]
        if opened:
            return all(turn.model == own.model for turn in opened)
        return not any(self._is_before(turn, own) for turn in self.turns)

    def places(self, own: ModelTurn, parallel: int, *, gives_way: bool) -> int:
        """How many tests of the session may use its open model at once.

        `gives_way`: whether it has had its places for long enough, where others have none.
        """
        others = self.sharing(own.model)
        if not others:
            return parallel
        share = -(-parallel // (len(others) + 1))
        waiting = [turn for turn in others if turn.ticket and not turn.places]
        left = parallel - sum(turn.places for turn in others)
        if own.places:
            nothing_is_left = left <= own.places and own.places <= share
            if gives_way and waiting and nothing_is_left:
                return own.places - 1
            return min(share, max(own.places, left - len(waiting)), max(left, 0))
        return max(0, min(share, left - sum(self._is_before(turn, own) for turn in waiting)))

    @staticmethod
    def _is_before(turn: ModelTurn, own: ModelTurn) -> bool:
        return bool(turn.ticket) and (not own.ticket or turn.ticket < own.ticket)


QUANTUM = 1.0
"""Seconds for which a session keeps its places while another one has none."""

SHORT_PAUSE, LONG_PAUSE = 0.025, 0.25
"""Seconds between two looks while something is waited for; longer, the longer it takes."""

PAUSE_ALONE = 1.0
"""The same while no other session uses the model."""

WORTH_A_NOTE = 0.5
"""Seconds of waiting for other sessions."""


class ModelTurns:
    """The turns of one session: all but `put_in_force` is for one thread.

    A fault of the ledger leaves the session as if it were alone. While the gate is held it keeps
    the places that it has published, and takes others only after waiting as long as for a session
    without progress.
    """

    def __init__(
        self,
        lessee: Lessee,
        server: str,
        models: Sequence[RunModel],
        settings: Settings,
        note: Callable[..., object],
        wake: Callable[[], object],
    ) -> None:
        """`models`: by group. `wake` has `put_in_force` called in another thread."""
        self._lessee, self._server, self._models = lessee, server, models
        self._parallel = settings.ollama_parallel
        self._patience = float(settings.ollama_load_timeout)
        """Seconds without progress for which the tests of others are waited for."""
        self._always = settings.ollama_models
        self._naming = Naming(settings.report_names)
        self._note, self._wake = note, wake
        self._turns: dict[int, ModelTurn] = {}
        self._since: dict[int, float] = {}
        """Group -> since when it has its places, or waits for them."""
        self._progress: object = None
        self._places: Mapping[int, int] = {}
        """Group -> how many of its tests may be under way, of those whose model is open."""
        self._in_force: tuple[Mapping[int, int], Mapping[int, int]] = {}, {}
        """The places that were put in force last, and how many tests were under way then."""
        self._awaited = ""
        """The sessions that are waited for."""

    def take(
        self, number: int, is_over: threading.Event, on_wait: Callable[[], object] = lambda: None
    ) -> None:
        """Wait for the turn of this group's model, and for a place.

        `on_wait` is called once where that takes a while.
        """
        if number not in self._turns:
            self._turns[number] = ModelTurn(self._server, self._models[number].key)
            self._since[number] = time.monotonic()
        began, pause, waited, who = time.monotonic(), SHORT_PAUSE, 0.0, ""
        while True:
            self._revise(self._none_under_way)
            before, waited = waited, time.monotonic() - began
            if self._places.get(number) or is_over.wait(pause):
                break
            pause, who = min(1.2 * pause, LONG_PAUSE), self._awaited or who
            if before < WORTH_A_NOTE <= waited:
                on_wait()
        self._publish()
        if who and waited >= WORTH_A_NOTE:
            self._note(
                "ollama-waited",
                f"{self._models[number].shown} waited {waited:.1f} s for the tests of {who}",
                waited_s=round(waited, 3),
            )

    def give_back(self, number: int) -> None:
        """The session has no use for the model any more."""
        if self._turns.pop(number, None) is not None:
            self._revise(self._none_under_way)
            # Where the gate could not be had, it is given back with the next change of the record.
            turns = tuple(self._turns.values())
            if self._lessee.record.turns != turns:
                self._lessee.change(turns=turns)
            self._publish()

    def others_wait(self) -> bool:
        """Whether another session waits for another model of the server, or for VRAM."""
        mine = {turn.model for turn in self._turns.values()}
        others, sessions = self._others()
        return any(turn.ticket and turn.model not in mine for turn in others.turns) or any(
            share.want for session in sessions for share in session.record.devices.values()
        )

    def _others(self) -> tuple[Queue, Sequence[LiveSession]]:
        sessions = self._lessee.ledger.look()
        return Queue.of(sessions, self._server, time.monotonic()), sessions

    def look(self) -> float | None:
        """Share the places with the other sessions. Returns the seconds until the next look."""
        if not self._turns:
            return None
        if all(turn.places for turn in self._turns.values()):
            others, _ = self._others()
            is_alone = not any(others.sharing(turn.model) for turn in self._turns.values())
            if is_alone and all(turn.places == self._parallel for turn in self._turns.values()):
                return PAUSE_ALONE
        before = self._places
        self._revise(self._under_way)
        if self._places != before:
            self._wake()
        is_settled = all(t.places == self._places[n] > 0 for n, t in self._turns.items())
        return LONG_PAUSE if is_settled else SHORT_PAUSE

    def put_in_force(self, dispatch: ModelDispatch) -> None:
        """Have no more tests under way than the session has places; in xdist's thread."""
        places = self._places
        if places:
            self._in_force = places, {n: dispatch.limit(n, count) for n, count in places.items()}

    def _under_way(self, number: int, limit: int) -> int | None:
        """How many tests of a group are under way now that it is limited; None: not limited yet."""
        if self._places.get(number) != limit:
            self._places = {**self._places, number: limit}
            self._wake()
        places, used = self._in_force
        return used.get(number) if places is self._places else None

    @staticmethod
    def _none_under_way(_number: int, _limit: int) -> int:
        """None is while the session waits, and in a process that runs its tests itself."""
        return 0

    def _publish(self) -> None:
        """Let other sessions know which models are in use: they do not unload them."""
        names = [name for number in self._turns for name in self._models[number].names]
        models = tuple(dict.fromkeys([*self._always, *names]))
        if models != self._lessee.record.models:
            self._lessee.change(models=models)

    def _revise(self, used: Callable[[int, int], int | None]) -> None:
        places: dict[int, int] = {}

        def decide(sessions: Sequence[LiveSession]) -> Sequence[ModelTurn]:
            now = time.monotonic()
            queue = Queue.of(sessions, self._server, now)
            progress = {(s.name, s.record.done) for s in queue.sessions}
            if progress != self._progress:
                self._progress = progress
                for number, turn in self._turns.items():
                    if not turn.places:
                        self._since[number] = now
            self._awaited = "; ".join(map(self._naming.session, queue.sessions))
            for number, turn in self._turns.items():
                self._turns[number], places[number] = self._next(number, turn, queue, now, used)
            return tuple(self._turns.values())

        try:
            self._lessee.take_turn(decide)
        except GateHeldError:
            now = time.monotonic()
            has_waited = {n: now - since >= self._patience for n, since in self._since.items()}
            places = {
                number: turn.places or (self._parallel if has_waited[number] else 0)
                for number, turn in self._turns.items()
            }
        except LedgerError:
            # The record of the session says so to the user.
            places = dict.fromkeys(self._turns, self._parallel)
        if places != self._places:
            self._places = places

    def _next(
        self,
        number: int,
        turn: ModelTurn,
        queue: Queue,
        now: float,
        used: Callable[[int, int], int | None],
    ) -> tuple[ModelTurn, int]:
        """The turn as it is published now, and how many tests may be under way."""
        has_waited = not turn.places and now - self._since[number] >= self._patience
        if not (turn.is_open or has_waited or queue.may_open(turn)):
            return turn._replace(ticket=turn.ticket or queue.next_ticket), 0
        if not turn.is_open and not any(t.is_open for t in queue.turns):
            # All places, until it is loaded: others find it so.
            allowed = self._parallel
        else:
            gives_way = now - self._since[number] >= QUANTUM
            allowed = queue.places(turn, self._parallel, gives_way=gives_way)
        if has_waited:
            allowed = max(1, allowed)
        held = allowed
        if allowed < turn.places:
            under_way = used(number, allowed)
            held = turn.places if under_way is None else max(allowed, under_way)
        if bool(held) != bool(turn.places):
            self._since[number] = now
        ticket = 0 if held else turn.ticket or queue.next_ticket
        return turn._replace(is_open=True, places=held, ticket=ticket), allowed
