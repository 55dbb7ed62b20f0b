"""Recognise the template family of a tokenizer by what its template renders."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qwlit.core.errors import DataError
from qwlit.data.conversation import parse_conversation
from qwlit.data.jinja_template import has_marks, jinja_template
from qwlit.data.rows import RowError
from qwlit.data.template_process import render_all
from qwlit.data.templates import FAMILIES, IM_END, IM_START, ChatTemplate, ChatTemplateFamily, Supervision, render

*_FIRST, _LAST = sorted(FAMILIES)
REMEDY = f"set data.template={', '.join(_FIRST)} or {_LAST}"

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
RenderJinja = Callable[[Messages, Tools], str]
_Probe = tuple[Messages, Tools]

_TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "二"}}}
_CHAT: Messages = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nfirst\n</think>\n\nEins."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Zwei.", "reasoning_content": "second"},
]
_TOOL_CHAT: Messages = [
    {"role": "user", "content": "1 + 二?"},
    {"role": "assistant", "content": "Adding.", "reasoning_content": "call it", "tool_calls": [_CALL, _CALL]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "three"},
    {"role": "assistant", "content": "Three."},
]
_SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
_PROBES: tuple[_Probe, ...] = (
    (_CHAT, None),
    ([_SYSTEM, *_CHAT], None),
    (_TOOL_CHAT, [_TOOL]),
    ([_SYSTEM, *_TOOL_CHAT], [_TOOL]),
)

_TEXT_CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
# Arguments as JSON text: Qwen2.5 quotes them, Qwen3 writes them unchanged.
_TEXT_ARGUMENTS: _Probe = (
    [_TOOL_CHAT[0], {"role": "assistant", "content": "Adding.", "tool_calls": [_TEXT_CALL]}],
    [_TOOL],
)
_CHAT_WITH_TOOL: _Probe = (_CHAT, [_TOOL])
_ALL_PROBES = (*_PROBES, _TEXT_ARGUMENTS, _CHAT_WITH_TOOL)


def resolve_template(tokenizer: Any, template_name: str) -> ChatTemplate:
    """Return the template: the family that `template_name` names, or for `auto` the tokenizer's own.

    The tokenizer's own is a known family, or else its Jinja template where that has `{% generation %}` marks.

    Raises:
        DataError: for `auto`, if the tokenizer has no chat template, or an unknown one without usable marks,
            or one that writes today's date or needs more time or memory than it may.
    """
    if template_name != "auto":
        return FAMILIES[template_name]
    if not tokenizer.chat_template:
        raise DataError(f"the tokenizer has no chat template; {REMEDY}")
    # If there are several, use "default" for all conversations; transformers would use "tool_use" for tools.
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own is None:
        raise DataError(f"the tokenizer has several chat templates, but none called 'default'; {REMEDY}")
    if not isinstance(own, str):
        raise DataError(f"the tokenizer's chat template is no text; {REMEDY}")
    if re.search(r"\bstrftime_now\b", own):
        raise DataError(
            "the tokenizer's chat template writes today's date (strftime_now), so the same run would have other tokens"
            f" tomorrow; write a fixed date into the template, or {REMEDY}, with the date in data.system"
        )
    outcomes = render_all(
        own,
        dict(tokenizer.special_tokens_map),
        [{"messages": messages, "tools": tools} for messages, tools in _ALL_PROBES],
        folder=str(tokenizer.name_or_path),
    )

    def render_own(messages: Messages, tools: Tools) -> str:
        outcome = outcomes[_ALL_PROBES.index((messages, tools))]
        if isinstance(outcome, RowError):
            raise outcome
        return outcome.text

    try:
        return recognise_template(render_own)
    except DataError:
        if not has_marks(own):
            raise
    return jinja_template(tokenizer, own)


def recognise_template(render_jinja: RenderJinja) -> ChatTemplateFamily:
    """Return the family that renders a few test conversations exactly as the tokenizer's own Jinja template does.

    If only the default system text differs, as in Qwen2.5-Math, return the family with that text.

    Args:
        render_jinja: (messages, tools) -> text.

    Raises:
        DataError: the template is unknown.
    """

    def render_own(messages: Messages, tools: Tools) -> str | None:
        try:
            return render_jinja(messages, tools)
        except Exception:  # an unknown template can raise anything
            return None

    for family in FAMILIES.values():
        if _renders_the_same(family, render_own, _PROBES):
            return family
    # Try again with the template's own system text. Now that text cannot distinguish the families, so a probe with
    # arguments as JSON text does.
    plain = render_own(_CHAT, None)
    default = _default_system(plain)
    writes_tools = render_own(*_CHAT_WITH_TOOL) != plain
    for family in FAMILIES.values():
        candidate = replace(family, default_system=default)
        # A family without tools skips the tool probes: it must not match a template that writes tools in another way.
        if not family.tools and writes_tools:
            continue
        if _renders_the_same(candidate, render_own, (*_PROBES, _TEXT_ARGUMENTS)):
            return candidate
    raise DataError(
        f"the tokenizer's chat template is unknown (known: {', '.join(FAMILIES)}); put {{% generation %}} and"
        f" {{% endgeneration %}} around what the assistant writes in it, or to train with a known one, {REMEDY}"
    )


def _default_system(rendered: str | None) -> str | None:
    """Return the system text that the template added to a conversation without one; None if it added none."""
    head = f"{IM_START}system\n"
    return rendered.removeprefix(head).partition(IM_END)[0] if rendered and rendered.startswith(head) else None


def _renders_the_same(
    family: ChatTemplateFamily, render_own: Callable[[Messages, Tools], str | None], probes: tuple[_Probe, ...]
) -> bool:
    """Return whether the family renders the probes like the tokenizer's template, which gives None where it fails."""
    return all(
        render_own(messages, tools) == _render_text(family, messages, tools)
        for messages, tools in probes
        if family.tools or not tools
    )


def _render_text(family: ChatTemplateFamily, messages: Messages, tools: Tools) -> str:
    conversation = parse_conversation(messages, tools)
    return "".join(piece.text for piece in render(conversation, family, Supervision()))
