"""Render the chat template of a model folder in a process with limits: a template is a program by somebody else."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlit.core.errors import DataError, QwlitError, one_line
from qwlit.data.rows import RowError

MEMORY_MIB = 384
"""Address space that the process may take beyond that of Python and jinja2."""
SECONDS = 5
"""Time of the processor for one request."""
MOST_CHARACTERS = 2**24
"""Characters of the texts of one request."""
MOST_ANSWER_BYTES = 2**27
WAIT_SECONDS, START_SECONDS = 60, 300
"""How long this process waits for an answer, and for the start; importing from a network's file system takes long."""
REQUEST_CONVERSATIONS, REQUEST_BYTES = 256, 2**20
"""A request ends with the conversation that reaches one of these. Their rendering takes about 0.1 s."""
LONGEST_TEMPLATE = 2**20
"""Bytes; the longest published templates have about 30,000."""
REMEDY = "correct it, or set data.template to a known one"
KEPT_VARIABLES = ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Environment variables that Python may need to start. The process gets no others, such as keys and passwords."""

Span = tuple[int, int]
"""First character and end of a part of the rendered text."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as a template writes it."""

    text: str
    marked: list[Span]
    """The parts inside `{% generation %}` marks, in the order in which the template ends them."""


def render_all(
    source: str, variables: Mapping[str, Any], conversations: Sequence[Mapping[str, Any]], *, folder: str
) -> list[Rendered | RowError]:
    """Render conversations, as transformers' `apply_chat_template` does.

    Args:
        variables: names of special tokens, such as eos_token, and their texts.
        conversations: each {"messages": list, "tools": list or None}, and other variables such as enable_thinking.
        folder: where the template is from, for the error.

    Returns:
        For each conversation its text, or why the template refuses it or fails on it.

    Raises:
        DataError: the template needs more time or memory, or writes more, than it may.
    """
    if len(source) > LONGEST_TEMPLATE:
        raise DataError(
            f"the chat template of {folder} has {len(source):,} characters, more than {LONGEST_TEMPLATE:,}; {REMEDY}"
        )
    head = b'{"source": %b, "variables": %b, "conversations": [' % (_json(source), _json(variables))
    outcomes: list[Rendered | RowError] = []
    for request in _requests(conversations):
        written = [part for part in request if isinstance(part, bytes)]
        answer = _ask(head + b", ".join(written) + b"]}\n") if written else []
        if isinstance(answer, dict):
            count = f" for {len(written):,} conversations" if len(written) > 1 else ""
            raise DataError(f"the chat template of {folder} {answer['limit']}{count}; {REMEDY}")
        answers = iter(answer)
        outcomes += [_outcome(next(answers)) if isinstance(part, bytes) else part for part in request]
    return outcomes


def _requests(conversations: Sequence[Mapping[str, Any]]) -> Iterator[list[bytes | RowError]]:
    """Yield the conversations of a request as JSON, and a RowError for one that cannot be written."""
    request: list[bytes | RowError] = []
    size = 0
    for conversation in conversations:
        try:
            request.append(_json(conversation))
        except (ValueError, RecursionError) as error:
            request.append(RowError(f"a message or a tool cannot be written as JSON: {error}"))
        last = request[-1]
        size += len(last) if isinstance(last, bytes) else 0
        if len(request) >= REQUEST_CONVERSATIONS or size >= REQUEST_BYTES:
            yield request
            request, size = [], 0
    if request:
        yield request


def _json(value: Any) -> bytes:
    # A table may hold values that JSON has not, such as a date: transformers writes their type, too.
    text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    return text.encode("utf-8", "surrogatepass")


def _outcome(answer: Any) -> Rendered | RowError:
    if isinstance(answer, list):
        text, spans = answer
        return Rendered(text, [(start, end) for start, end in spans])
    if "refused" in answer:
        return RowError(f"the chat template refuses it: {one_line(answer['refused'])}")
    return RowError(f"the chat template fails on it: {one_line(answer['failed'])}")


def _ask(request: bytes) -> Any:
    """Return the answer of this process's worker, which is started if there is none."""
    global _worker  # noqa: PLW0603 - one worker renders all templates of this process
    if _worker is None or _worker.owner != os.getpid():
        _worker = _Worker()
    worker, _worker = _worker, None
    answer = worker.ask(request)
    if answer is None:
        worker = _Worker()
        answer = worker.ask(request)
    if isinstance(answer, list):
        # Else, and after an error, the worker is not used again: its next line could answer this request.
        _worker = worker
    return answer


class _Worker:
    """The process that renders. It ends when this object or this process does: its standard input is closed then."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        limits = map(str, (MEMORY_MIB, SECONDS, MOST_CHARACTERS))
        # -P: no file jinja2.py of the current folder is imported. The session keeps the terminal's Ctrl-C away.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py")), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            start_new_session=True,
        )
        if not self._read_line(START_SECONDS):
            raise QwlitError(f"the process that renders chat templates does not start (exit code {self._end()})")

    def ask(self, request: bytes) -> Any:
        """Return the answer: a list, or {"limit": what the template needs too much of}.

        None: the process ended before the request, because there was none for some time.
        """
        assert self._process.stdin is not None
        try:
            # The process reads the whole request before it writes, so neither waits for the other.
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._read_line(WAIT_SECONDS)
        except BrokenPipeError:
            line = b""
        if line:
            return json.loads(line.decode("utf-8", "surrogatepass"))
        code = self._end()
        if code == -signal.SIGPROF:
            return {"limit": f"needs more than {SECONDS} s of the processor"}
        return {"limit": f"makes the process that renders it end with exit code {code}"} if code else None

    def _read_line(self, seconds: int) -> bytes:
        """Return the next line of the process; b"" if it ends without one, takes longer or writes too much."""
        assert self._process.stdout is not None
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            waited = 0
            while not received.endswith(b"\n"):
                # One second at a time: a job that is stopped and continued has not waited meanwhile.
                if not selector.select(timeout=1):
                    waited += 1
                elif part := os.read(self._process.stdout.fileno(), 2**20):
                    received += part
                else:
                    return b""
                if waited >= seconds or len(received) > MOST_ANSWER_BYTES:
                    self._process.kill()
                    return b""
        return bytes(received)

    def _end(self) -> int:
        """Wait for the end of the process; return its exit code, or minus the signal that ended it."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


_worker: _Worker | None = None
