"""The modules of the package: their names, their sizes, and that nothing is named twice."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest_gpushare

PACKAGE = Path(pytest_gpushare.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 480
"""About 450, and some room."""
SAME_NAME = {"__init__.py", "__main__.py", "plugin.py"}
"""Names that stand in several packages: each is what its package is."""


def twice(names: list[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def test_no_file_name_stands_twice() -> None:
    """A name that was read somewhere leads to one file."""
    assert twice([path.name for path in MODULES]) <= SAME_NAME


def test_no_class_name_stands_twice() -> None:
    """The same for classes, private ones among them."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    classes = [
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 150
    assert twice(classes) == set()


def test_no_plugin_has_a_property() -> None:
    """pytest 8.0 looks for fixtures in all attributes of a plugin that is registered: it would read
    a property before there is anything to know."""
    plugins, properties = [], []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            if any(each.name.startswith("pytest_") for each in methods):
                plugins.append(node.name)
                properties += [
                    f"{node.name}.{each.name}"
                    for each in methods
                    if any("property" in ast.unparse(it) for it in each.decorator_list)
                ]
    assert len(plugins) > 15
    assert properties == []


def test_no_module_is_too_long() -> None:
    """One subject a module: a longer one has two."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
