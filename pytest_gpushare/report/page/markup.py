"""HTML built from tags, so that text is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

# Elements that have no end.
_VOID = frozenset({"input", "link", "meta"})

# Control characters but for the tab and the end of a line, separators, marks that change the
# direction of writing, and surrogates, which UTF-8 cannot express.
_HIDDEN = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for first, last in (
        (0x00, 0x08),
        (0x0B, 0x1F),
        (0x7F, 0x9F),
        (0x200E, 0x200F),
        (0x2028, 0x202E),
        (0x2066, 0x2069),
        (0xD800, 0xDFFF),
    )
    for code in range(first, last + 1)
}


class Markup(str):
    """Text that is HTML as it stands."""

    __slots__ = ()

    def join(self, parts: Iterable[str]) -> Markup:
        """The parts one after another; those that are plain text are escaped."""
        return Markup(str.join(self, map(_safe, parts)))


def tag(_name: str, *content: str, **attributes: object) -> Markup:
    """An element; `cls` is the class, `_` in names is `-`, and None or False leaves one out."""
    written = "".join(
        f" {_attribute(name)}" + ("" if value is True else f'="{_safe(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if _name in _VOID:
        return Markup(f"<{_name}{written}>")
    return Markup(f"<{_name}{written}>{''.join(map(_safe, content))}</{_name}>")


def _attribute(name: str) -> str:
    return "class" if name == "cls" else name.replace("_", "-")


def visible(text: str) -> str:
    """The text with what would hide or turn round its neighbours written as an escape."""
    return text.translate(_HIDDEN)


def _safe(text: str) -> str:
    return text if isinstance(text, Markup) else escape(visible(text), quote=True)


def pairs(held: Iterable[tuple[str, str]]) -> Markup:
    """A list of names and values, without those that have no value."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value)) for name, value in held if value),
    )
