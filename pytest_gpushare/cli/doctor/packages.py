"""Python, pytest and the packages that the plugin stands on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_gpushare.cli.doctor.findings import Finding, broken, look, ok
from pytest_gpushare.cli.doctor.gather import Examined, executable

_OLDEST = {"pytest": (8, 0), "pytest-xdist": (3, 6, 1), "nvidia-ml-py": (12, 535), "httpx": (0, 27)}
_NEEDS = {
    "pytest": "pytest>=8.0",
    "pytest-xdist": "pytest-xdist>=3.6.1",
    "nvidia-ml-py": "nvidia-ml-py>=12.535.133",
    "httpx": "httpx>=0.27",
}
_WITHOUT = {
    "pytest-xdist": "there are no workers to share a GPU",
    "nvidia-ml-py": "no GPU can be seen",
    "httpx": "Ollama cannot be asked",
}


def packages(found: Examined) -> Iterator[Finding]:
    """A finding for each package, and how pytest starts here."""
    yield ok(f"{found.where.python} on {found.where.system}")
    for name, oldest in _OLDEST.items():
        yield _package(found, name, oldest)
    if "pynvml" in found.packages:
        yield _deprecated(found)
    yield from _pytest(found)


def release(version: str) -> tuple[int, ...]:
    """The numbers at the start of a version: (2, 10) of `2.10.0+cu130`, cut where they end."""
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version.split("+")[0])[:3])


def _package(found: Examined, name: str, oldest: tuple[int, ...]) -> Finding:
    version = found.packages.get(name)
    install = f'{executable()} -m pip install "{_NEEDS[name]}"'
    if version is None:
        why = f": {_WITHOUT[name]}" if name in _WITHOUT else ""
        if name == "pytest-xdist":
            return broken("xdist-missing", f"{name} is not installed{why}", install)
        return broken("package-missing", f"{name} is not installed{why}", install)
    if release(version) < oldest:
        needed = ".".join(map(str, oldest))
        if name == "pytest-xdist":
            fact = f"{name} {version} is too old: before {needed} tests may run off the main thread"
            return broken("xdist-old", fact, install)
        return broken("package-old", f"{name} {version} is older than {needed}", install)
    return ok(f"{name} {version}")


def _deprecated(found: Examined) -> Finding:
    version = found.packages["pynvml"]
    mend = (
        f"{executable()} -m pip uninstall -y pynvml, then "
        f"{executable()} -m pip install --force-reinstall nvidia-ml-py"
    )
    if found.pynvml_is_foreign:
        return broken(
            "pynvml-deprecated",
            f"the deprecated distribution pynvml {version} hides the module of nvidia-ml-py, "
            "which has the same name",
            mend,
        )
    return look(
        "pynvml-deprecated",
        f"the deprecated distribution pynvml {version} is installed: it warns when its module is "
        "imported, which fails under -W error",
        mend,
    )


def _pytest(found: Examined) -> Iterator[Finding]:
    view = found.pytest
    if view.error:
        yield broken(
            "pytest-refuses",
            f"pytest does not start here: {view.error}",
            "run pytest --co -q and mend what it says",
        )
    elif not view.autoload:
        yield look(
            "autoload-off",
            "pytest loads no installed plugins here (PYTEST_DISABLE_PLUGIN_AUTOLOAD, or an option)",
            "give pytest -p pytest_gpushare.plugin -p xdist.plugin, or unset the variable",
        )
    elif not view.xdist and "pytest-xdist" in found.packages:
        yield look(
            "xdist-off",
            "pytest-xdist is installed, but pytest does not load it: there are no workers",
            "take -p no:xdist out of addopts or PYTEST_ADDOPTS",
        )
