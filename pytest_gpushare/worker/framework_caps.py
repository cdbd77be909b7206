"""Caps that only a call can set: made once a framework is imported, which they do not cause."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from pytest_gpushare.planning.caps import TENSORFLOW_HOOK, TORCH_HOOK, torch_fraction

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
            spec.loader = _CappingLoader(spec.loader, fullname, self._waiting)
        return spec


class _CappingLoader(Loader):
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


_CLOSE = 1e-4
"""Fractions travel as floats through C++."""


class TorchCap:
    """What torch may take, in a process whose torch the plugin has capped."""

    def __init__(
        self, environment: Mapping[str, str], modules: Mapping[str, Any] = sys.modules
    ) -> None:
        self._modules = modules
        self._usual = torch_fraction(environment)
        self._wanted: int | None = None
        """Bytes for the running test; None: as the environment says."""
        self._set: dict[int, float] = {}
        """Device -> the share that was set last."""

    @property
    def size(self) -> int | None:
        """Bytes at which torch is capped for the running test; None: as usual."""
        return self._wanted if self._usual is not None else None

    def set(self, size: int | None) -> None:
        """Cap torch at so many bytes; None: at its usual share again."""
        if size == self._wanted:
            return
        self._wanted = size
        self._apply()

    def watch(self) -> Callable[[], None]:
        """Set the share of the test in which CUDA comes up, too; the result undoes it."""

        if self._usual is None:
            return lambda: None
        return after_import({"torch": lambda torch: torch.cuda._lazy_call(self._apply)})

    def _apply(self) -> None:
        torch = self._modules.get("torch")
        if self._usual is None or torch is None:
            return
        try:
            cuda = torch.cuda
            if cuda.is_initialized():
                for device in range(cuda.device_count()):
                    self._apply_to(cuda, device, self._usual)
        except Exception:
            # The usual cap holds then; the test runs all the same.
            return

    def _apply_to(self, cuda: Any, device: int, usual: float) -> None:
        tell = getattr(cuda, "get_per_process_memory_fraction", None)
        if tell is not None:
            found, expected = tell(device), self._set.get(device)
            known = (usual, 1.0) if expected is None else (expected,)
            if all(abs(found - fraction) > _CLOSE for fraction in known):
                # Somebody else has set it since: theirs stands from now on.
                self._usual = None
                return
        total = cuda.get_device_properties(device).total_memory
        fraction = usual if self._wanted is None else min(1.0, self._wanted / total)
        cuda.set_per_process_memory_fraction(fraction, device)
        self._set[device] = fraction


def cap_after_import(environment: Mapping[str, str] = os.environ) -> Callable[[], None]:
    """Cap frameworks that only a call can cap, once the tests import them; the result undoes it.

    Nothing is imported here and CUDA is not initialised: torch keeps the call until CUDA
    comes up, TensorFlow until its context does.
    """
    fraction, megabytes = environment.get(TORCH_HOOK), environment.get(TENSORFLOW_HOOK)
    actions: dict[str, Callable[[Any], None]] = {}
    if fraction:
        actions["torch"] = lambda torch: _cap_torch(torch, float(fraction))
    if megabytes:
        actions["tensorflow"] = lambda tensorflow: _cap_tensorflow(tensorflow, int(megabytes))
    return after_import(actions)


def _cap_torch(torch: Any, fraction: float) -> None:
    # _lazy_call runs the function when CUDA comes up, at once where it is up already; the
    # public function would bring it up.
    torch.cuda._lazy_call(lambda: torch.cuda.set_per_process_memory_fraction(fraction))


def _cap_tensorflow(tensorflow: Any, megabytes: int) -> None:
    from importlib import import_module

    context = import_module("tensorflow.python.eager.context").context()
    initialise = context.ensure_initialized

    def capped() -> None:
        if "ensure_initialized" in vars(context):
            del context.ensure_initialized
            # A cap that cannot be set must not break the user's first call.
            with contextlib.suppress(Exception):
                config = tensorflow.config
                for device in config.list_physical_devices("GPU"):
                    if not config.get_logical_device_configuration(device):
                        limit = config.LogicalDeviceConfiguration(memory_limit=megabytes)
                        config.set_logical_device_configuration(device, [limit])
        initialise()

    context.ensure_initialized = capped
