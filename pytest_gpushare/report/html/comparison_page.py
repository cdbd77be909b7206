"""The comparison of two runs as one HTML page without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.report.html.markup import Markup, breakable, tag
from pytest_gpushare.report.html.page import asset, policy

if TYPE_CHECKING:
    from pytest_gpushare.report.html.comparison import ComparedSubject, Difference

_STYLES = ("page.css", "media.css")


def page(names: Sequence[str], sections: Sequence[ComparedSubject]) -> str:
    """The HTML; `names` are those of the two files, the earlier run first."""
    style = "".join(map(asset, _STYLES))
    head = Markup("").join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy(style, [])),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", "Two runs compared"),
            tag("link", rel="icon", href="data:,"),
            tag("style", Markup(style)),
        ]
    )
    before, after = names
    body = Markup("\n").join(
        [
            tag(
                "header",
                tag("p", "GPU share report", cls="eyebrow"),
                tag("h1", "Two runs compared"),
                tag("p", tag("bdi", before), " → ", tag("bdi", after), cls="subtitle"),
            ),
            tag("main", *(_section(section) for section in sections)),
            tag("footer", "This page is one file and asks no network."),
        ]
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _section(section: ComparedSubject) -> Markup:
    heads = ("", "before", "after", "change")
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
        tag("tbody", *map(_row, section.rows)),
    )
    return tag(
        "section",
        tag("h2", section.title),
        tag("div", table, cls="scroll", tabindex=0, role="region", aria_label=section.title),
        tag("p", section.note) if section.note else Markup(""),
    )


def _row(row: Difference) -> Markup:
    return tag(
        "tr",
        tag("td", tag("code", *breakable(row.name))),
        tag("td", row.before),
        tag("td", row.after),
        tag("td", tag("span", row.change, cls=row.state or None)),
    )
