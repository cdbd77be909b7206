"""Calls that wait for a framework's import, which they neither cause nor slow down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def after_import(actions: Mapping[str, Action]) -> Callable[[], None]:
    """Call each action once its module is imported, at once where it is; the result undoes it.

    An action that fails must not break the user's import: its error is dropped.
    """
    waiting = dict(actions)
    for name in list(waiting):
        if name in sys.modules:
            _act(waiting.pop(name), sys.modules[name])
    finder = _Finder(waiting)
    sys.meta_path.insert(0, finder)

    def undo() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)

    return undo


class _Finder(MetaPathFinder):
    """Lets the usual finders find, and wraps the loader of a module that is waited for."""

    def __init__(self, waiting: dict[str, Action]) -> None:
        self._waiting = waiting
        self._looking: set[str] = set()

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec with our loader around its own; None for every other module.

        A look-up is no import yet: libraries ask for a spec to see what is installed.
        """
        if fullname not in self._waiting or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, fullname, self._waiting)
        return spec


class _Loader(Loader):
    """Another loader, and an action after it."""

    def __init__(self, loader: Loader, name: str, waiting: dict[str, Action]) -> None:
        self._loader = loader
        self._name = name
        self._waiting = waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does; then the module gets its own loader back, and the action runs."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        action = self._waiting.pop(self._name, None)
        if action is not None:
            _act(action, module)


def _act(action: Action, module: ModuleType) -> None:
    try:
        action(module)
    except Exception:
        # The cap does not hold then; the user's import and tests must.
        return
