"""Builds HTML. Strings are escaped unless they are `Markup`, the type that these functions return."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flowgen.printable import printable

# Elements that have no content and no end tag.
_EMPTY = frozenset(("meta", "img", "input", "br"))


class Markup(str):
    """A string that is HTML already, so it is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Returns an element. Children that are not `Markup` are escaped.

    attributes: underscores become hyphens, and one at the end is dropped, as in `class_`. An attribute that is None or
    False is left out, and True adds the attribute without a value.

    Example:
        element("p", "a < b", class_="note")  # '<p class="note">a &lt; b</p>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(printable(str(value)))}"')
    start = Markup(f"<{' '.join(words)}>")
    return start if name in _EMPTY else Markup(f"{start}{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Returns the children one after another; those that are not `Markup` are escaped.

    Example:
        joined([element("b", "1"), " < 2"])
    """
    return Markup("".join(child if isinstance(child, Markup) else escaped(str(child)) for child in children))


def escaped(text: str) -> Markup:
    """Returns text as HTML, with control characters made visible.

    Example:
        escaped("<script>")  # "&lt;script&gt;"
    """
    return Markup("\n".join(html.escape(printable(line)) for line in text.split("\n")))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Returns a table in a box that scrolls sideways. The first cell of each row is its header.

    Example:
        table("Results", ("metric", "value"), [("loss", 0.5)])
    """
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in rows
    ]
    inner = (element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", element("table", *inner), class_="scroll", tabindex="0", role="group", aria_label=caption)


def picture(png: bytes, alt: str, *, kind: str = "png") -> Markup:
    """Returns an image that is embedded in the page. alt: a description of the image in words.

    Example:
        picture(Path("samples/0000300.png").read_bytes(), "Samples at step 300")
    """
    content = base64.b64encode(png).decode("ascii")
    return element("img", src=f"data:image/{kind};base64,{content}", alt=alt, decoding="async")


class Section(NamedTuple):
    """A part of the page with a heading. name: the anchor that the table of contents links to."""

    title: str
    name: str
    content: Markup

    def markup(self) -> Markup:
        """Returns the section as HTML."""
        return element("section", element("h2", self.title, id=self.name), self.content, aria_labelledby=self.name)


def section(title: str, name: str, *children: object) -> Section:
    """Returns a section of the page with these children.

    Example:
        section("Curves", "curves", chart)
    """
    return Section(title, name, joined(children))


def note(text: str) -> Markup:
    """Returns a sentence about something that is missing or unusual.

    Example:
        note("The run has no checkpoint yet.")
    """
    return element("p", text, class_="note")


def number(value: object) -> str:
    """Returns a number as text: an int with a comma every three digits, a float with four significant digits.

    Example:
        number(1234567)  # "1,234,567"
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
