"""The login to a host that misbehaves: a program in place of ssh says what it should not."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from simulator.child import wait_for

from pytest_gpushare.hosts.answers import Hello, HostError
from pytest_gpushare.hosts.asking import AskedHost
from pytest_gpushare.hosts.checkout import Checkout
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.hosts.specs import HostSpec

SPEC = HostSpec("box", ("box",))
Login = Callable[[str], HostConnection]


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Login]:
    """A login to a "host" that runs this source; closed with its processes after the test."""
    monkeypatch.setenv("PATH", str(tmp_path))
    begun: list[HostConnection] = []

    def begin(source: str) -> HostConnection:
        path = tmp_path / "ssh"
        path.write_text(f"#!{sys.executable} -IS\nimport sys, time\n{source}\n")
        path.chmod(0o755)
        begun.append(HostConnection(SPEC, {}))
        return begun[-1]

    yield begin
    for connection in begun:
        connection.close()
    wait_for(lambda: not any(t.name.startswith("gpu-share-host") for t in threading.enumerate()))


def over(connection: HostConnection) -> str:
    """Why it is over, once it is."""
    connection.wait(30)
    return connection.problem


def test_without_ssh_there_is_no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"^box: ssh cannot be started: .*: install OpenSSH"):
        HostConnection(SPEC, {})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("print('x' * 2**21)", "it prints too much in addition to its answers"),
        ("print('gpu-share:[1]')", "it answers nonsense"),
        ("print('gpu-share:{')", "it answers nonsense"),
        ("print('gpu-share:' + '[' * 10**5)", "it answers nonsense"),
        ("print('hello')", "it has closed the connection"),
    ],
)
def test_what_is_no_message_ends_the_login(login: Login, source: str, problem: str) -> None:
    """A greeting alone does not: only much of it, and a message that is none."""
    connection = login(source)
    assert over(connection) == problem


def test_a_login_that_does_not_end_is_killed(login: Login) -> None:
    connection = login("time.sleep(600)")
    began = time.monotonic()
    connection.close()
    connection.close()
    assert connection.is_closed
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sys.exit(3)", "the Python there has ended (exit code 3)"),
        ("sys.exit('no memory')", "no memory"),
        ("sys.exit(255)", "ssh cannot log in"),
        ("sys.exit(97)", "there is no directory "),
        ("sys.exit(127)", ".venv/bin/python or python3 cannot be started there"),
    ],
)
def test_why_a_host_cannot_take_part(login: Login, source: str, words: str) -> None:
    host = AskedHost(login(source), Checkout())
    with pytest.raises(HostError) as caught:
        host.await_answer()
    assert str(caught.value) == f"box: {words}"


def test_a_host_that_says_nothing_is_not_waited_for(login: Login) -> None:
    connection = login("time.sleep(600)")
    host = AskedHost(connection, Checkout())
    host.until = time.monotonic() + 0.05
    with pytest.raises(HostError, match=r"no answer within 10 s: try `ssh box true`$"):
        host.await_answer()


@pytest.mark.parametrize(
    "value",
    ["[1]", "['3.12', '/p', '/d', ['/x'], {'pytest': 9}]", "None"],
)
def test_an_answer_that_makes_no_sense_names_the_host(login: Login, value: str) -> None:
    source = "import json\nprint('gpu-share:' + json.dumps({'kind': 'hello', 'value': %s}))"
    connection = login(source % value)
    # What it said counts, not that it has ended since.
    assert over(connection) == "it has closed the connection"
    host = AskedHost(connection, Checkout())
    with pytest.raises(HostError, match="^box: it answers nonsense: use the same"):
        host.await_answer()
    assert host.hello == Hello("", "", "", (), {})


def test_a_host_that_loads_a_model_may_take_longer(login: Login) -> None:
    """Each message of the load gives it more time; what it loads can be shown."""
    loading = '{"kind": "loading", "value": "Ollama loads m:1b"}'
    refused = '{"kind": "refused", "value": "gpu-share: no room"}'
    connection = login(
        f"print('gpu-share:{loading}', flush=True)\ntime.sleep(1)\nprint('gpu-share:{refused}')"
    )
    host = AskedHost(connection, Checkout())
    host.says_something()
    assert host.loads == "Ollama loads m:1b"
    assert host.until > connection.begun + 15
    with pytest.raises(HostError, match="^box: no room$"):
        host.await_answer()
