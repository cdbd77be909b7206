"""Whether two hosts have the same tests: by commit, and by what is not committed."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LIMIT = 3.0
"""Seconds that git may take for one question."""
_MOST_FILES = 1000


class Checkout(NamedTuple):
    """The state of a checkout; both None where there is no git, or no checkout."""

    commit: str | None = None
    changes: str | None = None
    """A digest of the changes to tracked files, and of modules that are not tracked."""

    def doubt(self, there: Checkout) -> str:
        """Why nobody can say that another host has the same tests; empty where it has."""
        if self.commit is None or there.commit is None:
            return "whether it has the same tests is unknown: there is no git checkout"
        if self.changes != there.changes:
            return "its uncommitted changes differ from those of this host"
        return ""

    def problem(self, there: Checkout, *, strict: bool) -> str:
        """Why another host must not run the tests; empty where it may."""
        if self.commit and there.commit and self.commit != there.commit:
            return (
                f"has commit {there.commit[:12]} checked out, this host {self.commit[:12]}: "
                "check out the same commit there"
            )
        doubt = self.doubt(there)
        return f"{doubt} (an error under --gpu-share-strict)" if doubt and strict else ""


def checkout_of(directory: Path) -> Checkout:
    """The state of the checkout that contains a directory."""
    try:
        commit = _git(directory, "rev-parse", "HEAD").decode("ascii").strip()
        digest = hashlib.sha256(
            _git(directory, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")
        )
        for part in _untracked(directory):
            digest.update(part)
    except (OSError, ValueError, subprocess.SubprocessError):
        return Checkout()
    return Checkout(commit, digest.hexdigest())


def _untracked(directory: Path) -> Iterator[bytes]:
    listed = _git(
        directory, "ls-files", "--others", "--exclude-standard", "-z", "--full-name", "--", "*.py"
    )
    for name in sorted(listed.split(b"\0"))[:_MOST_FILES]:
        yield name + b"\0"


def _git(directory: Path, *arguments: str) -> bytes:
    done = subprocess.run(
        # A monitor of the file system would be left running.
        ["git", "-c", "core.fsmonitor=", *arguments],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=_LIMIT,
        check=True,
    )
    return done.stdout
