"""Keeps secrets out of reports: they are sent around, and kept for years."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_HIDDEN = "***"
_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL"
    r"|(?<![^_])AUTH)S?(?![^_])",
    re.IGNORECASE,
)
"""Whole words, or their ends: PGPASSWORD and NPM_AUTH, but not GIT_AUTHOR_NAME or TOKENIZERS."""
_SHORTEST = 8
"""A value of fewer characters is no secret, and would be found in harmless words."""

_USER = re.compile(r"(?<=://)[^/\s@]*@")
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s?#'\"]+)[?#][^\s'\"]*", re.IGNORECASE)


def cleaner(
    environment: Mapping[str, str] = os.environ, home: str | None = None
) -> Callable[[str], str]:
    """A function that takes secrets out of a text.

    Values of variables that by their names are secret, user names, passwords and queries of
    URLs become `***`; the home directory becomes `~`.
    """
    values = {
        value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST
    }
    # The longest first: one secret may begin another.
    secrets = [re.escape(value) for value in sorted(values, key=len, reverse=True)]
    known = re.compile("|".join(secrets)) if secrets else None
    directory = _home() if home is None else home
    # A whole path, or the start of one: /home/user is no part of /home/user2 or /mnt/home/user.
    at_home = (
        re.compile(rf"(?<![\w.~-]){re.escape(directory)}(?![\w-]|\.\w)") if directory else None
    )

    def clean(text: str) -> str:
        if known is not None:
            text = known.sub(_HIDDEN, text)
        if "://" in text:
            text = _QUERY.sub(rf"\1?{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))
        return at_home.sub("~", text) if at_home is not None else text

    return clean


def cleaned(value: Any, clean: Callable[[str], str]) -> Any:
    """The same in every text of a document, keys included."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(str(key)): cleaned(part, clean) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        # Lists of figures are long, and have no texts.
        if value and isinstance(value[0], (int, float)):
            return list(value)
        return [cleaned(part, clean) for part in value]
    return value


def _home() -> str:
    try:
        home = str(Path.home())
    except RuntimeError:
        return ""
    # A home of "/" is no secret, and would be found everywhere.
    return home if len(home) > 3 else ""
