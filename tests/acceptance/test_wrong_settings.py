"""What a user may write into the places for settings, right and wrong.

A wrong value ends the run before it starts: exit code 4, one line, no traceback, no test.
Many cases go through one process, in which `pytest.main` runs once for each.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from simulator import Machine

from pytest_gpushare.config.options import BY_KEY

from .conftest import Project
from .in_one_process import Case, Ended, run_all

NATIVE_TOML = (
    [("pytest.toml", "[pytest]"), ("pyproject.toml", "[tool.pytest]")]
    if pytest.version_tuple >= (9,)
    else []
)
"""File and table in which pytest 9 reads values with their types."""


# --- wrong ---

SIZE = "allowed is a number of MB from 0 to 1073741824, or a size such as 512MB or 4.5GB"
NEED = "allowed is a number of GB from 0.001 to 1048576, or a size such as 512MB or 4.5GB"
NAMES = (
    "allowed is one or several of conservative, aggressive, ultra-conservative, no-ollama, packed"
)
NEAREST = f"{NAMES}; the nearest is aggressive"
SECONDS = "allowed is a number from 0.01 to 60 seconds"
SWITCH = "allowed is true or false"

WRONG = [
    ("safety_buffer_mb", "much", "'much'", SIZE),
    ("safety_buffer_mb", "-1", "'-1'", SIZE),
    ("safety_buffer_mb", "-1GB", "'-1GB'", SIZE),
    ("safety_buffer_mb", "NaN", "'NaN'", SIZE),
    ("safety_buffer_mb", "Infinity", "'Infinity'", SIZE),
    ("safety_buffer_mb", "true", "'true'", SIZE),
    ("safety_buffer_mb", "", "''", SIZE),
    ("safety_buffer_mb", "1" + "0" * 30, f"'1{'0' * 30}'", SIZE),
    ("safety_buffer_mb", "1" * 5000, f"'{'1' * 56}...", SIZE),
    ("safety_buffer_mb", "1e999", "'1e999'", SIZE),
    ("safety_buffer_mb", "1e999999999", "'1e999999999'", SIZE),
    ("safety_buffer_mb", '{"a": [1]}', "'{\"a\": [1]}'", SIZE),
    ("safety_buffer_mb", "1\u212aB", "'1\u212aB'", SIZE),
    ("min_vram_per_worker_gb", "0", "'0'", NEED),
    ("max_workers_per_gb", "0.25GB", "'0.25GB'", "allowed is a number from 0 to 1000"),
    ("max_workers_per_gpu", "1.5", "'1.5'", "allowed is a whole number from 0 to 1024"),
    ("enable_ollama_detection", "maybe", "'maybe'", SWITCH),
    ("fallback_to_cpu_when_constrained", "", "''", SWITCH),
    ("ollama_timeout_s", "0", "'0'", SECONDS),
    ("ollama_timeout_s", "61", "'61'", SECONDS),
    ("preset", "agressive", "'agressive'", NEAREST),
    ("preset", "packed, agressive", "'packed, agressive'", NEAREST),
    ("preset", "", "''", NAMES),
]
"""Key, what is written, how it is shown, and what is allowed there."""


def ini(key: str, value: str) -> Case:
    """The value in pytest.ini."""
    return Case({"pytest.ini": f"[pytest]\ngpu_share_{key} = {value}\n"})


def override(key: str, value: str) -> Case:
    """The value after -o."""
    return Case({}, ("--gpu-share", "-o", f"gpu_share_{key}={value}"))


def section(body: str) -> dict[str, str]:
    """The JSON file with this in its section."""
    return {"performance_config.json": f'{{"gpu_resource_management": {{{body}}}}}'}


UNKNOWN = (
    "unknown key 'gpu_share_saftey_buffer_mb': the nearest known one is gpu_share_safety_buffer_mb"
)
MISSPELT = "gpu_share_saftey_buffer_mb"

REFUSED: dict[str, tuple[Case, str]] = {
    **{
        f"ini: {key} = {value[:40]}": (
            ini(key, value),
            f"pytest.ini: gpu_share_{key} = {shown}: {allowed}",
        )
        for key, value, shown, allowed in WRONG
    },
    **{
        f"-o {key}={value[:40]}": (
            override(key, value),
            f"command line, -o: gpu_share_{key} = {shown}: {allowed}",
        )
        for key, value, shown, allowed in WRONG
    },
    **{
        f"JSON: {key}: {value[:40]}": (
            Case(section(f"{json.dumps(key)}: {json.dumps(value)}")),
            f"performance_config.json: {key} = {shown}: {allowed}",
        )
        for key, value, shown, allowed in WRONG
    },
    "broken JSON": (
        Case({"performance_config.json": '{\n  "gpu_resource_management": {,}\n}'}),
        "performance_config.json: broken JSON at line 2, column 31: "
        "Expecting property name enclosed in double quotes",
    ),
    "JSON number": (
        Case(section('"safety_buffer_mb": -1')),
        f"performance_config.json: safety_buffer_mb = -1: {SIZE}",
    ),
    "JSON key": (
        Case(section('"max_workers_per_bg": 1')),
        "performance_config.json, section gpu_resource_management: unknown key "
        "'max_workers_per_bg': the nearest known one is max_workers_per_gb",
    ),
    "JSON list": (
        Case({"performance_config.json": "[]"}),
        "performance_config.json: is a list: allowed is an object with a section "
        '"gpu_resource_management"',
    ),
    **{
        f"JSON, in quotes: {key}": (
            Case(section(f'"{key}": "{value}"')),
            f"performance_config.json: {key} = '{value}': {allowed}; write it without quotes",
        )
        for key, value, allowed in [
            ("max_workers_per_gb", "0.25", "allowed is a number from 0 to 1000"),
            ("safety_buffer_mb", "1024", SIZE),
            ("max_workers_per_gpu", "2", "allowed is a whole number from 0 to 1024"),
            ("cap_vram", "yes", SWITCH),
        ]
    },
    "flag, preset": (
        Case({}, ("--gpu-share", "--gpu-share-preset", "agressive")),
        f"command line: --gpu-share-preset = 'agressive': {NEAREST}",
    ),
    "flag, presets": (
        Case({}, ("--gpu-share", "--gpu-share-preset=packed", "--gpu-share-preset=x")),
        f"command line: --gpu-share-preset = ['packed', 'x']: {NAMES}",
    ),
    "flag, no preset": (
        Case({}, ("--gpu-share", "--gpu-share-preset=")),
        f"command line: --gpu-share-preset = '': {NAMES}",
    ),
    "flag, no file": (
        Case({}, ("--gpu-share", "--gpu-share-config=gone.json")),
        "gone.json: no such file: check --gpu-share-config or gpu_share_config",
    ),
    "flag, directory": (
        Case({}, ("--gpu-share", "--gpu-share-config", "..")),
        "..: is a directory: name a JSON file",
    ),
    "flag, through a file": (
        Case({"file": ""}, ("--gpu-share", "--gpu-share-config=file/x.json")),
        "file/x.json: cannot be read: Not a directory; check the path",
    ),
    "flag, no section": (
        Case(
            {"own.json": '{"gpu_resource_managment": {}}'},
            ("--gpu-share", "--gpu-share-config=own.json"),
        ),
        'own.json: no section "gpu_resource_management": add it, or name another file; '
        "the nearest to it is 'gpu_resource_managment'",
    ),
    "ini names a file": (
        Case({"pytest.ini": "[pytest]\ngpu_share_config = gone.json\n"}),
        "gone.json: no such file: check --gpu-share-config or gpu_share_config",
    ),
    "-o, unknown": (
        Case({}, ("--gpu-share", "-o", f"{MISSPELT}=1")),
        f"command line, -o: {UNKNOWN}",
    ),
    "-o, with a space": (
        Case({}, ("--gpu-share", "-o", "gpu_share_preset =packed")),
        "command line, -o: unknown key 'gpu_share_preset ': "
        "the nearest known one is gpu_share_preset",
    ),
    "switch": (
        Case({"pytest.ini": "[pytest]\ngpu_share = maybe\n"}, ()),
        f"pytest.ini: gpu_share = 'maybe': {SWITCH}",
    ),
    "what-if": (
        Case({}, ("--gpu-share", "--gpu-share-simulate=24GB:used=30GB")),
        "--gpu-share-simulate 24GB:used=30GB: more is used than there is: allowed is "
        "TOTAL[:used=SIZE][:name=NAME], for example 24GB:used=2GB; "
        "give the option again for a second device",
    ),
    **{
        f"{name}, {head}: unknown key": (
            Case({name: f"{head}\n{MISSPELT} = {one}\n"}),
            f"{name}: {UNKNOWN}",
        )
        for name, head, one in [
            ("pytest.ini", "[pytest]", "1"),
            (".pytest.ini", "[pytest]", "1"),
            ("tox.ini", "[pytest]", "1"),
            ("setup.cfg", "[tool:pytest]", "1"),
            ("pyproject.toml", "[tool.pytest.ini_options]", "1"),
            *((name, head, "'1'") for name, head in NATIVE_TOML),
        ]
    },
}  # fmt: skip

TYPED = [
    ("safety_buffer_mb", "-1", "-1", SIZE),
    ("safety_buffer_mb", "-0.5", "-0.5", SIZE),
    ("safety_buffer_mb", "true", "true", SIZE),
    ("safety_buffer_mb", "nan", "nan", SIZE),
    ("safety_buffer_mb", "inf", "inf", SIZE),
    ("safety_buffer_mb", "[1]", "[1]", SIZE),
    ("safety_buffer_mb", "{ a = 1 }", "{...}", SIZE),
    ("safety_buffer_mb", "1979-05-27", "1979-05-27", SIZE),
    ("safety_buffer_mb", f"0x{'f' * 5000}", "a number of thousands of digits", SIZE),
    ("max_workers_per_gpu", "1.5", "1.5", "allowed is a whole number from 0 to 1024"),
    ("enable_ollama_detection", "1", "1", SWITCH),
    ("preset", "3", "3", NAMES),
    ("preset", '["packed", true]', "['packed', true]", NAMES),
    ("ollama_host", "11434", "11434", "allowed is a text"),
]
"""The same for values with a type, as pytest 9 has them."""

REFUSED |= {
    f"{name}: {key} = {value[:40]}": (
        Case({name: f"{head}\ngpu_share_{key} = {value}\n"}),
        f"{name}: gpu_share_{key} = {shown}: {allowed}",
    )
    for key, value, shown, allowed in TYPED
    for name, head in NATIVE_TOML
}
REFUSED |= {
    f"{name}: switch": (
        Case({name: f"{head}\ngpu_share = 3\n"}, ()),
        f"{name}: gpu_share = 3: {SWITCH}",
    )
    for name, head in NATIVE_TOML
}


# Each worker of xdist would run all the cases anew.
TOGETHER_REFUSED = pytest.mark.xdist_group("refused-settings")
TOGETHER_ACCEPTED = pytest.mark.xdist_group("accepted-settings")


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How each of the wrong cases ended."""
    return run_all(
        {name: case for name, (case, _) in REFUSED.items()}, tmp_path_factory.mktemp("wrong")
    )


@TOGETHER_REFUSED
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, refused: dict[str, Ended]) -> None:
    """File, key, what was found and what is allowed; nothing else, and no test is run."""
    ended = refused[name]
    assert ended.err.strip() == f"ERROR: {REFUSED[name][1]}"
    assert (ended.code, "passed" in ended.out, "Traceback" in ended.out) == (4, False, False)


# --- right ---

HERE = ("--gpu-share", "-n0", "-vv", "--gpu-share-simulate", "24GB:used=2GB")
ALL_AT_ONCE = {
    "ollama_vram_reservation_mb": "10240",
    "max_workers_per_gb": "0.5",
    "min_vram_per_worker_gb": "512MB",
    "enable_ollama_detection": "no",
}
QUOTED = "".join(f'gpu_share_{key} = "{value}"\n' for key, value in ALL_AT_ONCE.items())
BARE = QUOTED.replace('"', "")
NATIVE = """
gpu_share_ollama_vram_reservation_mb = 10240
gpu_share_max_workers_per_gb = 0.5
gpu_share_min_vram_per_worker_gb = "512MB"
gpu_share_enable_ollama_detection = false
"""

RIGHT = {
    "pytest.ini": f"[pytest]\n{BARE}",
    "tox.ini": f"[pytest]\n{BARE}",
    "setup.cfg": f"[tool:pytest]\n{BARE}",
    "pyproject.toml": f"[tool.pytest.ini_options]\n{NATIVE}",
    "pyproject.toml, quoted": f"[tool.pytest.ini_options]\n{QUOTED}",
}
if NATIVE_TOML:
    RIGHT |= {
        "pyproject.toml, native": f"[tool.pytest]\n{NATIVE}",
        "pyproject.toml, native and quoted": f"[tool.pytest]\n{QUOTED}",
        "pytest.toml": f"[pytest]\n{NATIVE}",
        "pytest.toml, quoted": f"[pytest]\n{QUOTED}",
    }

BOTH = "gpu_share_preset = "
PRESETS = {
    "pytest.ini, lines": Case(
        {"pytest.ini": f"[pytest]\n{BOTH}\n    no-ollama\n    packed\n"}, HERE
    ),
    "pytest.ini, words": Case({"pytest.ini": f"[pytest]\n{BOTH}no-ollama packed\n"}, HERE),
    "pyproject.toml, list": Case(
        {"pyproject.toml": f'[tool.pytest.ini_options]\n{BOTH}["no-ollama", "packed"]\n'}, HERE
    ),
    "-o": Case({}, (*HERE, "-o", "gpu_share_preset=no-ollama,packed")),
    "flags": Case({}, (*HERE, "--gpu-share-preset=no-ollama", "--gpu-share-preset", "packed")),
    "JSON": Case(section('"preset": ["no-ollama", "packed"]'), HERE),
}  # fmt: skip
if NATIVE_TOML:
    PRESETS["pytest.toml, list"] = Case(
        {"pytest.toml": f'[pytest]\n{BOTH}["no-ollama", "packed"]\n'}, HERE
    )
    PRESETS["pytest.toml under -o"] = Case(
        {"pytest.toml": f'[pytest]\n{BOTH}["aggressive"]\n'},
        (*HERE, "-o", "gpu_share_preset=no-ollama,packed"),
    )

UNASKED = {
    "pytest.ini": f"[pytest]\n{MISSPELT} = 1\ngpu_share_safety_buffer_mb = much\n",
    "performance_config.json": "{broken",
}


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How each of the right cases ended."""
    cases = {name: Case({name.split(",")[0]: text}, HERE) for name, text in RIGHT.items()}
    cases |= {f"preset: {name}": case for name, case in PRESETS.items()}
    cases |= {
        "not asked": Case(UNASKED, ()),
        "asked not to": Case(
            {**UNASKED, "pytest.ini": f"{UNASKED['pytest.ini']}gpu_share = true\n"},
            ("--no-gpu-share",),
        ),
    }
    return run_all(cases, tmp_path_factory.mktemp("right"))


def _table(key: str) -> int:
    """Where a key stands in the table of options, which is the order of what is printed."""
    return list(BY_KEY).index(key)


@TOGETHER_ACCEPTED
@pytest.mark.parametrize("name", RIGHT)
def test_files(name: str, accepted: dict[str, Ended]) -> None:
    """Every configuration file that pytest reads, typed or quoted."""
    ended = accepted[name]
    lines = ended.out.splitlines()
    file = name.split(",")[0]
    assert (ended.code, ended.err) == (0, "")
    assert "1 passed" in ended.out
    assert "Ollama reservation 10.0 GB" in ended.out
    assert [line for line in lines if "GPU setting" in line] == [
        f"  GPU setting gpu_share_{key}: from {file}" for key in sorted(ALL_AT_ONCE, key=_table)
    ]
    # No request was made, so there is no line on the server.
    assert not any(line.startswith("  Ollama") for line in lines)


@TOGETHER_ACCEPTED
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, accepted: dict[str, Ended]) -> None:
    """Several presets, in each place where they can be named."""
    ended = accepted[f"preset: {name}"]
    assert (ended.code, ended.err) == (0, "")
    assert (
        "gpu-share: no workers: this process on GPU 0, 21.0 GB of VRAM (preset no-ollama, packed)"
    ) in ended.out.splitlines()


@TOGETHER_ACCEPTED
@pytest.mark.parametrize("name", ["not asked", "asked not to"])
def test_unasked(name: str, accepted: dict[str, Ended]) -> None:
    """Nothing is read, so nothing is wrong; pytest's own warning on the unknown key stays."""
    ended = accepted[name]
    assert (ended.code, ended.err) == (0, "")
    assert "1 passed" in ended.out
    assert "gpu-share:" not in ended.out
    assert f"Unknown config option: {MISSPELT}" in ended.out


# --- whole runs ---


def test_command_line(project: Project, machine: Machine) -> None:
    """The command as a user types it ends with exit code 4 and one line."""
    project.file("pytest.ini", "[pytest]\ngpu_share_min_vram_per_worker_gb = three\n")
    result = project.pytest("-n", "gpu-auto")
    assert (result.code, result.passed, result.workers) == (4, 0, None)
    assert result.err.strip() == (
        f"ERROR: pytest.ini: gpu_share_min_vram_per_worker_gb = 'three': {NEED}"
    )


def test_pipe_and_huge_file(project: Project, machine: Machine) -> None:
    """A named pipe is not waited for, and 100 MB are not read."""
    os.mkfifo(project.path / "pipe")
    with (project.path / "huge.json").open("wb") as file:
        file.truncate(100 * 2**20)
    reasons = {
        "pipe": "pipe: is not a regular file: name a JSON file",
        "huge.json": "huge.json: has 100.0 MB: a settings file may have 1 MB; "
        "name another file with --gpu-share-config",
    }
    for name, reason in reasons.items():
        result = project.pytest("--gpu-share", "--gpu-share-config", name)
        assert (result.code, result.err.strip()) == (4, f"ERROR: {reason}")


FOUNDING = {
    "ollama_vram_reservation_mb": 12288,
    "max_workers_per_gb": 0.25,
    "safety_buffer_mb": 1024,
    "enable_ollama_detection": True,
    "min_vram_per_worker_gb": 3.0,
    "fallback_to_cpu_when_constrained": True,
}


def test_founding_file(project: Project, machine: Machine) -> None:
    """The founding write-up's file as it stands, written by a Windows editor."""
    text = json.dumps({"gpu_resource_management": FOUNDING}, indent=2).replace("\n", "\r\n")
    project.file("performance_config.json", text.encode("utf-16"))
    result = project.pytest("--gpu-share", "-vv")
    assert (result.code, result.passed, result.workers, result.err) == (0, 4, 2, "")
    assert result.said[0].startswith("gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB")
    assert [line for line in result.said if "GPU setting" in line] == [
        f"  GPU setting gpu_share_{key}: from performance_config.json"
        for key in sorted(FOUNDING, key=_table)
    ]


def test_precedence(
    project: Project, machine_with: Callable[..., Machine], machine: Machine
) -> None:
    """Command line over ini over JSON, for one key each."""
    project.file(
        "performance_config.json",
        json.dumps(
            {
                "gpu_resource_management": {
                    "safety_buffer_mb": 2048,
                    "ollama_vram_reservation_mb": 1,
                    "max_workers_per_gpu": 1,
                }
            }
        ),
    )
    project.file(
        "pytest.ini",
        "[pytest]\ngpu_share_ollama_vram_reservation_mb = 2\ngpu_share_max_workers_per_gpu = 7\n",
    )
    result = project.pytest("--gpu-share", "-o", "gpu_share_ollama_vram_reservation_mb=8GB", "-vv")
    # 22 - 8 - 2 GB, by a quarter: 3.
    assert (result.code, result.workers) == (0, 3)
    assert result.said[0].startswith("gpu-share: 3 GPU workers × 4.0 GB = 12.0 GB (limited by")
    assert [line for line in result.said if "GPU setting" in line] == [
        "  GPU setting gpu_share_ollama_vram_reservation_mb: from command line, -o",
        "  GPU setting gpu_share_safety_buffer_mb: from performance_config.json",
        "  GPU setting gpu_share_max_workers_per_gpu: from pytest.ini",
    ]


def test_file_that_is_no_file(project: Project) -> None:
    """A directory, a pipe or a device is refused at once, whether or not it was named."""
    project.file("test_project.py", "def test_it():\n    pass\n")
    cases = {"pipe": "is not a regular file: name a JSON file"}
    os.mkfifo(project.path / "pipe")
    if Path("/dev/zero").exists():
        cases["/dev/zero"] = "is not a regular file: name a JSON file"
    if Path("/proc/kmsg").exists():
        cases["/proc/kmsg"] = ""
    for name, problem in cases.items():
        began = time.monotonic()
        result = project.pytest("--gpu-share", f"--gpu-share-config={name}")
        assert result.code == 4
        assert result.err.startswith(f"ERROR: {name}: {problem}")
        assert time.monotonic() - began < 20
    (project.path / "performance_config.json").mkdir()
    result = project.pytest("--gpu-share")
    assert (result.code, result.err.strip()) == (
        4,
        "ERROR: performance_config.json: is a directory: rename it, or name a JSON file",
    )
