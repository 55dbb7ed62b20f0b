"""Recognise passwords, keys and tokens in a text, so that no file gets them."""

import re

SECRET = re.compile(
    r"""([\w.+-]*(?:key|token|password|passwd|secret|credentials?))=  # a name
    (?: \\?(["'])(?!\$).*?\2 | (?!\\?["']|\$)[^\s,;'"\]}]+ )  # a value, in quotes or not; no variable""",
    re.IGNORECASE | re.VERBOSE,
)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]+@")


def hide_secrets(text: str) -> str:
    """Return the text with *** for passwords, keys and tokens."""
    return PASSWORD_IN_URL.sub("://***@", SECRET.sub(r"\1=***", text))
