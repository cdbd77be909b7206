"""Models of one server that several sessions use: whose turn it is, and how many tests at once.

Sessions with different models take turns, in the order in which they asked: loading one may evict
the other. Sessions with the same model share its places: no more of their tests use it at once
than the server answers. Pure rules over the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pytest_gpushare.leases.claims import TICKET_LIFE
from pytest_gpushare.leases.ledger import LiveSession
from pytest_gpushare.leases.records import ModelTurn


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
            for turn in record.turns if record is not None else ():
                if turn.server != server:
                    continue
                if record is not None and abs(now - record.renewed) > TICKET_LIFE:
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
