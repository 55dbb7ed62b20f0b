"""Render chat templates as transformers does, in a process that a template cannot use for anything else.

`template_process.py` runs this file as a script. It reads requests from standard input and answers each on standard
output, both as lines of JSON. It imports nothing of qwlit, so it starts quickly and has only what jinja2 needs.
"""

import codecs
import contextlib
import html
import json
import pprint
import resource
import select
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2.constants
import jinja2.debug
from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

USED_LATER = (jinja2.constants, jinja2.debug, html, pprint, textwrap, codecs.lookup("unicode-escape"))
"""jinja2 and markupsafe import them where they first use them, when this process can open no files any more."""
READY = "ready"
IDLE_SECONDS = 30.0
"""The process ends when it gets no request for so long; a training lasts much longer than its tokenizing."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""transformers passes a message's reasoning to the template under the first and the second of these names."""
LONGEST_REASON = 300
LONGEST_REPEATED = 2**22
"""Largest length of a text or a list that `*` makes."""
MOST_BITS = 2**14
"""Largest size of a number that `*` and `**` make."""


class OverLimit(Exception):
    """The template needs more than it may; the message says of what."""


class Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers' `apply_chat_template`, with limits on `*` and `**`."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise OverLimit(f"computes a number of more than {MOST_BITS:,} bits")
        elif operator == "*":
            count, parts = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and hasattr(parts, "__len__") and len(parts) * count > LONGEST_REPEATED:
                raise OverLimit(f"repeats a text or a list to more than {LONGEST_REPEATED:,} items")
        return super().call_binop(context, operator, left, right)


class GenerationMarks(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja2

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        environment.extend(marks=self)
        self.num_written = 0
        """Characters of the text so far; a mark inside a macro counts from where the macro's text will be."""
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _mark(self, context: nodes.EvalContext, caller: Macro) -> str:
        text: str = caller()
        self.spans.append((self.num_written, self.num_written + len(text)))
        return text


class _Dict:
    """`dict` without access to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # In the way of jinja2, so that `namespace(self=…)` is possible.
        itself, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(itself, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no names with an underscore in front, such as {name}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


@lru_cache(maxsize=2)
def _compiled(source: str) -> Template:
    return Environment().from_string(source)


def _rendered(template: Template, values: Mapping[str, Any], most_characters: int) -> tuple[str, list[tuple[int, int]]]:
    """Return the text and its marked parts."""
    marks: GenerationMarks = template.environment.marks  # type: ignore[attr-defined]
    marks.num_written, marks.spans = 0, []
    blocks = []
    for block in template.generate(**values):
        blocks.append(block)
        marks.num_written += len(block)
        if marks.num_written > most_characters:
            raise OverLimit(f"writes more than {most_characters:,} characters")
    return "".join(blocks), marks.spans


def _values(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """Return a conversation as transformers passes it to a template."""
    messages = []
    for message in conversation["messages"]:
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
        named = {} if reasoning is None else {"thinking": reasoning} | message | {"reasoning_content": reasoning}
        messages.append(named or message)
    values = {"documents": None, "add_generation_prompt": False}
    return values | dict(conversation) | {"messages": messages}


def _outcomes(request: Mapping[str, Any], most_characters: int) -> Iterator[Any]:
    """Yield for each conversation [text, marked parts], or why there is none as {"refused" or "failed": reason}."""
    for conversation in request["conversations"]:
        try:
            template = _compiled(request["source"])
            text, spans = _rendered(template, request["variables"] | _values(conversation), most_characters)
            most_characters -= len(text)
            yield text, spans
        except (MemoryError, OverLimit):
            raise
        except TemplateError as error:
            yield {"refused": str(error)[:LONGEST_REASON]}
        except Exception as error:  # the template's expressions can raise anything
            yield {"failed": str(error)[:LONGEST_REASON] or type(error).__name__}


def _answer(line: bytes, most_characters: int, memory: str) -> bytes:
    """Return the answer to a request: a list of outcomes, or {"limit": what the template needs too much of}."""
    try:
        answer = json.dumps(list(_outcomes(json.loads(line), most_characters)), ensure_ascii=False)
        return answer.encode("utf-8", "surrogatepass")
    except MemoryError:
        return json.dumps({"limit": f"needs more than {memory} of memory"}).encode()
    except OverLimit as error:
        return json.dumps({"limit": str(error)}).encode()


def _set_limits(most_bytes: int) -> None:
    """Let this process have only so much more memory, and open no files and connections and start no processes."""
    pages = Path("/proc/self/statm")
    in_use = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    limits = {
        resource.RLIMIT_AS: in_use + most_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
        # Standard input, output and error are open.
        resource.RLIMIT_NOFILE: 3,
    }
    for limit, value in limits.items():
        # macOS refuses a limit of the address space.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Answer requests until standard input is closed or nobody asks.

    Arguments of the script: MiB of memory, seconds of a request, characters of an answer.
    """
    memory, seconds, most_characters = map(int, sys.argv[1:])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _set_limits(memory * 2**20)
    answers.write(f"{READY}\n".encode())
    answers.flush()
    while select.select([requests], [], [], IDLE_SECONDS)[0] and (line := requests.readline()):
        # Where the time of the processor is used up, the signal ends the process, also inside of one long operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(line, most_characters, f"{memory} MiB")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
