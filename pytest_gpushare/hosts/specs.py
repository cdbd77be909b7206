"""The hosts that the user named, by `--tx gpu-auto*...` or in `gpu_share_hosts`. Pure.

What xdist and execnet are given for them is made here, too.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.text import one_line

MOST_HOSTS = 64
_PREFIX = "gpu-auto*"
_SHAPE = (
    "allowed is gpu-auto*popen for this host, or "
    "gpu-auto*ssh=user@box//chdir=/srv/project//python=.venv/bin/python"
)
_LINE_SHAPE = "allowed is user@box:/srv/project, options of ssh and python=PATH after it, or popen"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

SSH_OPTIONS = (
    # Nobody sits there to type a password, and a host that is silent is gone after 20 seconds.
    "-oBatchMode=yes",
    "-oConnectTimeout=8",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
)
"""What ssh is given before the user's words: of two values of an option it takes the first."""


class HostSpec(NamedTuple):
    """A host as the user named it."""

    name: str
    """How reports name it, unique in the run; empty: this host."""
    ssh: tuple[str, ...] = ()
    """ssh's arguments, the destination last; empty: this host."""
    chdir: str = ""
    """The directory of the project there; empty: the login directory."""
    python: str = ""
    """The Python there, relative to `chdir`; empty: `.venv/bin/python` or `python3`."""
    environment: Mapping[str, str] = {}
    """Variables for its workers."""
    subdirectory: str = ""
    """Where below the project's root directory pytest was called."""

    @property
    def is_local(self) -> bool:
        """Whether it is this host."""
        return not self.ssh


def parse_tx(specs: Sequence[str]) -> tuple[HostSpec, ...]:
    """The hosts of `--tx gpu-auto*...`. Raises `SettingsError`."""
    hosts = []
    for text in specs:
        shown = f"--tx {one_line(text, 200)}"
        if not text.startswith(_PREFIX):
            raise SettingsError(
                f"{shown}: stands beside {_PREFIX}: write {_PREFIX} before each spec, or none"
            )
        hosts.append(_spec(text.removeprefix(_PREFIX), shown))
    return _named(hosts)


def parse_lines(lines: Sequence[str], where: str) -> tuple[HostSpec, ...]:
    """The hosts of `gpu_share_hosts`; `where` names the place. Raises `SettingsError`."""
    return _named([_line(line, f"{where}: gpu_share_hosts: {one_line(line, 200)}")
                   for line in lines])  # fmt: skip


def _spec(text: str, shown: str) -> HostSpec:
    given: dict[str, str] = {}
    environment: dict[str, str] = {}
    for part in text.split("//"):
        key, equals, value = part.partition("=")
        if key in given:
            raise SettingsError(f"{shown}: {key} occurs twice: keep one")
        if key.startswith("env:") and equals and _NAME.fullmatch(key[4:]):
            environment[key[4:]] = value
        elif key == "popen" or (key in ("ssh", "chdir", "python", "ssh_config") and value):
            given[key] = value
        else:
            raise SettingsError(f"{shown}: {key or 'nothing'} is not understood: {_SHAPE}")
    if "popen" in given:
        if given.keys() != {"popen"} or environment:
            raise SettingsError(f"{shown}: popen is this host as it is: {_SHAPE}")
        return HostSpec("")
    words = tuple(given.get("ssh", "").split())
    if "ssh_config" in given:
        words = ("-F", given["ssh_config"], *words)
    return _checked(
        HostSpec("", words, given.get("chdir", ""), given.get("python", ""), environment), shown
    )


def _line(line: str, shown: str) -> HostSpec:
    try:
        first, *rest = shlex.split(line)
    except ValueError:
        raise SettingsError(f"{shown}: a quote is not closed: {_LINE_SHAPE}") from None
    if first == "popen" and not rest:
        return HostSpec("")
    match = re.fullmatch(r"((?:[^@:\s]+@)?(?:\[[^\]]+\]|[^\s:\[\]]+)):(.+)", first)
    if match is None:
        raise SettingsError(f"{shown}: is not a host with its directory: {_LINE_SHAPE}")
    python = ""
    words = []
    for word in rest:
        if word.startswith("python="):
            python = word.removeprefix("python=")
        else:
            words.append(word)
    destination = match[1].replace("[", "").replace("]", "")
    return _checked(HostSpec("", (*words, destination), match[2], python), shown)


def _checked(spec: HostSpec, shown: str) -> HostSpec:
    if not spec.ssh or spec.ssh[-1].startswith("-"):
        raise SettingsError(f"{shown}: names no host: {_SHAPE}")
    # execnet splits a spec at each of these, and quotes nothing.
    texts = (*spec.ssh, spec.chdir, spec.python)
    if any("//" in text or not text.isprintable() for text in texts) or any(
        set(word) & set(" \"'") for word in spec.ssh
    ):
        raise SettingsError(f"{shown}: has // or a quote in a value: {_SHAPE}")
    return spec


def _named(hosts: Sequence[HostSpec]) -> tuple[HostSpec, ...]:
    """Each with a name of its own."""
    if len(hosts) > MOST_HOSTS:
        raise SettingsError(f"{len(hosts)} hosts: at most {MOST_HOSTS} are used")
    if sum(host.is_local for host in hosts) > 1:
        raise SettingsError(f"{_PREFIX}popen occurs twice: this host is one host")
    found: list[HostSpec] = []
    taken: set[str] = set()
    for host in hosts:
        name = "" if host.is_local else host.ssh[-1].rpartition("@")[2]
        number, unique = 1, name
        while unique in taken:
            number += 1
            unique = f"{name}#{number}"
        taken.add(unique)
        found.append(host._replace(name=unique))
    return tuple(found)


LAUNCH = """\
{cd}p={python}
if [ -z "$p" ]; then if [ -x .venv/bin/python ]; then p=.venv/bin/python; else p=python3; fi; fi
case "$p" in /*) ;; */*) p="$PWD/$p" ;; esac
{below}exec "$p" -u -c 'import sys;exec(eval(sys.stdin.readline()))'
"""

NO_DIRECTORY = 97
"""The exit code of the login where the directory does not exist there."""


def login(spec: HostSpec) -> list[str]:
    """The command that starts Python there, in the project's directory."""
    directory = spec.chdir
    # Quoted, a shell does not know the tilde.
    start = ""
    if directory == "~" or directory.startswith("~/"):
        start, directory = '"$HOME"', directory[1:]
    places = [f"{start}{shlex.quote(directory)}"] if spec.chdir else []
    places += [shlex.quote(f"./{spec.subdirectory}")] if spec.subdirectory else []
    # The Python of the project lies in its root directory.
    cd = "".join(f"cd {place} || exit {NO_DIRECTORY}\n" for place in places[:1])
    below = "".join(f"cd {place} || exit {NO_DIRECTORY}\n" for place in places[1:])
    script = LAUNCH.format(cd=cd, python=shlex.quote(spec.python), below=below)
    # Whatever shell the user has there.
    return ["ssh", *SSH_OPTIONS, *spec.ssh, f"exec sh -c {shlex.quote(script)}"]


def proxy_id(number: int) -> str:
    """execnet's name of the gateway through which a host's workers run."""
    return f"gpu-share-{number}"


def proxy(spec: HostSpec, number: int, python: str, directory: str) -> str:
    """The `--px` of a host: one login for all its workers."""
    parts = {
        "id": proxy_id(number),
        "ssh": " ".join((*SSH_OPTIONS, *spec.ssh)),
        "python": shlex.quote(python),
        "chdir": directory,
        # With the main thread only it cannot serve two workers.
        "execmodel": "thread",
    }
    return "//".join(f"{key}={value}" for key, value in parts.items())


def workers(number: int, count: int) -> str:
    """The `--tx` of a host's workers."""
    return f"{count}*popen//via={proxy_id(number)}"
