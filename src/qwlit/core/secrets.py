"""Recognise passwords, keys and tokens in a text, so that no file gets them."""

import re

SECRET = re.compile(
    r"""([\w.+-]*(?:key|token|password|passwd|secret|credentials?))=  # a name
    (?: \\?(["'])(?!\$).*?\2 | (?!\\?["']|\$)[^\s,;'"\]}]+ )  # a value, in quotes or not; no variable""",
    re.IGNORECASE | re.VERBOSE,
)
# A word of its own, as in `wandb login KEY` and `hf auth login --token KEY`; a variable is no secret.
SECRET_WORD = re.compile(
    r"""(\bwandb\s+login(?:\s+-[^\s;&|]+)*\s+ | --(?:[\w-]*-)?(?:key|token|password|secret)\s+)  # the words before
    (?!-) (?!["']?\$) [^\s;&|]+""",
    re.IGNORECASE | re.VERBOSE,
)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]+@")


def hide_secrets(text: str) -> str:
    """Return the text with *** for passwords, keys and tokens."""
    text = SECRET_WORD.sub(r"\1***", SECRET.sub(r"\1=***", text))
    return PASSWORD_IN_URL.sub("://***@", text)
