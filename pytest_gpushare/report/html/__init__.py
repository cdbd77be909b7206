"""The report as one HTML page, made from the report document; it needs no network.

Python writes what can be read without scripts: the verdict, devices, workers, events, leaks and
settings. The page's own script draws the timeline, with uPlot, and the table of tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_gpushare.report.html.data import data
from pytest_gpushare.report.html.markup import Markup, tag
from pytest_gpushare.report.html.sections import body
from pytest_gpushare.report.html.verdict import title

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = (
    "words.js",
    "tests.js",
    "table.js",
    "timeline.js",
    "plot.js",
    "vram.js",
    "bars.js",
    "page.js",
)
_STYLES = ("uPlot.min.css", "page.css", "media.css")


def page(document: Mapping[str, Any]) -> str:
    """The HTML of a report document of schema version 1; the same for the same document.

    Text of the document, such as node ids, is escaped. Scripts and styles are allowed by their
    hashes alone, and everything that would reach out is forbidden. The text can be written as
    UTF-8 whatever the names are.
    """
    style = "".join(map(_asset, _STYLES))
    # The licence asks to go wherever the library goes.
    library = f"/*!\n{_asset('uPlot.LICENSE.txt')}*/\n{_asset('uPlot.iife.min.js')}"
    own = "".join(_asset(name) for name in _SCRIPTS)
    # Nothing of ours in the page's global names.
    own = f'(() => {{\n"use strict";\n{own}}})();\n'
    scripts = [library, own]
    head = Markup("").join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, scripts)),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="generator", content=_generator(document)),
            tag("title", title(document)),
            # Without it a browser asks the server that the page came from.
            tag("link", rel="icon", href="data:,"),
            tag("style", Markup(style)),
        ]
    )
    # In a script of data only "<" could end it; JSON has an escape for it.
    held = json.dumps(data(document), separators=(",", ":"), allow_nan=False)
    content = Markup("").join(
        [
            body(document),
            tag("script", Markup(held.replace("<", "\\u003c")), type="application/json", id="data"),
            *(tag("script", Markup(script)) for script in scripts),
        ]
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', content), lang='en')}\n"


def _policy(style: str, scripts: list[str]) -> str:
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _generator(document: Mapping[str, Any]) -> str:
    generator = document.get("generator") or {}
    return f"{generator.get('name', 'pytest-gpushare')} {generator.get('version', '')}".strip()
