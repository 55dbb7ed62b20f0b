"""Write the chat template of a family as Jinja, so that inference uses the same template as training.

One Jinja template is for all families; a few variables at its start select the family.
"""

import json

from qwlit.core.files import resolve_path
from qwlit.data.templates import ChatTemplateFamily

BODY = "qwlit:chat_templates/chatml.jinja"


def chat_template(family: ChatTemplateFamily) -> str:
    """Return a Jinja template that renders conversations and prompts in the same way as `templates.render`.

    Its variables are messages, tools, add_generation_prompt, and enable_thinking in families with thinking.
    """
    variables = {
        "default_system": family.default_system,
        "has_tools": family.tools,
        "has_thinking": family.thinking,
        "keeps_json_text": family.json_text_arguments,
    }
    head = "".join(f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in variables.items())
    return head + resolve_path(BODY).read_text(encoding="utf-8")


def _literal(value: str | bool | None) -> str:
    """Return the value as a Jinja literal. Jinja has the escapes of Python; JSON has the same ones, except for `/`."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
