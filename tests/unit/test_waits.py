"""Every wait in the tests, the simulator, the benchmarks and the examples has a limit."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("tests", "docs")
    for path in (ROOT / folder).rglob("*.py")
    if not {"_build", "output"} & set(path.parts)
)

RUNNERS = {"run", "call", "check_call", "check_output"}
"""Functions of `subprocess` that start a process and wait for it."""

ONLY_BY_NAME = {"communicate", "urlopen", "create_connection", "HTTPConnection", "HTTPSConnection"}
"""Calls that wait for ever without a keyword `timeout`."""

FIRST_ARGUMENT = {"wait", "join", "get"}
"""Methods whose first argument is the limit, or that do not wait where they have one."""


def waits(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of each call that may wait for ever."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            for item in node.items:
                # Leaving the block waits for the end of the process, without a limit.
                if _name(item.context_expr) == "Popen":
                    yield node.lineno, "with Popen(...)"
        elif isinstance(node, ast.Call) and _is_unlimited(node, source):
            yield node.lineno, ast.unparse(node)


def _name(node: ast.expr) -> str:
    """The last part of the name of what is called."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_unlimited(call: ast.Call, source: str) -> bool:
    name = _name(call)
    limited = any(keyword.arg == "timeout" for keyword in call.keywords)
    if name in RUNNERS and ast.unparse(call.func) == f"subprocess.{name}":
        return not limited
    if name in ONLY_BY_NAME:
        return not limited
    if name in FIRST_ARGUMENT:
        return not limited and not call.args
    # A listener's limit is set by a call of its own.
    return name == "accept" and ".settimeout(" not in source


def test_every_wait_has_a_limit() -> None:
    """No child process, thread, queue or socket is waited for without a limit."""
    assert len(FILES) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in FILES
        for line, text in waits(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(command, check=True)",
        "subprocess.check_output(command)",
        "with subprocess.Popen(command) as process: process.wait(5)",
        "process.communicate('text')",
        "process.wait()",
        "thread.join()",
        "queue.get()",
        "urllib.request.urlopen(url)",
        "socket.create_connection(('127.0.0.1', port))",
        "http.client.HTTPConnection('127.0.0.1', port)",
        "listener.accept()",
    ],
)
def test_wait_without_a_limit_is_found(source: str) -> None:
    """The check above can fail, for each kind of wait."""
    assert len(list(waits(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run(command, timeout=5)",
        "process.communicate(timeout=5)",
        "process.wait(5)",
        "thread.join(5)",
        "','.join(words)",
        "mapping.get('key')",
        "listener.settimeout(5); listener.accept()",
    ],
)
def test_limited_wait_is_accepted(source: str) -> None:
    """And it does not fail where there is a limit."""
    assert list(waits(source)) == []
