"""HTML elements made so that text can only be text: whatever is not an element already is escaped."""

from collections.abc import Iterable
from html import escape


class Html(str):
    """Markup, as against text."""


def element(tag: str, *content: str | None, **attributes: str | None) -> Html:
    """Return an element; None is left out of its content and its attributes. `class_` is `class`."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{named}>{join(*content)}</{tag}>")


def join(*content: str | None) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content if part is not None))


def lines(texts: Iterable[str]) -> Html:
    return Html("<br>".join(escape(text) for text in texts))


def table(titles: list[Html], rows: list[Html]) -> Html:
    """Return a table that scrolls by itself where the page is too narrow for it."""
    head = element("thead", element("tr", *titles))
    body = element("tbody", *rows)
    return element("div", element("table", head, body), class_="wide")
