"""Lists on the command line: [a,b]."""

import re


def read_list(text: str) -> list[str]:
    """Split `[a,b]` into its items, or return the one item. An item with a comma or a bracket must be quoted."""
    inside = re.fullmatch(r"\[(.*)\]", text.strip(), re.DOTALL)
    if inside is None:
        return [text.strip()]
    quoted = re.findall(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]+))\s*(?:,|$)""", inside[1])
    return [item.strip() for parts in quoted if (item := "".join(parts)).strip()]
