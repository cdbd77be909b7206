"""Checks of the project: packages, settings and their origins, the plan, caps, conftests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pytest_gpushare.cli.doctor.examine import Examined, Finding, broken, executable, look, ok
from pytest_gpushare.config.options import INI_PREFIX, JSON_FILE
from pytest_gpushare.gpu.host import installed_frameworks
from pytest_gpushare.planning.placement import caps_of
from pytest_gpushare.planning.plan import Limit, shortage
from pytest_gpushare.report.candidates import case_of, more_room
from pytest_gpushare.report.document import in_force
from pytest_gpushare.report.header import header

_OLDEST = {"pytest": "8.0", "pytest-xdist": "3.6.1", "nvidia-ml-py": "12.535.133", "httpx": "0.27"}
_WITHOUT = {
    "pytest-xdist": "there are no workers to share a GPU",
    "nvidia-ml-py": "no GPU can be seen",
    "httpx": "Ollama cannot be asked",
}


def packages(found: Examined) -> Iterator[Finding]:
    """One finding per package, and whether pytest starts here."""
    yield ok(f"{found.where.python} on {found.where.system}")
    for name, oldest in _OLDEST.items():
        yield _package(found, name, oldest)
    if "pynvml" in found.packages:
        yield _deprecated(found)
    yield from _pytest(found)


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: (2, 10, 0) of `2.10.0+cu130`."""
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version.split("+")[0])[:3])


def _package(found: Examined, name: str, oldest: str) -> Finding:
    version = found.packages.get(name)
    install = f'{executable()} -m pip install "{name}>={oldest}"'
    if version is None:
        why = f": {_WITHOUT[name]}" if name in _WITHOUT else ""
        if name == "pytest-xdist":
            return broken("xdist-missing", f"{name} is not installed{why}", install)
        return broken("package-missing", f"{name} is not installed{why}", install)
    if release(version) < release(oldest):
        if name == "pytest-xdist":
            fact = f"{name} {version} is too old: before {oldest} tests may run off the main thread"
            return broken("xdist-old", fact, install)
        return broken("package-old", f"{name} {version} is older than {oldest}", install)
    return ok(f"{name} {version}")


def _deprecated(found: Examined) -> Finding:
    version = found.packages["pynvml"]
    fix = (
        f"{executable()} -m pip uninstall -y pynvml, then "
        f"{executable()} -m pip install --force-reinstall nvidia-ml-py"
    )
    if found.pynvml_is_foreign:
        return broken(
            "pynvml-deprecated",
            f"the deprecated distribution pynvml {version} hides the module of nvidia-ml-py, "
            "which has the same name",
            fix,
        )
    return look(
        "pynvml-deprecated",
        f"the deprecated distribution pynvml {version} is installed: it warns when its module is "
        "imported, which fails under -W error",
        fix,
    )


def _pytest(found: Examined) -> Iterator[Finding]:
    view = found.pytest
    if view.error:
        yield broken(
            "pytest-refuses",
            f"pytest does not start here: {view.error}",
            "run pytest --co -q and fix what it reports",
        )
    elif not view.autoload:
        yield look(
            "autoload-off",
            "pytest loads no installed plugins here (PYTEST_DISABLE_PLUGIN_AUTOLOAD, or an option)",
            "run pytest -p pytest_gpushare.plugin -p xdist.plugin, or unset the variable",
        )
    elif not view.xdist and "pytest-xdist" in found.packages:
        yield look(
            "xdist-off",
            "pytest-xdist is installed, but pytest does not load it: there are no workers",
            "remove -p no:xdist from addopts or PYTEST_ADDOPTS",
        )
    if view.anyio:
        yield ok(
            "the plugin of anyio, which httpx brings, is loaded in each run of pytest: where no "
            "test uses it, addopts = -p no:anyio saves the time of its import"
        )


_FIRST_WITH_UUIDS = {"torch": (2, 0), "vllm": (0, 21), "deepspeed": (10**9,)}
"""Tool -> the first release that reads UUIDs in CUDA_VISIBLE_DEVICES; DeepSpeed has none yet."""


def caps(found: Examined) -> Iterator[Finding]:
    """The cap of each framework in a GPU worker."""
    started = found.started
    frameworks = started.placement.versions or installed_frameworks()
    if not frameworks:
        yield ok("none of torch, JAX, CuPy and TensorFlow is installed: nothing to cap")
    elif not found.settings.cap_vram:
        origin = found.settings.origins.get("cap_vram", "default")
        yield look(
            "caps-off",
            f"gpu_share_cap_vram is false ({origin}): nothing keeps a worker within its share",
            "gpu_share_cap_vram = true",
        )
    elif not started.plan.slots:
        names = ", ".join(f"{name} {version}" for name, version in frameworks.items())
        yield ok(f"{names}: no GPU worker to cap")
    else:
        for text in caps_of(started.plan.slots[0], started.placement).descriptions:
            yield _cap(text)


def tools(found: Examined) -> Iterator[Finding]:
    """Tools that cannot read UUIDs in CUDA_VISIBLE_DEVICES."""
    if found.settings.device_names != "uuid":
        return
    for name, first in _FIRST_WITH_UUIDS.items():
        version = found.packages.get(name)
        if version is not None and release(version) < first:
            yield look(
                "uuid-tools",
                f"{name} {version} expects numbers in CUDA_VISIBLE_DEVICES, and workers get UUIDs",
                "gpu_share_device_names = index",
            )


def _cap(text: str) -> Finding:
    """`torch 2.13.0: 3.91 GB`, or `JAX 0.10.0: no cap (allocator platform)`."""
    if "no cap" not in text:
        return ok(text)
    variable = (
        "XLA_PYTHON_CLIENT_ALLOCATOR"
        if text.startswith("JAX")
        else "the backend in PYTORCH_ALLOC_CONF"
    )
    return look("no-cap", text, f"unset {variable}; or start fewer workers")


def settings(found: Examined) -> Iterator[Finding]:
    """The configuration files, the switch, and each setting that is not the default."""
    view = found.pytest
    if found.settings_error:
        yield broken(
            "settings-refused", found.settings_error, "correct it: the line names the place"
        )
    if view.error:
        return
    name = Path(view.configuration).name if view.configuration else ""
    yield ok(f"configuration file: {name}" if name else "no configuration file of pytest")
    yield from _asked(found)
    if view.strict and found.pytest.written is not None and found.pytest.written.ini:
        yield look(
            "strict-config",
            f"{name} is read strictly (--strict-config, or strict = true): where pytest-gpushare "
            "is not installed, its keys there are an error",
            f"move them to {JSON_FILE}, and use --gpu-share on the command line",
        )
    for key, setting in in_force(found.settings).items():
        if setting["origin"] != "default":
            yield ok(f"{INI_PREFIX}{key} = {setting['value']} ({setting['origin']})")


def _asked(found: Examined) -> Iterator[Finding]:
    view = found.pytest
    if view.switched_on or view.asked_by_arguments:
        how = "gpu_share = true" if view.switched_on else "addopts or PYTEST_ADDOPTS"
        yield ok(f"every run uses the plugin ({how})")
    elif any(origin == JSON_FILE for origin in found.settings.origins.values()):
        yield look(
            "json-alone",
            f"{JSON_FILE} has settings, but alone it does not switch the plugin on",
            "gpu_share = true in the configuration file, or pytest --gpu-share",
        )
    else:
        yield ok("a run uses the plugin only with --gpu-share or -n gpu-auto")


def plan(found: Examined) -> Iterator[Finding]:
    """What a run would do here; other hosts have a section of their own."""
    if found.pytest.named_hosts:
        return
    if found.start_error:
        yield broken("run-refused", found.start_error, "correct the setting that it names")
        return
    started = found.started
    headline = next(
        line.text for line in header(started, 0) if line.text.startswith("gpu-share: ")
    ).removeprefix("gpu-share: ")
    if found.settings.hosts:
        yield ok(f"a run with -n, on this host alone, would start {headline}")
        return
    fact = f"a run would start {headline}"
    if started.facts.waits_for:
        yield look(
            "waits-for-sessions",
            f"a run would wait for VRAM of {started.facts.waits_for}; it would then "
            f"start {headline}",
            "in both projects declare what tests need, or gpu_share_preset = packed: they then run "
            "at the same time",
        )
        return
    if started.plan.slots:
        yield ok(fact)
        return
    if not found.settings.fallback_to_cpu_when_constrained:
        fact = f"a run would fail: {shortage(started.plan)}"
    report = look if found.settings.fallback_to_cpu_when_constrained else broken
    if started.plan.absence:
        yield report("no-gpu-for-tests", fact, "see the sections Driver and Devices")
    elif all(planned.limited_by is Limit.BY_MODE for planned in started.plan.devices):
        yield report("compute-mode", fact, "see the section Devices")
    else:
        yield report("no-room", fact, _make_room(found))


def _make_room(found: Examined) -> str:
    """Changes with which a GPU worker would fit; each was planned again."""
    case = case_of(found.started)
    ways = [
        f"{advice.action} {' and '.join(advice.settings.split(' '))}".strip()
        for advice in (more_room(case) if case is not None else ())
    ]
    return "; or ".join(
        [*(re.sub(r"(?<=\w)=", " = ", way) for way in ways), "free VRAM on the device"]
    )


def files(found: Examined) -> Iterator[Finding]:
    """Conftests that set CUDA_VISIBLE_DEVICES."""
    for where in found.overwriting:
        yield look(
            "conftest-overwrites",
            f"{where} sets CUDA_VISIBLE_DEVICES, which overrides the device of the worker",
            "remove it, and set the variable outside of the run; --gpu-share-strict makes it an "
            "error",
        )
    if not found.overwriting:
        yield ok("no conftest.py sets CUDA_VISIBLE_DEVICES")
