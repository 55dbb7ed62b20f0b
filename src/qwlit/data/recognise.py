"""Which family's template a tokenizer has, told by what it renders."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qwlit.core.errors import DataError
from qwlit.data.conversation import parse_conversation
from qwlit.data.templates import END, FAMILIES, START, Family, Supervision, render

REMEDY = "set data.template=qwen2, qwen2_5, qwen2_5_base, qwen3 or qwen3_2507"

_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "二"}}}
_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nEins."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Zwei.", "reasoning_content": "second"},
]
_TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 二?"},
    {"role": "assistant", "content": "Adding.", "reasoning_content": "call it", "tool_calls": [_CALL, _CALL]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "Three."},
]
_SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
_PROBES: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]] | None], ...] = (
    (_CHAT, None),
    ([_SYSTEM, *_CHAT], None),
    (_TOOL_CHAT, [_TOOL]),
    ([_SYSTEM, *_TOOL_CHAT], [_TOOL]),
)

_TEXT_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
# Arguments as JSON text: Qwen2.5 quotes them, Qwen3 writes them as they stand.
_TEXT_ARGUMENTS = [_TOOL_CHAT[0], {"role": "assistant", "content": "Adding.", "tool_calls": [_TEXT_CALL]}]

RenderJinja = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
_Probe = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]


def resolve_template(tokenizer: Any, template_name: str) -> Family:
    """Return the template family to use: the one named, or with `auto` the tokenizer's own.

    Raises:
        DataError: `auto`, and the tokenizer has no chat template or an unknown one.
    """
    if template_name != "auto":
        return FAMILIES[template_name]
    if not tokenizer.chat_template:
        return recognise_template(None)
    # Of several templates the one for conversations; transformers would take another one for tools.
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own is None:
        raise DataError(f"the tokenizer has several chat templates and none called default; {REMEDY}")
    return recognise_template(
        lambda messages, tools: tokenizer.apply_chat_template(messages, tools=tools, chat_template=own, tokenize=False)
    )


def recognise_template(render_jinja: RenderJinja | None) -> Family:
    """Return the family whose pieces join to exactly what the tokenizer's own Jinja renders for a few conversations.

    Where all but the default system text is a family's, as in Qwen2.5-Math, the family is returned with that text.

    Args:
        render_jinja: (messages, tools) -> text; None for a tokenizer without a chat template.

    Raises:
        DataError: there is no template, or it is none of the known ones.
    """
    if render_jinja is None:
        raise DataError(f"the tokenizer has no chat template; {REMEDY}")
    for family in FAMILIES.values():
        if _agrees(family, render_jinja, _PROBES):
            return family
    # The families' own texts tell some of them apart; without that the arguments' spelling does.
    default = _default_system(render_jinja)
    for family in FAMILIES.values():
        other = replace(family, default_system=default)
        # A template that writes tools in a way of its own is no family's, not the one's that knows no tools.
        if not family.tools and _writes_tools(render_jinja):
            continue
        if _agrees(other, render_jinja, (*_PROBES, (_TEXT_ARGUMENTS, [_TOOL]))):
            return other
    raise DataError(f"the tokenizer's chat template is none of {', '.join(FAMILIES)}; to train with one, {REMEDY}")


def _default_system(render_jinja: RenderJinja) -> str | None:
    """Return the system text that the template writes into a conversation without one; None where it writes none."""
    try:
        rendered = render_jinja(_CHAT, None)
    except Exception:  # a template of strangers may fail in any way; then it agrees with no family
        return None
    head = f"{START}system\n"
    return rendered.removeprefix(head).partition(END)[0] if rendered.startswith(head) else None


def _agrees(family: Family, render_jinja: RenderJinja, probes: tuple[_Probe, ...]) -> bool:
    try:
        return all(
            render_jinja(messages, tools) == _rendered(family, messages, tools)
            for messages, tools in probes
            if family.tools or not tools
        )
    except Exception:  # a template of strangers may fail in any way: then it is not this one
        return False


def _rendered(family: Family, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    conversation = parse_conversation(messages, tools)
    return "".join(piece.text for piece in render(conversation, family, Supervision()))


def _writes_tools(render_jinja: RenderJinja) -> bool:
    try:
        return render_jinja(_CHAT, [_TOOL]) != render_jinja(_CHAT, None)
    except Exception:  # a template of strangers may fail in any way
        return True
