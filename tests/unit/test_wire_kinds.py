"""The table of message kinds in `wire.py` is what the package sends and receives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest_gpushare
from pytest_gpushare import wire

PACKAGE = Path(pytest_gpushare.__file__).parent
FOLDERS = ("worker", "session", "dispatch")
ROW = re.compile(
    r"^    ([a-z-]+) +(\S.*?) +([a-z_]+/\w+\.py) +([a-z_]+/\w+\.py(?:\n {50,}\S+)*)$", re.MULTILINE
)


def strings(node: ast.expr, names: dict[str, list[str]]) -> list[str]:
    """The values of a literal, of a constant of the module, or of a loop's variable."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.Tuple):
        # An end marker is a whole message: its first part is the kind.
        return strings(node.elts[0], names)
    return names.get(node.id, []) if isinstance(node, ast.Name) else []


def names_of(tree: ast.Module) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    names[target.id] = [node.value.value]
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            values = node.iter.elts if isinstance(node.iter, ast.Tuple) else []
            names[node.target.id] = [kind for each in values for kind in strings(each, names)]
    return names


def messages(path: Path) -> Iterator[tuple[bool, str]]:
    """(whether it is sent, kind) for each message that a module sends or receives."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called, args = node.func, list(node.args)
            name = getattr(called, "attr", getattr(called, "id", ""))
            if name == "partial" and getattr(args[0], "attr", "") == "send":
                name = "send"
            if name == "setcallback":
                args = [word.value for word in node.keywords]
            if name in ("send", "_send", "on", "setcallback"):
                kinds = next((found for each in args if (found := strings(each, names))), [])
                for kind in kinds:
                    yield name != "on", kind
        elif isinstance(node, ast.Compare) and path.name == "executor.py":
            # The requests that come as xdist's event; a worker's loop registers what it compares.
            compared = node.comparators if getattr(node.left, "id", "") == "kind" else []
            yield from ((False, kind) for each in compared for kind in strings(each, names))


def test_the_table_has_every_kind() -> None:
    """Each kind with a module that sends it and one that receives it, and no other kind."""
    rows = ROW.findall(wire.__doc__ or "")
    sent, received = set(), set()
    for folder in FOLDERS:
        for path in (PACKAGE / folder).glob("*.py"):
            for is_sent, kind in messages(path):
                (sent if is_sent else received).add((kind, f"{folder}/{path.name}"))
    assert len(rows) > 25
    assert len({kind for kind, *_ in rows}) == len(rows)
    assert {kind for kind, _ in sent} == {kind for kind, _ in received}
    assert {kind for kind, _ in sent} == {kind for kind, *_ in rows}
    assert sent == {(kind, sender) for kind, _, sender, _ in rows}
    assert received == {(kind, one) for kind, _, _, receivers in rows for one in receivers.split()}
