"""The reference of options and presets, made from the tables that the plugin itself uses.

`table`, `options` and `presets` return MyST text. The directives `gpu-share-options` and
`gpu-share-presets` put it into a page; the table is written there, to be read without Sphinx too.
A key in code, as `gpu_share_wait` or `gpu_share_wait = 0`, becomes a link to its entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpushare.config import options as definitions
from pytest_gpushare.config.kinds import kind_of
from pytest_gpushare.config.options import OPTIONS, PRESETS, Option

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx


def table() -> str:
    """A table with a row for each option: its key, default and meaning."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    rows += [
        f"| `{option.ini}` | {_default(option)} | {_sentence(option.meaning)} |"
        for option in OPTIONS
    ]
    return "\n".join(rows) + "\n"


def options() -> str:
    """One entry for each option, in the order of the table."""
    return "\n".join(_entry(option) for option in OPTIONS)


def presets() -> str:
    """A table: a row for each key that a preset sets, a column for each preset."""
    keys = list(dict.fromkeys(key for values in PRESETS.values() for key in values))
    rows = [
        ["", *(f"`{name}`" for name in PRESETS)],
        ["---"] * (len(PRESETS) + 1),
        *([f"`{key}`", *(values.get(key, "") for values in PRESETS.values())] for key in keys),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _entry(option: Option) -> str:
    fields = [f"- {_sentence(kind_of(option).allowed.replace('allowed is', 'allowed:'))}"]
    if option.in_json:
        fields.append(f"- JSON: `{option.key}`")
    else:
        fields.append("- JSON: no")
    command = f"`-o {option.ini}=...`"
    if option.flag:
        repeated = ", repeatable" if option.repeatable else ""
        command = f"`{option.flag} {option.metavar}`{repeated}, or {command}"
    fields.append(f"- command line: {command}")
    return (
        f"````{{confval}} {option.ini}\n"
        f":default: {_default(option)}\n\n"
        f"{_sentence(option.meaning)}.\n\n" + "\n".join(fields) + "\n````\n"
    )


def _default(option: Option) -> str:
    return f"`{option.default}`" if option.default else "unset"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def link_keys(app: Sphinx, document: nodes.document) -> None:
    """Link each key that stands in code to its entry in the reference."""
    from docutils import nodes
    from sphinx import addnodes

    keys = {option.ini for option in OPTIONS}
    for code in list(document.findall(nodes.literal)):
        key = code.astext().partition(" = ")[0]
        if key not in keys or isinstance(code.parent, nodes.reference | addnodes.pending_xref):
            continue
        link = addnodes.pending_xref(
            "", refdomain="std", reftype="confval", reftarget=key, refdoc=app.env.docname
        )
        code.replace_self(link)
        link += code


def setup(app: Sphinx) -> dict[str, object]:
    """Register the directives and the links."""
    from sphinx.util.docutils import SphinxDirective

    def directive(make):
        class Generated(SphinxDirective):
            def run(self):
                # Else Sphinx would keep the page when only the tables change.
                self.env.note_dependency(definitions.__file__)
                return self.parse_text_to_nodes(make())

        return Generated

    app.connect("doctree-read", link_keys)
    app.add_directive("gpu-share-options", directive(options))
    app.add_directive("gpu-share-presets", directive(presets))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
