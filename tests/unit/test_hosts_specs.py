"""How hosts are written, and what ssh and xdist are given for them."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.hosts.specs import (
    NO_DIRECTORY,
    SSH_OPTIONS,
    HostSpec,
    login,
    parse_lines,
    parse_tx,
    proxy,
    workers,
)

BOX = "gpu-auto*ssh=user@box//chdir=/srv/p//python=.venv/bin/python"


def test_specs_of_tx() -> None:
    box, local = parse_tx([BOX + "//env:A=1", "gpu-auto*popen"])
    assert box == HostSpec("box", ("user@box",), "/srv/p", ".venv/bin/python", {"A": "1"})
    assert local.is_local
    assert local.name == ""
    (other,) = parse_tx(["gpu-auto*ssh=-p 2222 box//ssh_config=/c"])
    assert other.ssh == ("-F", "/c", "-p", "2222", "box")


def test_lines() -> None:
    lines = ["popen", "user@box:/srv/p -p 2222 python=/opt/py", "[::1]:~/p", "user@box:/other"]
    local, box, six, again = parse_lines(lines, "pytest.ini")
    assert local.is_local
    assert box == HostSpec("box", ("-p", "2222", "user@box"), "/srv/p", "/opt/py")
    assert (six.name, six.chdir) == ("::1", "~/p")
    assert again.name == "box#2"


@pytest.mark.parametrize(
    "text",
    [
        "popen",
        "3*popen",
        "gpu-auto*",
        "gpu-auto*socket=box:1",
        "gpu-auto*ssh=box//ssh=box",
        "gpu-auto*ssh=-oProxyCommand=x",
        "gpu-auto*popen//chdir=/x",
        "gpu-auto*ssh=box//chdir=",
        "gpu-auto*ssh=bo'x",
        "gpu-auto*ssh=box//env:1=x",
        "gpu-auto*ssh=box//chdir=/a\x1b[31m",
    ],
)
def test_what_makes_no_sense_is_one_line(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_tx(["gpu-auto*ssh=a", text])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("line", ["box", "box:", "-oX:/p", "'box:/p", "popen:"])
def test_lines_that_make_no_sense(line: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_lines([line], "pytest.ini")
    assert str(caught.value).startswith("pytest.ini: gpu_share_hosts: ")


def test_this_host_is_one_host() -> None:
    with pytest.raises(SettingsError, match="occurs twice"):
        parse_tx(["gpu-auto*popen", "gpu-auto*popen"])


def test_ssh_never_asks_and_never_waits_without_a_limit() -> None:
    (box,) = parse_tx([BOX])
    command = login(box)
    assert command[: 1 + len(SSH_OPTIONS)] == ["ssh", *SSH_OPTIONS]
    assert "-oBatchMode=yes" in command
    assert proxy(box, 1, "/srv/p/.venv/bin/python", "/srv/p") == (
        f"id=gpu-share-1//ssh={' '.join(SSH_OPTIONS)} user@box//python=/srv/p/.venv/bin/python"
        "//chdir=/srv/p//execmodel=thread"
    )
    assert workers(1, 2) == "2*popen//via=gpu-share-1"


def remote(spec: HostSpec, home: Path) -> subprocess.CompletedProcess[str]:
    """What the login does, by the shell of this host in place of another's."""
    return subprocess.run(
        ["/bin/sh", "-c", login(spec)[-1]],
        stdin=subprocess.DEVNULL,
        cwd=home,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A "Python" that shows where it was started, and under which name."""
    path = tmp_path / "a b" / ".venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text('#!/bin/sh\necho "$0 in $PWD"\n')
    path.chmod(0o755)
    (tmp_path / "a b" / "sub").mkdir()
    return path


@pytest.mark.parametrize("python", ["", ".venv/bin/python"])
@pytest.mark.parametrize("chdir", ["~/a b", "a b", "ABSOLUTE"])
def test_login_finds_the_python_of_the_directory(
    script: Path, tmp_path: Path, python: str, chdir: str
) -> None:
    """Relative to the directory, quoted, and also where pytest was called below it."""
    root = tmp_path / "a b"
    spec = HostSpec("x", ("x",), chdir.replace("ABSOLUTE", str(root)), python)
    done = remote(spec, tmp_path)
    assert done.stdout.strip().endswith(f"in {root}"), done.stderr
    below = remote(spec._replace(subdirectory="sub"), tmp_path)
    assert below.stdout.strip().endswith(f"in {root / 'sub'}"), below.stderr
    assert below.stdout.startswith(str(script))


def test_login_says_that_there_is_no_such_directory(tmp_path: Path) -> None:
    assert remote(HostSpec("x", ("x",), "/no/where"), tmp_path).returncode == NO_DIRECTORY


def test_login_is_one_word_for_any_shell() -> None:
    (box,) = parse_tx(["gpu-auto*ssh=box//chdir=/a$(touch x)`y`"])
    words = shlex.split(login(box)[-1])
    assert words[:3] == ["exec", "sh", "-c"]
    assert "cd '/a$(touch x)`y`'" in words[3]
