"""What is noticed between two answers of `/api/ps`, and in which words it is told."""

from __future__ import annotations

from pytest_gpushare.ollama.history import BACK, UNREACHABLE, Change, History, sentence
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.units import GB

WHOLE = LoadedModel("m:14b", 10 * GB, 10 * GB, "d1", 4096)
PART = LoadedModel("m:14b", 10 * GB, 6 * GB, "d1", 4096)
LARGER = LoadedModel("m:14b", 12 * GB, 12 * GB, "d1", 8192)
OTHER = LoadedModel("n:1b", GB, GB, "d2", 4096)


def kinds(changes: list[Change]) -> list[str]:
    return [change.kind.removeprefix("ollama-") for change in changes]


def sentences(changes: list[Change]) -> list[str]:
    return [sentence(change) for change in changes]


def test_nothing_new() -> None:
    """The same answer again is no news, whatever its order."""
    history = History([WHOLE, OTHER])
    assert history.look(2.0, [OTHER, WHOLE]) == []
    assert history.lives["m:14b"].loads == 0


def test_loaded_and_unloaded() -> None:
    history = History([])
    assert sentences(history.look(2.0, [WHOLE])) == ["Ollama loaded m:14b 10.0 GB, 100 % on GPU"]
    assert sentences(history.look(4.0, [])) == ["Ollama unloaded m:14b (10.0 GB)"]
    life = history.lives["m:14b"]
    assert (life.loaded_at, life.gone_at, life.loads, life.spills) == (2.0, 4.0, 1, 0)


def test_reloaded_with_another_context() -> None:
    """A request with other options made Ollama load it anew: told, blamed on nobody."""
    changes = History([WHOLE]).look(2.0, [LARGER])
    assert sentences(changes) == [
        "Ollama reloaded m:14b 12.0 GB, 100 % on GPU; context 4096, now 8192, "
        "size 10.0 GB, now 12.0 GB"
    ]
    pulled = LoadedModel("m:14b", 10 * GB, 10 * GB, "d9", 4096)
    assert sentences(History([WHOLE]).look(2.0, [pulled])) == [
        "Ollama reloaded m:14b 10.0 GB, 100 % on GPU; another version of the model"
    ]


def test_spilled_and_recovered() -> None:
    """A loaded model is never moved, so another place is another load."""
    history = History([WHOLE])
    assert kinds(history.look(2.0, [PART])) == ["reloaded", "spilled"]
    assert history.look(4.0, [PART]) == []
    changes = history.look(6.0, [WHOLE])
    assert kinds(changes) == ["reloaded", "recovered"]
    assert sentences(changes)[1] == "Ollama has all of m:14b on the GPU again (10.0 GB)"
    assert (history.lives["m:14b"].loads, history.lives["m:14b"].spills) == (2, 1)


def test_recovered_after_it_was_gone() -> None:
    history = History([PART])
    assert history.lives["m:14b"].spilled_before
    assert kinds(history.look(2.0, [])) == ["unloaded"]
    assert kinds(history.look(4.0, [WHOLE])) == ["loaded", "recovered"]


def test_every_partial_load_is_a_spill() -> None:
    """Also one after another, each with its own moment."""
    history = History([])
    assert kinds(history.look(2.0, [PART])) == ["loaded", "spilled"]
    assert kinds(history.look(4.0, [])) == ["unloaded"]
    assert kinds(history.look(6.0, [PART])) == ["loaded", "spilled"]
    assert history.lives["m:14b"].spills == 2


def test_more_than_its_size() -> None:
    """Where Ollama does not say, or says more than all, how much is on the GPU is unknown."""
    odd = LoadedModel("m:14b", 10 * GB, None, "d1", 4096)
    assert sentences(History([]).look(2.0, [odd])) == [
        "Ollama loaded m:14b 10.0 GB, how much of it on GPU is unknown"
    ]
    assert kinds(History([PART]).look(2.0, [odd])) == ["reloaded"]


def test_one_silence_is_forgiven() -> None:
    """During an unload `/api/ps` may block for longer than anybody waits."""
    history = History([WHOLE])
    assert history.fail(2.0, "no answer within 5 s") == []
    assert history.look(4.0, [WHOLE]) == []
    assert history.silences == []


def test_unreachable_and_back() -> None:
    history = History([WHOLE])
    history.fail(2.0, "no answer within 5 s")
    changes = history.fail(4.0, "no answer within 5 s")
    assert sentences(changes) == ["Ollama does not answer any more: no answer within 5 s"]
    assert history.fail(8.0, "no answer within 5 s") == []
    changes = history.look(16.0, [])
    assert sentences(changes) == ["Ollama answers again", "Ollama unloaded m:14b (10.0 GB)"]
    assert history.silences == [(0.0, 16.0)]
    assert history.failures == 0


def test_refused_is_certain() -> None:
    """Nobody listens: one try is enough."""
    changes = History([WHOLE]).fail(2.0, "nothing listens", certain=True)
    assert [change.kind for change in changes] == [UNREACHABLE]


def test_server_that_comes_late() -> None:
    """What it holds then was there before; nobody knows since when."""
    history = History(None)
    assert history.fail(2.0, "nothing listens", certain=True) == []
    changes = history.look(4.0, [PART])
    assert ([change.kind for change in changes], sentences(changes)) == ([BACK], ["Ollama answers"])
    assert history.lives["m:14b"].spilled_before
    assert history.silences == []


def test_many_names_are_bounded() -> None:
    """A server that invents names fills no memory."""
    history = History([])
    for number in range(1000):
        history.look(float(number), [LoadedModel(f"m{number}", GB, GB)])
    assert len(history.lives) == 256
