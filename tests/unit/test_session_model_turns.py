"""Sessions that use models of one server: turns in order, and shared places."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from pytest_gpushare.leases import ledger, locks
from pytest_gpushare.leases.claims import TICKET_LIFE
from pytest_gpushare.leases.ledger import Ledger, LiveSession
from pytest_gpushare.leases.lessee import Lessee
from pytest_gpushare.leases.records import LeaseRecord, ModelTurn, from_bytes, to_bytes
from pytest_gpushare.ollama.models import RunModel
from pytest_gpushare.session.model_turns import ModelTurns, Queue

from .test_planning_sizing import DEFAULTS

NOW = 100.0


def turn(model: str = "a", places: int = 0, ticket: int = 0, *, is_open: bool = False) -> ModelTurn:
    """A turn on the one server."""
    return ModelTurn("s", model, places, is_open or bool(places), ticket)


def queue_of(*turns: ModelTurn, renewed: float = NOW) -> Queue:
    """The turns of so many other sessions."""
    records = [LeaseRecord(n, turns=(each,), renewed=renewed) for n, each in enumerate(turns)]
    sessions = [LiveSession(f"s-{n}", 0, record) for n, record in enumerate(records)]
    return Queue.of(sessions, "s", NOW)


def test_record_keeps_turns() -> None:
    """They stand in the record; one written before them has none."""
    record = LeaseRecord(1, turns=(ModelTurn("127.0.0.1:11434", "sha@4096", 2, True, 0),))
    assert from_bytes(to_bytes(record)).turns == record.turns
    text = to_bytes(LeaseRecord(1)).replace(b'"turns":[],', b"")
    assert from_bytes(text).turns == ()


@pytest.mark.parametrize(
    ("others", "own", "expected"),
    [
        ([], turn(), True),
        ([turn("b", 1)], turn(), False),
        ([turn("b", is_open=True, ticket=3)], turn(), False),
        ([turn("a", 1)], turn(), True),
        ([turn("a", 1), turn("b", ticket=1)], turn(), True),
        ([turn("b", ticket=1)], turn(ticket=2), False),
        ([turn("b", ticket=2)], turn(ticket=1), True),
        ([turn("b", ticket=2)], turn(), False),
    ],
)
def test_who_may_load(others: list[ModelTurn], own: ModelTurn, expected: bool) -> None:
    """One model at a time, in the order of asking; a model that is there is joined."""
    assert queue_of(*others).may_open(own) is expected


def test_stopped_session_blocks_nobody() -> None:
    """Its ticket counts for so long."""
    waiting = turn("b", ticket=1)
    assert not queue_of(waiting, renewed=NOW - TICKET_LIFE).may_open(turn())
    assert queue_of(waiting, renewed=NOW - TICKET_LIFE - 0.1).may_open(turn())


@pytest.mark.parametrize(
    ("others", "own", "parallel", "gives_way", "expected"),
    [
        ([], turn(places=1), 4, False, 4),
        ([turn("b", 2)], turn(places=1), 4, False, 4),
        # Another one waits: half of them; and the only one after a while.
        ([turn(ticket=1)], turn(places=4), 4, False, 2),
        ([turn(ticket=1)], turn(places=1), 1, False, 1),
        ([turn(ticket=1)], turn(places=1), 1, True, 0),
        ([turn(places=1)], turn(ticket=1, is_open=True), 1, False, 0),
        ([turn(places=1)], turn(places=1), 2, True, 1),
        ([turn(places=2)], turn(is_open=True), 3, False, 1),
        # Those that asked before come first.
        ([turn(ticket=1)], turn(ticket=2, is_open=True), 1, False, 0),
        ([turn(ticket=2)], turn(ticket=1, is_open=True), 1, False, 1),
    ],
)
def test_places(
    others: list[ModelTurn], own: ModelTurn, parallel: int, gives_way: bool, expected: int
) -> None:
    """The places of a model are shared; where there are too few, sessions take turns."""
    assert queue_of(*others).places(own, parallel, gives_way=gives_way) == expected


@pytest.mark.parametrize("seed", range(60))
def test_random_sessions(seed: int) -> None:
    """Never more places than there are, one model at a time, and everybody gets there."""
    draw = Random(seed)
    parallel, count = draw.randint(1, 4), draw.randint(2, 5)
    turns = [turn(draw.choice("ab")) for _ in range(count)]
    left = [draw.randint(1, 6) for _ in range(count)]
    for _ in itertools.repeat(None, 3000):
        number = draw.randrange(count)
        if not left[number]:
            turns[number] = turn(turns[number].model)
            continue
        own = turns[number]
        others = queue_of(*(t for n, t in enumerate(turns) if n != number))
        if own.is_open or others.may_open(own):
            places = others.places(own, parallel, gives_way=draw.random() < 0.5)
            ticket = 0 if places else own.ticket or others.next_ticket
            turns[number] = own._replace(is_open=True, places=places, ticket=ticket)
            left[number] -= bool(places) and draw.random() < 0.3
        else:
            turns[number] = own._replace(ticket=own.ticket or others.next_ticket)
        assert len({t.model for t in turns if t.is_open}) <= 1
        for model in "ab":
            assert sum(t.places for t in turns if t.model == model) <= parallel
    assert left == [0] * count


class Limits:
    """A dispatcher whose model may be used by so many tests."""

    places: int | None = None

    def limit(self, _group: int, places: int) -> int:
        self.places = places
        return 0


@pytest.fixture
def turns_in(tmp_path: Path) -> Iterator[Callable[..., ModelTurns]]:
    """Sessions that use one model, of which the server answers one request at a time."""
    with ExitStack() as stack:

        def begin(**settings: object) -> ModelTurns:
            lessee = Lessee(Ledger(tmp_path / "leases"), LeaseRecord(os.getpid()), {}, None)
            stack.callback(lessee.close)
            given = DEFAULTS._replace(ollama_parallel=1, **settings)  # type: ignore[arg-type]
            models = [RunModel("a:1b", names=("a:1b",))]
            nothing = lambda *_, **__: None  # noqa: E731
            return ModelTurns(lessee, "server", models, given, nothing, lambda: None)

        yield begin


def in_force(turns: ModelTurns) -> int | None:
    """How many tests may use the model after a look at the other sessions."""
    turns.look()
    limits = Limits()
    turns.put_in_force(limits)  # type: ignore[arg-type]
    return limits.places


@pytest.mark.parametrize(("patience", "expected"), [(600, 0), (0, 1)])
def test_while_the_gate_is_held_places_stay_as_they_are(
    turns_in: Callable[..., ModelTurns],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    patience: int,
    expected: int,
) -> None:
    """As on a busy machine. Who has none goes on without only when it has waited for long."""
    monkeypatch.setattr(ledger, "GATE_LIMIT", 0.05)
    first, second = turns_in(), turns_in(ollama_load_timeout=patience)
    over = threading.Event()
    first.take(0, over)
    gate = os.open(tmp_path / "leases" / "gate", os.O_RDONLY)
    try:
        assert locks.try_exclusive(gate)
        over.set()
        second.take(0, over)
        assert (in_force(first), in_force(second)) == (1, expected)
    finally:
        os.close(gate)


def test_what_could_not_be_given_back_is_with_the_next_change(
    turns_in: Callable[..., ModelTurns], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "GATE_LIMIT", 0.05)
    monkeypatch.setattr(ledger, "GATE_REST", 0.0)
    first, second = turns_in(), turns_in()
    over = threading.Event()
    first.take(0, over)
    gate = os.open(tmp_path / "leases" / "gate", os.O_RDONLY)
    assert locks.try_exclusive(gate)
    first.give_back(0)
    os.close(gate)
    first._lessee.change(done=1)
    over.set()
    second.take(0, over)
    assert in_force(second) == 1
