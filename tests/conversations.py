"""Generated conversations without control tokens: two languages, odd whitespace, code, emoji, tools, thinking."""

import json
import random
import re
from itertools import pairwise
from typing import Any

FRAGMENTS = [
    *("Hello there", "don't you think it's fine?", "x", "1234567 + 89", "а также по-русски", "…—“quotes”", "ﬁ"),
    *("你好，世界！", "今天天气怎么样？", "日本語も少し", "\u3000全角", "🎉👨\u200d👩\u200d👧", "café e\u0301"),
    *("def f(x):\n    return x ** 2\n", "```python\nprint('hi')\n```", '{"a": [1, 2]}', "<b>bold</b> & <tools>"),
    *("  leading", "trailing  ", "\n", "\n\n", "\r\n", "\t", " ", "   \n  "),
]
SYSTEMS = ["", "You are a terse assistant.", "你是一个有用的助手。\n", " \nIndented."]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "天气 & more", "parameters": {"city": "string"}},
    },
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a", "b"]}}},
]

Messages = list[dict[str, Any]]
Conversation = tuple[Messages, list[dict[str, Any]] | None]


def text(rng: random.Random) -> str:
    return rng.choice(["", " ", "\n"]).join(rng.choices(FRAGMENTS, k=rng.randint(1, 6)))


def answer(rng: random.Random, *, thinking: bool) -> dict[str, Any]:
    """An assistant message that says something; with `thinking` sometimes reasons, apart from the content or in it."""
    message: dict[str, Any] = {"role": "assistant", "content": rng.choice(["", "\n"]) + text(rng) + "."}
    style = rng.randrange(3) if thinking else 0
    if style == 1:
        message["reasoning_content"] = rng.choice(["", "\n", text(rng)])
    elif style == 2:
        message["content"] = f"<think>\n{rng.choice(['', text(rng)])}\n</think>\n\n{message['content']}"
    return message


def tool_call(rng: random.Random) -> dict[str, Any]:
    arguments: Any = {"city": text(rng), "days": rng.randint(1, 9), "nested": {"ja": True, "nichts": None}}
    if rng.random() < 0.3:
        arguments = json.dumps(arguments)
    function = {"name": rng.choice(["weather", "add"]), "arguments": arguments}
    return {"type": "function", "function": function} if rng.random() < 0.7 else function


def conversation(seed: int, *, tools: bool = True, thinking: bool = True) -> Conversation:
    """Return messages and tools, decided by `seed`; tags stand only where a template reads them."""
    rng = random.Random(seed)
    messages: Messages = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for turn in range(rng.randint(1, 3)):
        if turn and rng.random() < 0.2:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        messages.append({"role": "user", "content": text(rng)})
        while tools and rng.random() < 0.4:
            calls = [tool_call(rng) for _ in range(rng.randint(1, 3))]
            if rng.random() < 0.5:
                messages.append({"role": "assistant", "content": rng.choice(["", None]), "tool_calls": calls})
            else:
                messages.append(answer(rng, thinking=thinking) | {"tool_calls": calls})
            messages += [{"role": "tool", "content": text(rng)} for _ in calls]
        messages.append(answer(rng, thinking=thinking))
    return messages, (TOOLS[: rng.randint(1, 2)] if tools and rng.random() < 0.6 else None)


def without_reasoning(messages: Messages) -> Messages:
    """What data.thinking=drop leaves of a generated conversation."""
    kept = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and content and "</think>" in content:
            content = content.partition("</think>")[2].lstrip("\n")
        kept.append({key: value for key, value in message.items() if key != "reasoning_content"} | {"content": content})
    return kept


EMPTY_BLOCK = "<think>\n\n</think>\n\n"
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def supervised_spans(rendered: str, loss_on: str, thinking: str) -> list[tuple[int, int]]:
    """Return the supervised parts of what a Jinja template rendered, found in the text alone."""
    if loss_on == "all":
        return [(0, len(rendered))]
    spans = [match.span(1) for match in ANSWER.finditer(rendered)]
    if thinking != "keep":
        spans = [(s + len(EMPTY_BLOCK) * rendered.startswith(EMPTY_BLOCK, s), end) for s, end in spans]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    return spans[-1:] if loss_on == "last_assistant" else spans
