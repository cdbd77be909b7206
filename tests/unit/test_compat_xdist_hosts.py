"""xdist and execnet with workers on other hosts, with and without the private names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from execnet import RemoteError

from pytest_gpushare.compat import xdist_hosts
from pytest_gpushare.compat.xdist_hosts import (
    Replacements,
    WorkerStart,
    change_start,
    count_of_cpus,
    write_workers,
)


class Gateway:
    """A gateway that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def remote_exec(self, _source: object) -> Any:
        class Channel:
            def send(_self, message: object) -> None:
                self.sent.append(message)

        return Channel()


def started(message: Any, node: Any) -> list[Any]:
    """What arrives at a worker where xdist sends this."""
    change_start(node, lambda start: start._replace(arguments=["changed"], path=["/there"]))
    channel = node.gateway.remote_exec("source")
    channel.send(message)
    channel.send("next")
    return list(node.gateway.sent)


def test_the_start_of_a_worker_is_changed_once() -> None:
    node = SimpleNamespace(gateway=Gateway(), workerinput={"id": "gw0"})
    sent = started((node.workerinput, ["here"], {"basetemp": "/t", "x": 1}, ["/here"]), node)
    assert sent == [(node.workerinput, ["changed"], {"basetemp": "/t", "x": 1}, ["/there"]), "next"]
    assert "remote_exec" not in vars(node.gateway)


@pytest.mark.parametrize("length", [3, 5])
def test_a_message_of_another_form_is_sent_as_it_is(length: int) -> None:
    node = SimpleNamespace(gateway=Gateway(), workerinput={})
    message = (node.workerinput, ["here"], {}, None, None)[:length]
    assert started(message, node) == [message, "next"]


def test_start_of_is_plain() -> None:
    assert WorkerStart(["a"], None, None)._replace(basetemp="b").basetemp == "b"


def test_workers_are_written_as_options() -> None:
    options = SimpleNamespace(numprocesses="gpu-auto", px=[], tx=[], dist="no",
                              maxworkerrestart=None)  # fmt: skip
    write_workers(options, ["id=a"], ["2*popen//via=a"], 2)
    assert vars(options) == {"numprocesses": None, "px": ["id=a"], "tx": ["2*popen//via=a"],
                             "dist": "load", "maxworkerrestart": "8"}  # fmt: skip


def plugins(session: Any) -> Any:
    return SimpleNamespace(get_plugin=lambda name: session if name == "dsession" else None)


def test_without_xdists_session_nothing_is_replaced_or_ended() -> None:
    """None of it raises: xdist then goes on as without the plugin."""
    for session in (None, SimpleNamespace()):
        found = Replacements(plugins(session))
        found.ask(lambda _node, _problem: "no")
        found.wait_for_one_less()
        found.cut("a")
        found.forget("a")
        found.end_all()
        assert found.gateway("a") is None
        assert not found.is_connected("a")


def test_a_worker_that_is_refused_is_not_replaced() -> None:
    cloned, lines, ended = list[Any](), list[str](), list[bool]()
    session = SimpleNamespace(
        _clone_node=cloned.append,
        report_line=lines.append,
        triggershutdown=lambda: ended.append(True),
        _active_nodes={"gw0"},
    )
    Replacements(plugins(session)).ask(lambda node, _problem: node.why)
    kept = SimpleNamespace(why="", gateway=SimpleNamespace(id="gw1"))
    lost = SimpleNamespace(why="its host is gone", gateway=SimpleNamespace(id="gw0"))
    for node in (kept, lost):
        session.report_line(f"\nreplacing crashed worker {node.gateway.id}")
        session._clone_node(node)
    assert cloned == [kept]
    assert lines == ["\nreplacing crashed worker gw1", "\nits host is gone"]
    assert ended == [True]


@pytest.mark.parametrize("error", [OSError("x"), EOFError(), AssertionError(b""), RemoteError("x")])
def test_a_host_may_go_while_a_worker_is_replaced(error: Exception) -> None:
    """Whatever xdist runs into then ends no run; here it is an error, as in a run on one host."""

    def clone(_node: Any) -> None:
        raise error

    lines = list[str]()
    session = SimpleNamespace(
        _clone_node=clone, report_line=lines.append, _active_nodes={"gw0", "gw1"}
    )
    Replacements(plugins(session)).ask(lambda _node, problem: f"lost: {problem}" if problem else "")
    there, here = (
        SimpleNamespace(gateway=SimpleNamespace(id="gw0", spec=SimpleNamespace(via=via)))
        for via in ("gpu-share-1", None)
    )
    assert session._clone_node(there) is there
    assert lines[-1].startswith(f"\nlost: {type(error).__name__}: ")
    with pytest.raises(type(error)):
        session._clone_node(here)


def test_the_count_of_cpus_without_xdists_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_of_cpus() >= 1
    monkeypatch.setattr(xdist_hosts, "import_module", lambda _name: SimpleNamespace())
    assert count_of_cpus() >= 1
