"""The chat template of a family as Jinja, so that a trained model is served with what it was trained with.

One template serves all families; a few variables at its head say which one it is.
"""

import json
from pathlib import Path

from qwlit.core.files import resolve_path
from qwlit.data.templates import Family

BODY = "qwlit:chat_templates/chatml.jinja"


def chat_template(family: Family) -> str:
    """Return Jinja that renders conversations as `templates.render` writes them, and the prompt for an answer.

    Variables that it reads: messages, tools, add_generation_prompt, and enable_thinking in families that think.
    """
    variables = {
        "default_system": family.default_system,
        "has_tools": family.tools,
        "has_thinking": family.thinking,
        "keeps_json_text": family.json_text_arguments,
    }
    head = "".join(f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in variables.items())
    return head + Path(resolve_path(BODY)).read_text(encoding="utf-8")


def _literal(value: str | bool | None) -> str:
    """Return the value as Jinja writes it; its text has the escapes of Python, which JSON's are but for `/`."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
