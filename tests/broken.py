"""Broken rows and files of every kind, and what must become of each: so many rows quarantined, or one clear line."""

import datetime
import gzip
import io
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwlit.data.config import DataPart

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "你好 there"}
GOOD = {"messages": [USER, ANSWER]}
GOOD_LINE = json.dumps(GOOD, ensure_ascii=False).encode()
GOOD_TOKENS = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
GOOD_CSV = b"Hi,there\n"
CALL = {"name": "add", "arguments": {"a": 1}}
TEN_MB = 10_000_000

Rejected = dict[int, str]
"""Line of each quarantined row and a part of the reason."""

NOT_ALL_UTF8 = pyarrow.Array.from_buffers(pyarrow.utf8(), 3, pyarrow.array([b"ab", b"a\xff", b"cd"]).buffers())


@dataclass(frozen=True)
class Counted:
    """Good and bad rows are told apart and counted."""

    make: Callable[[], Any]
    """Writes the data into the current folder and returns data.path."""
    good: list[int]
    """Lines whose rows are accepted."""
    rejected: Rejected = field(default_factory=dict)
    too_long: int = 0
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """Nothing is trained on; the one line holds each of these."""

    make: Callable[[], Any]
    says: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)


Case = Counted | Refused


def written(name: str, content: bytes) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


def line_of(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def lines(*values: Any, name: str = "rows.jsonl") -> str:
    return written(name, b"\n".join(map(line_of, values)) + b"\n")


def row(value: Any, reason: str, **config: Any) -> Counted:
    """A broken line between two good ones."""
    good = GOOD_TOKENS if config.get("format") == "tokenized" else GOOD
    return Counted(lambda: lines(good, value, good), [1, 3], {2: reason}, config=config)


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def calling(call: Any, **more: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "tool_calls": [call], **more})


def table(content: bytes, good: list[int], rejected: Rejected, **config: Any) -> Counted:
    return Counted(lambda: written("rows.csv", b"prompt,completion\n" + content), good, rejected, config=config)


def csv_row(content: bytes, reason: str) -> Counted:
    """A broken row of a table between two good ones; it spans one line."""
    return table(GOOD_CSV + content + b"\n" + GOOD_CSV, [2, 4], {3: reason})


def file(name: str, content: bytes, *says: str, **config: Any) -> Refused:
    return Refused(lambda: written(name, content), (name, *says), config=config)


def file_rows(name: str, content: bytes, good: list[int], rejected: Rejected, **config: Any) -> Counted:
    return Counted(lambda: written(name, content), good, rejected, config=config)


def parquet_bytes(rows: Any) -> bytes:
    data = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    out = io.BytesIO()
    pyarrow.parquet.write_table(data, out)
    return out.getvalue()


def parquet(rows: list[dict[str, Any]] | pyarrow.Table, good: list[int], rejected: Rejected) -> Counted:
    return Counted(lambda: written("rows.parquet", parquet_bytes(rows)), good, rejected)


def tokenized(reason: str, **columns: Any) -> Counted:
    return row(columns, reason, format="tokenized")


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


SYNTAX: dict[str, Case] = {
    "truncated JSON": row(GOOD_LINE[:-9], "not valid JSON"),
    "two objects on one line": row(GOOD_LINE + GOOD_LINE, "not valid JSON: Extra data"),
    "a trailing comma": row(b'{"messages": [],}', "not valid JSON"),
    "single quotes": row(b"{'messages': []}", "not valid JSON"),
    "a comment": row(b'{"messages": [] /* none */}', "not valid JSON"),
    "plain prose": row("从前有座山。".encode(), "not valid JSON"),
    "invalid UTF-8": row(b'{"messages": "\xff"}', "not valid UTF-8 at byte 15"),
    "a surrogate written as UTF-8": row(b'{"text": "\xed\xa0\x80"}', "not valid UTF-8"),
    "a UTF-16 line": row('{"messages": 1}'.encode("utf-16-le"), "not valid JSON"),
    "a line that is a list": row([USER, ANSWER], "must be a JSON object, not a list"),
    "a line that is a string": row(b'"text"', "not a string"),
    "a line that is a number": row(b"3.5", "not a number"),
    "a line that is true": row(b"true", "not true or false"),
    "a line that is null": row(b"null", "not null"),
    "NaN": row(b'{"messages": NaN}', "NaN is not a JSON value"),
    "Infinity": row(b'{"messages": [{"role": "user", "content": Infinity}]}', "Infinity is not a JSON value"),
    "minus infinity": row(b'{"messages": -Infinity}', "-Infinity is not a JSON value"),
    "1e999": row(b'{"messages": 1e999}', "the number 1e999 is too large"),
    "an integer of 5000 digits": row(b'{"messages": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    "a token id of 4000 digits": row(b'{"input_ids": [1, ' + b"9" * 4000 + b'], "labels": [1, 2]}', "vocabulary"),
    "a lone surrogate in a value": row(b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "a lone surrogate in a message": row(chat(USER, ANSWER | {"content": "x\udfff"}), "half of a surrogate pair"),
    "a lone surrogate in a key": row(b'{"\\udfff": 1}', "half of a surrogate pair"),
    "surrogates the wrong way round": row(b'{"text": "\\ude00\\ud83d"}', "half of a surrogate pair"),
    "a lone surrogate in messages as JSON text": row(
        {"messages": json.dumps([USER, {"role": "assistant", "content": "\ud800"}])}, "surrogate"
    ),
    "a lone surrogate in tools as JSON text": row(GOOD | {"tools": '[{"name": "\\ud800"}]'}, "surrogate"),
    "a lone surrogate in a function call as JSON text": row(
        {"conversations": [{"from": "function_call", "value": '{"name": "\\ud800", "arguments": {}}'}]}, "surrogate"
    ),
    "a lone surrogate in history as JSON text": row(
        {"instruction": "x", "output": "y", "history": '[["\\ud800", "b"]]'}, "surrogate"
    ),
    "a lone surrogate in a table's cell": Counted(
        lambda: written("rows.csv", b'conversations\n"[{""from"": ""gpt"", ""value"": ""\\ud800""}]"\n' + CELL),
        [3],
        {2: "surrogate"},
    ),
    "a key twice in the row": row(b'{"text": "a", "text": "b"}', "'text' appears twice"),
    "a key twice in a message": row(b'{"messages": [{"role": "user", "role": "tool"}]}', "'role' appears twice"),
    "deep nesting": row(b'{"messages": ' + deep(50_000) + b"}", "not readable as JSON"),
    "deep nesting in a JSON text": row({"messages": deep(100_000).decode()}, "not valid JSON"),
    "control characters": row(b'{"text": "a\x00\x1b\x07b"}', "not valid JSON"),
    "NUL bytes between rows": row(b"\x00" * 100, "not valid JSON"),
    "a line of 10 MB": row(b'{"text": "' + b"y" * TEN_MB + b'"}', "bytes long; a row may have 8,388,608"),
}
CELL = b'"[{""from"": ""gpt"", ""value"": ""fine""}]"\n'

CONVERSATIONS: dict[str, Case] = {
    "no key": row({}, "unknown format: keys none"),
    "unknown keys": row({"question": "a", "answer": "b"}, "unknown format: keys 'question', 'answer'"),
    "messages a text that is no JSON": row({"messages": "Hi"}, "'messages' is a text, but not valid JSON"),
    "messages an empty text": row({"messages": ""}, "'messages' must be a list"),
    "messages an object": row({"messages": USER}, "'messages' must be a list"),
    "messages a number": row({"messages": 3}, "'messages' must be a list"),
    "messages null": row({"messages": None}, "'messages' must be a list with at least one message, not null"),
    "messages an empty list": row({"messages": []}, "'messages' must be a list with at least one message"),
    "nested messages": row(chat(GOOD), "message 1: the key 'role' is missing"),
    "messages inside messages": row({"messages": GOOD}, "not an object"),
    "a message that is a list": row(chat(USER, [ANSWER]), "message 2 must be an object, not a list"),
    "a message that is a string": row(chat("Hi", ANSWER), "message 1 must be an object, not a string"),
    "a message that is null": row(chat(None, ANSWER), "message 1 must be an object, not null"),
    "an unknown role": row(chat({"role": "human", "content": "x"}, ANSWER), "role 'human' is none of system, user"),
    "a role in capitals": row(chat({"role": "User", "content": "x"}, ANSWER), "Did you mean 'user'?"),
    "a role that is a list": row(chat({"role": ["user"], "content": "x"}, ANSWER), "message 1: role"),
    "a role that is a number": row(chat({"role": 1, "content": "x"}, ANSWER), "message 1: role '1'"),
    "a role that is null": row(chat({"role": None, "content": "x"}, ANSWER), "message 1: the key 'role' is missing"),
    "a role of two lines": row(chat({"role": "us\ner", "content": "x"}, ANSWER), "message 1: role 'us"),
    "a role of a megabyte": row(chat({"role": "user" * 2**18, "content": "x"}, ANSWER), "message 1: role"),
    "a missing role": row(chat({"content": "x"}, ANSWER), "message 1: the key 'role' is missing"),
    "content a number": row(chat(USER | {"content": 3}, ANSWER), "'content' must be a string or a list of text parts"),
    "content an object": row(chat(USER | {"content": {"text": "x"}}, ANSWER), "not an object"),
    "content true": row(chat(USER | {"content": True}, ANSWER), "not true or false"),
    "content null": row(chat(USER | {"content": None}, ANSWER), "message 1: 'content' must be a string"),
    "content missing": row(chat({"role": "user"}, ANSWER), "message 1: 'content' must be a string"),
    "an image part": row(chat(USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), "not image_url"),
    "an audio part with text": row(chat(USER | {"content": [{"type": "audio", "text": "x"}]}, ANSWER), "type 'text'"),
    "a text part that is a number": row(chat(USER | {"content": [{"type": "text", "text": 3}]}, ANSWER), "type 'text'"),
    "an answer of null": row(chat(USER, {"role": "assistant", "content": None}), "message 2: 'content'"),
    "an empty answer": row(
        chat(USER, {"role": "assistant", "content": ""}), "message 2: the assistant message is empty"
    ),
    "a blank answer": row(
        chat(USER, {"role": "assistant", "content": "　\n"}), "message 2: the assistant message is empty"
    ),
    "no answer": row(chat(USER), "no assistant message"),
    "only a system message": row(chat({"role": "system", "content": "x"}), "no assistant message"),
    "tool_calls an object": row(chat(USER, ANSWER | {"tool_calls": CALL}), "'tool_calls' must be a list"),
    "tool_calls a string": row(chat(USER, ANSWER | {"tool_calls": "add"}), "'tool_calls' must be a list"),
    "tool_calls of the user": row(
        chat(USER | {"tool_calls": [CALL]}, ANSWER), "only an assistant message may have them"
    ),
    "a tool call that is a string": row(calling("add"), "a tool call must have a 'name'"),
    "a tool call without a name": row(calling({"function": {"arguments": {}}}), "a tool call must have a 'name'"),
    "a tool call whose name is a number": row(calling({"name": 1, "arguments": {}}), "a tool call must have a 'name'"),
    "a tool call whose function is a list": row(calling({"function": ["add"]}), "a tool call must have a 'name'"),
    "arguments a list": row(calling({"name": "a", "arguments": [1]}), "'arguments' must be an object"),
    "arguments null": row(calling({"name": "a", "arguments": None}), "'arguments' must be an object"),
    "arguments missing": row(calling({"name": "a"}), "'arguments' must be an object"),
    "arguments a text that is no JSON": row(calling({"name": "a", "arguments": "{"}), "'arguments' must be an object"),
    "arguments JSON text of a list": row(calling({"name": "a", "arguments": "[1]"}), "'arguments' must be an object"),
    "reasoning_content a number": row(chat(USER, ANSWER | {"reasoning_content": 3}), "must be a string, not a number"),
    "reasoning_content of the user": row(chat(USER | {"reasoning_content": "x"}, ANSWER), "only an assistant"),
    "only reasoning, and it is dropped": row(
        chat(USER, {"role": "assistant", "reasoning_content": "hm"}), "data.thinking=drop", thinking="drop"
    ),
    "tools a text that is no JSON": row(GOOD | {"tools": "add"}, "'tools' is a text, but not valid JSON"),
    "tools an object": row(GOOD | {"tools": {"name": "add"}}, "'tools' must be a list of objects"),
    "tools a list of names": row(GOOD | {"tools": ["add"]}, "'tools' must be a list of objects"),
    "tools a number": row(GOOD | {"tools": 3}, "'tools' must be a list of objects"),
}


def turns(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs], **more}


def alpaca(**columns: Any) -> dict[str, Any]:
    return {"instruction": "Add.", "input": "1 2", "output": "3"} | columns


OTHER_FORMATS: dict[str, Case] = {
    "sharegpt: a text": row({"conversations": "Hi"}, "'conversations' is a text, but not valid JSON"),
    "sharegpt: an empty list": row({"conversations": []}, "at least one turn"),
    "sharegpt: a turn that is a string": row({"conversations": ["Hi"]}, "turn 1 must be an object"),
    "sharegpt: an unknown speaker": row(turns(("alien", "x"), ("gpt", "y")), "turn 1: from 'alien' is none of"),
    "sharegpt: a speaker that is a list": row(turns((["human"], "x"), ("gpt", "y")), "turn 1: from"),
    "sharegpt: a value of null": row(turns(("human", None), ("gpt", "y")), "turn 1: 'value' must be a string"),
    "sharegpt: a value that is a number": row(turns(("human", 3), ("gpt", "y")), "turn 1: 'value' must be a string"),
    "sharegpt: a call that is no JSON": row(
        turns(("human", "x"), ("function_call", "add(1)")), "text, but not valid JSON"
    ),
    "sharegpt: a call without a name": row(turns(("human", "x"), ("function_call", "{}")), "must have a 'name'"),
    "sharegpt: an empty call": row(turns(("human", "x"), ("function_call", " ")), "must have a 'name'"),
    "sharegpt: no call in the list": row(turns(("human", "x"), ("function_call", "[]")), "is empty"),
    "sharegpt: nobody answers": row(turns(("human", "x")), "no assistant message"),
    "sharegpt: a system that is a list": row(turns(("human", "x"), ("gpt", "y"), system=["z"]), "'system' must be"),
    "alpaca: an output of null": row(alpaca(output=None), "'output' must be a string, not null"),
    "alpaca: an empty output": row(alpaca(output=""), "the assistant message is empty"),
    "alpaca: an instruction that is a list": row(alpaca(instruction=["Add."]), "'instruction' must be a string"),
    "alpaca: an input that is an object": row(alpaca(input={"a": 1}), "'input' must be a string"),
    "alpaca: nothing is asked": row(alpaca(instruction="", input=" "), "'instruction' and 'input' are both empty"),
    "alpaca: a history of strings": row(alpaca(history=["a", "b"]), "'history' must be a list of [question, answer]"),
    "alpaca: a history of triples": row(alpaca(history=[["a", "b", "c"]]), "'history' must be a list of"),
    "alpaca: a history with null": row(alpaca(history=[["a", None]]), "'history' must be a list of"),
    "alpaca: a history that is no JSON": row(alpaca(history="a, b"), "'history' is a text, but not valid JSON"),
    "prompt: a number": row({"prompt": 1, "completion": "b"}, "'prompt' must be a text or a list of messages"),
    "prompt: an empty list": row({"prompt": [], "completion": "b"}, "'prompt' must be a text or a list of messages"),
    "prompt: null": row({"prompt": None, "completion": "b"}, "'prompt' must be a text or a list of messages"),
    "completion: an object": row({"prompt": "a", "completion": ANSWER}, "'completion' must be a text or a list"),
    "completion: null": row({"prompt": "a", "completion": None}, "must be a text or a list of messages, not null"),
    "completion: empty": row({"prompt": "a", "completion": ""}, "the assistant message is empty"),
    "completion: the user's": row({"prompt": [USER], "completion": [USER]}, "no assistant message"),
    "text: null": row({"text": None}, "'text' must be a string, not null"),
    "text: empty": row({"text": ""}, "the text is empty"),
    "text: only spaces": row({"text": " 　\n\t"}, "the text is empty"),
    "text: a number": row({"text": 3}, "'text' must be a string, not a number"),
    "text: a list": row({"text": ["a"]}, "'text' must be a string, not a list"),
    "another format than the one set": row({"text": "a"}, "data.format=messages needs 'messages'", format="messages"),
    "messages where tokens are set": row(GOOD, "data.format=tokenized needs 'input_ids'", format="tokenized"),
    "tokens: a text that is no JSON": tokenized("not valid JSON", input_ids="1 2", labels=[1, 2]),
    "tokens: an object": tokenized("list of whole numbers", input_ids={"a": 1}, labels=[1, 2]),
    "tokens: negative": tokenized("token id -2 is not within", input_ids=[1, -2], labels=[1, -2]),
    "tokens: beyond the vocabulary": tokenized("token id 700 is not within", input_ids=[1, 700], labels=[1, 700]),
    "tokens: 2 to the 70": tokenized("is not within the vocabulary", input_ids=[1, 2**70], labels=[1, 2]),
    "tokens: fractions": tokenized("list of whole numbers", input_ids=[1, 2.0], labels=[1, 2]),
    "tokens: true": tokenized("list of whole numbers", input_ids=[1, True], labels=[1, 1]),
    "tokens: nested": tokenized("list of whole numbers", input_ids=[[1, 2]], labels=[[1, 2]]),
    "tokens: one": tokenized("so it needs at least 2", input_ids=[1], labels=[1]),
    "tokens: none": tokenized("'input_ids'", input_ids=[], labels=[]),
    "tokens: null": tokenized("'input_ids' must be a list", input_ids=None, labels=[1, 2]),
    "labels: too few": tokenized("as long as 'input_ids' (2)", input_ids=[1, 2], labels=[1]),
    "labels: null": tokenized("without 'labels' or 'loss_mask'", input_ids=[1, 2], labels=None),
    "labels: missing": tokenized("data.loss_on=all to supervise every token", input_ids=[1, 2]),
    "labels: another id": tokenized("neither the token 2 nor -100", input_ids=[1, 2], labels=[1, 3]),
    "labels: a string": tokenized("at position 1", input_ids=[1, 2], labels=[1, "2"]),
    "labels: a string of two lines": tokenized("at position 1", input_ids=[1, 2], labels=[1, "a\nb"]),
    "labels: all ignored": tokenized("nothing in it is supervised", input_ids=[1, 2], labels=[-100, -100]),
    "labels: only the first supervised": tokenized("nothing in it is supervised", input_ids=[1, 2], labels=[1, -100]),
    "mask: too long": tokenized("as long as 'input_ids' (2)", input_ids=[1, 2], loss_mask=[0, 1, 1]),
    "mask: a number": tokenized("as long as 'input_ids' (2)", input_ids=[1, 2], loss_mask=1),
    "mask: 2": tokenized("only 0 and 1", input_ids=[1, 2], loss_mask=[0, 2]),
    "mask: fractions": tokenized("only 0 and 1", input_ids=[1, 2], loss_mask=[0, 1.0]),
    "mask: true": tokenized("only 0 and 1", input_ids=[1, 2], loss_mask=[False, True]),
    "mask and labels": tokenized("keep one", input_ids=[1, 2], labels=[1, 2], loss_mask=[0, 1]),
}

TABLES: dict[str, Case] = {
    "csv: invalid UTF-8": csv_row(b"Hi,\xff", "not valid UTF-8 at byte 4"),
    "csv: too many cells": csv_row(b"Hi,there,you", "3 cells, but the first row names 2 columns"),
    "csv: too few cells": csv_row(b"Hi", "1 cells, but the first row names 2 columns"),
    "csv: a quote never closed": csv_row(b'Hi,"there', "not valid CSV"),
    "csv: text after a closing quote": csv_row(b'Hi,"the"re', "not valid CSV"),
    "csv: an empty answer": csv_row(b"Hi,", "the assistant message is empty"),
    "csv: a cell of 10 MB": csv_row(b"Hi," + b"y" * TEN_MB, "bytes long; a row may have 8,388,608"),
    "csv: a quoted cell of many lines, 2 MB": table(
        GOOD_CSV + b'Hi,"' + (b"y" * 2**20 + b"\n") * 2 + b'"\n' + GOOD_CSV,
        [2, 6],
        {3: "not valid CSV", 4: "1 cells", 5: "not valid CSV"},
    ),
    "csv: a quote in the middle is a letter": table(b'Hi "you",the"re\n' + GOOD_CSV, [2, 3], {}),
    "csv: a NUL byte is a letter": table(b"Hi,th\0ere\n" + GOOD_CSV, [2, 3], {}),
    "csv: blank lines": table(b"\n\r\n" + GOOD_CSV + b"  \n" + GOOD_CSV, [4, 6], {}),
    "csv: a byte order mark": file_rows("rows.csv", b'\xef\xbb\xbf"prompt",completion\nHi,there\n', [2], {}),
    "csv: only a first row": file("rows.csv", b"prompt,completion\n", "has no rows"),
    "csv: no first row": file("rows.csv", b"Hi,there\n" * 2, "rows.csv:2", "unknown format: keys 'Hi', 'there'"),
    "csv: a column twice": file("rows.csv", b"prompt,prompt\na,b\n", "must name the columns, each once"),
    "csv: a column without a name": file_rows("rows.csv", b",prompt,completion\n0,a,b\n", [2], {}),
    "csv: two columns of one name": file("rows.csv", b"prompt,prompt,\na,b,\n", "must name the columns"),
    "csv: the wrong columns": file("rows.csv", b"a,b\n1,2\n", "rows.csv:2", "unknown format: keys 'a', 'b'"),
    "csv: semicolons": file("rows.csv", b"prompt;completion\na;b\n", "rows.csv", "separated by ';'"),
    "csv: UTF-16": file("rows.csv", "prompt,completion\na,b\n".encode("utf-16"), "must name the columns"),
    "csv: a first row that is not UTF-8": file("rows.csv", b"prompt,completion\xff\na,b\n", "must name the columns"),
    "csv: a first row of 10 MB": file("rows.csv", b"x" * TEN_MB + b"\na\n", "must name the columns"),
    "csv: lines that end in returns": file("rows.csv", b"prompt,completion\ra,b\rc,d\r", "must name the columns"),
    "csv: a JSON cell that is none": file_rows(
        "rows.csv",
        b'messages\n[oops\n"[{""role"": ""assistant"", ""content"": ""fine""}]"\n',
        [3],
        {2: "'messages' is a text, but not valid JSON"},
    ),
    "parquet: messages null": parquet([GOOD, {"messages": None}, GOOD], [1, 3], {2: "'messages' must be a list"}),
    "parquet: messages that are bytes": parquet(
        [{"messages": b"\xff"}, {"messages": line_of(GOOD["messages"])}], [], {1: "'messages'", 2: "'messages'"}
    ),
    "parquet: a null inside a message": parquet(
        [GOOD, chat({"role": None, "content": None}, ANSWER)], [1], {2: "message 1: the key 'role' is missing"}
    ),
    "parquet: a bad row among 2500": parquet(
        [{"text": "" if i == 1700 else f"text {i}"} for i in range(2500)],
        [i for i in range(1, 2501) if i != 1701],
        {1701: "the text is empty"},
    ),
    "parquet: fractions as tokens": parquet(
        [{"input_ids": [1.0, 2.0], "labels": [1, 2]}, {"input_ids": [1.0, None], "labels": [1, 2]}],
        [],
        {1: "whole numbers", 2: "whole numbers"},
    ),
    "parquet: a date in a tool call": parquet(
        [calling({"name": "f", "arguments": {"when": datetime.datetime(2020, 1, 1)}}), calling(CALL, content="")],
        [2],
        {1: ""},
    ),
    "parquet: bytes in a tool definition": parquet([GOOD | {"tools": [{"name": b"\xff"}]}, GOOD], [2], {1: ""}),
    "parquet: the wrong columns": file("a.parquet", parquet_bytes([{"a": 1}]), "a.parquet:1", "unknown format"),
    "parquet: no rows": file("a.parquet", parquet_bytes(pyarrow.table({"text": []})), "has no rows"),
    "parquet: an empty file": file("a.parquet", b"", "not a complete Parquet file"),
    "parquet: the end cut off": file("a.parquet", parquet_bytes([GOOD])[:-20], "not a complete Parquet file"),
    "parquet: garbage": file("a.parquet", random.Random(0).randbytes(999), "not a complete Parquet file"),
    "parquet: garbage between the marks": file(
        "a.parquet", b"PAR1" + b"\x9c" * 99 + b"PAR1", "not a complete Parquet file"
    ),
    "parquet: a cell that is not UTF-8": file_rows(
        "a.parquet", parquet_bytes(pyarrow.table({"text": NOT_ALL_UTF8})), [1, 3], {2: "a cell cannot be read"}
    ),
    "parquet: a date that Python has not, in a column nobody reads": file_rows(
        "a.parquet",
        parquet_bytes(pyarrow.table({"text": ["ab"], "date": pyarrow.array([2**31 - 1], pyarrow.date32())})),
        [1],
        {},
    ),
    "parquet: another kind of file": file("a.parquet", GOOD_LINE, "not a complete Parquet file"),
}


def damaged_gzip(content: bytes, at: int) -> bytes:
    raw = bytearray(gzip.compress(content))
    raw[at] ^= 0xFF
    return bytes(raw)


GOOD_LINES = (GOOD_LINE + b"\n") * 30
BOM = b"\xef\xbb\xbf"
LONG_TOKENS = {"input_ids": [1, 2] * 20_000, "loss_mask": [0, 1] * 20_000}

FILES: dict[str, Case] = {
    "an empty .jsonl": file("rows.jsonl", b"", "has no rows"),
    "an empty .json": file("rows.json", b"", "has no rows"),
    "an empty .csv": file("rows.csv", b"", "has no rows"),
    "an empty .txt": file("rows.txt", b"", "has no rows"),
    "blank lines in a .jsonl": file("rows.jsonl", b"\n \n\t\n", "has no rows"),
    "blank lines in a .json": file("rows.json", b"\n \n\t\n", "has no rows"),
    "blank lines in a .csv": file("rows.csv", b"\n \n\t\n", "has no rows"),
    "blank lines in a .txt": file("rows.txt", b"\n \n\t\n", "has no rows"),
    "only a byte order mark": file("rows.jsonl", BOM, "has no rows"),
    "an empty array": file("rows.json", b"[ ]", "has no rows"),
    "an empty .gz": file("rows.jsonl.gz", b"", "has no rows"),
    "byte order marks": Counted(lambda: lines(BOM + GOOD_LINE, BOM + GOOD_LINE), [1, 2]),
    "a byte order mark before an array": file_rows("a.json", BOM + b"[" + GOOD_LINE + b"]", [1], {}),
    "returns and blank lines": file_rows("a.jsonl", b"\n \n" + GOOD_LINE + b"\r\n\r\n" + GOOD_LINE, [3, 5], {}),
    "UTF-16 lines": file("a.jsonl", GOOD_LINE.decode().encode("utf-16") * 2, "a.jsonl:1", "not valid UTF-8"),
    "a UTF-16 array": file("a.json", json.dumps([GOOD]).encode("utf-16"), "a.json:1", "not valid UTF-8"),
    "UTF-16 text": file("a.txt", "从前有座山。".encode("utf-16"), "a.txt:1", "looks like UTF-16"),
    "text that is not UTF-8": file("a.txt", b"once \xff upon", "a.txt:1", "not valid UTF-8 at byte 6"),
    "text after a MiB of blank lines": file_rows("a.txt", b"\n" * 2**20 + b"once upon a time", [1], {}),
    "an array cut off": file_rows(
        "a.json", b"[" + GOOD_LINE + b"," + GOOD_LINE[:-5], [1], {2: "the JSON array is not valid from here on"}
    ),
    "an array without its bracket": file_rows("a.json", b"[" + GOOD_LINE, [1], {2: "',' or ']' expected"}),
    "an array without commas": file_rows(
        "a.json", b"[" + GOOD_LINE + b"," + GOOD_LINE + b" " + GOOD_LINE + b"]", [1, 2], {3: "',' or ']' expected"}
    ),
    "an array and text after it": file_rows("a.json", b"[" + GOOD_LINE + b"] more", [1], {2: "text after"}),
    "an array with invalid UTF-8": file_rows(
        "a.json", b"[" + GOOD_LINE + b', {"text": "\xff"}, ' + GOOD_LINE + b"]", [1, 3], {2: "not valid UTF-8"}
    ),
    "an array of anything": file_rows(
        "a.json",
        b'[NaN, {"text": NaN}, 3, null, [], "x", {"text": "\\ud800"}, ' + GOOD_LINE + b"]",
        [8],
        {1: "NaN", 2: "NaN", 3: "a number", 4: "null", 5: "a list", 6: "a string", 7: "surrogate"},
        max_bad_ratio=0.9,
    ),
    "an array with an integer of 5000 digits": file_rows(
        "a.json",
        b"[" + GOOD_LINE + b', {"text": ' + b"9" * 5000 + b"}, " + GOOD_LINE + b"]",
        [1, 3],
        {2: "not readable"},
    ),
    "an array with an element of 10 MB": file_rows(
        "a.json",
        b'[{"text": "' + b"y" * TEN_MB + b'"}, ' + GOOD_LINE + b"]",
        [2],
        {1: "bytes long; a row may have 8,388,608"},
    ),
    "one object over many lines": file_rows("a.json", json.dumps(GOOD, indent=1).encode(), [1], {}),
    "one object of 10 MB over many lines": file("a.json", b'{"text":\n"' + b"y" * TEN_MB + b'"}', "one JSON object"),
    "two objects over many lines": file("a.json", json.dumps(GOOD, indent=1).encode() * 2, "a.json:1", "Extra data"),
    "long lines in a .json": Counted(
        lambda: lines(LONG_TOKENS, GOOD, GOOD, name="a.json"), [1, 2, 3], config={"max_seq_len": 40_000}
    ),
    "a first line of 10 MB in a .json": file_rows(
        "a.json",
        b'{"input_ids": [' + b"1, " * (TEN_MB // 3) + b"1]}\n" + GOOD_LINE,
        [2],
        {1: "bytes long; a row may have 8,388,608"},
    ),
    "a .gz cut off": file("a.jsonl.gz", gzip.compress(GOOD_LINES)[:-12], "is damaged", "make it again"),
    "a .gz of nothing but garbage": file("a.jsonl.gz", random.Random(1).randbytes(999), "Not a gzipped file"),
    "a .gz that is plain JSON": file("a.jsonl.gz", GOOD_LINES, "Not a gzipped file"),
    "a .gz with a wrong checksum": file("a.jsonl.gz", damaged_gzip(GOOD_LINES, -6), "CRC check failed"),
    "a .gz damaged in the middle": file("a.jsonl.gz", damaged_gzip(GOOD_LINES, 40), "is damaged"),
    "a .gz with garbage behind": file("a.jsonl.gz", gzip.compress(GOOD_LINES) + b"garbage", "is damaged"),
    "a .gz of garbage": file("a.jsonl.gz", gzip.compress(b"\xff\xfe garbage"), "a.jsonl.gz:1", "not valid UTF-8"),
    "an array .gz cut off": file("a.json.gz", gzip.compress(b"[" + GOOD_LINE + b"]")[:-9], "is damaged"),
    "a table .gz cut off": file("a.csv.gz", gzip.compress(b"prompt,completion\n" + GOOD_CSV)[:-9], "is damaged"),
    "a text .gz cut off": file("a.txt.gz", gzip.compress(b"once upon a time")[:-9], "is damaged"),
    "an unknown ending": file("rows.xlsx", b"PK", "must end in .jsonl"),
    "no ending": file("rows", GOOD_LINE, "must end in .jsonl"),
    "a compressed table": file("rows.parquet.gz", b"", "must end in .jsonl"),
    "a name of two lines": Refused(lambda: lines(b"{", name="a\nb.jsonl"), ("b.jsonl", "not valid JSON")),
}


def linked(name: str, target: str) -> str:
    Path(name).symlink_to(target)
    return name


def made(name: str) -> str:
    Path(name).mkdir(parents=True)
    return name


def fifo(name: str) -> str:
    os.mkfifo(name)
    return name


def beside(path: str, *_: str) -> str:
    """Return the first of what was made."""
    return path


PLACES: dict[str, Case] = {
    "a missing file": Refused(
        lambda: beside("trian.jsonl", lines(GOOD, name="train.jsonl")),
        ("'trian.jsonl' does not exist", "Did you mean 'train.jsonl'?"),
    ),
    "a missing folder": Refused(lambda: "no/such/rows.jsonl", ("'no/such/rows.jsonl' does not exist",)),
    "a glob that matches nothing": Refused(lambda: "none*.jsonl", ("no file matches 'none*.jsonl'",)),
    "a glob that matches other files": Refused(
        lambda: beside("d/*", lines(GOOD, name="d/a.jsonl"), written("d/README.md", b"Hi")), ("d/README.md", ".jsonl")
    ),
    "an empty folder": Refused(lambda: made("folder"), ("'folder' has no .jsonl",)),
    "an empty folder named like a file": Refused(lambda: made("x.jsonl"), ("'x.jsonl' has no .jsonl",)),
    "a folder of folders": Refused(
        lambda: beside("d", lines(GOOD, name="d/deep/a.jsonl")), ("'d' has no .jsonl", "'d/**/*.jsonl'")
    ),
    "a folder of other files": Refused(lambda: beside("d", written("d/a.md", b"Hi")), ("'d' has no .jsonl",)),
    "a folder of mixed kinds": Refused(
        lambda: beside("d", lines(GOOD, name="d/a.jsonl"), written("d/README.txt", b"Hi")),
        ("has .jsonl and .txt",),
    ),
    "a folder with an empty file": Refused(
        lambda: beside("d", lines(GOOD, name="d/a.jsonl"), written("d/b.jsonl", b"")), ("d/b.jsonl' has no rows",)
    ),
    "a folder with a folder named like a file": Counted(
        lambda: beside("d", lines(GOOD, name="d/a.jsonl"), made("d/b.jsonl")), [1]
    ),
    "a link to itself": Refused(lambda: linked("loop.jsonl", "loop.jsonl"), ("loop.jsonl",)),
    "a link to nowhere": Refused(lambda: linked("broken.jsonl", "nowhere.jsonl"), ("broken.jsonl",)),
    "a link up the tree under **": Counted(
        lambda: beside("d/**/*.jsonl", lines(GOOD, GOOD, name="d/a.jsonl"), linked("d/up", "../d")), [1, 2]
    ),
    "a pipe": Refused(lambda: fifo("pipe.jsonl"), ("pipe.jsonl",)),
    "a pipe in a folder": Counted(lambda: beside("d", lines(GOOD, name="d/a.jsonl"), fifo("d/b.jsonl")), [1]),
    "a file many folders down": Refused(
        lambda: lines(b"{", name=f"{'deep/' * 40}rows.jsonl"), ("deep/rows.jsonl:1: not valid JSON",)
    ),
    "a device": Refused(lambda: "/dev/null", ("/dev/null",)),
    "a name too long": Refused(lambda: "x" * 300 + ".jsonl", ("xxx.jsonl",)),
    "the home of nobody": Refused(lambda: "~nobody-of-this-name/a.jsonl", ("~nobody-of-this-name",)),
    "the hub without a name": Refused(lambda: "hf:", ("hf:ORG/NAME",)),
}

GOOD_AND_LONG = [GOOD, chat(USER, ANSWER | {"content": "long " * 200}), GOOD]


def weighted(*weights: float | None) -> tuple[DataPart, ...]:
    return tuple(
        DataPart(path=lines(GOOD, name=f"{number}.jsonl"), weight=weight) for number, weight in enumerate(weights)
    )


SETTINGS: dict[str, Case] = {
    "a row too long": Counted(lambda: lines(*GOOD_AND_LONG), [1, 3], too_long=1, config={"max_seq_len": 64}),
    "a row too long where that is an error": Refused(
        lambda: lines(*GOOD_AND_LONG),
        ("rows.jsonl:2", "data.max_seq_len=64", "data.too_long=error"),
        config={"max_seq_len": 64, "too_long": "error"},
    ),
    "a question too long to leave an answer": Counted(
        lambda: lines(GOOD, chat(USER | {"content": "long " * 200}, ANSWER), GOOD),
        [1, 3],
        {2: "nothing in it is supervised within its first 64 tokens"},
        config={"max_seq_len": 64, "too_long": "truncate"},
    ),
    "all rows too long": Refused(
        lambda: lines(GOOD, GOOD), ("none of the 2 rows", "data.max_seq_len=4"), config={"max_seq_len": 4}
    ),
    "four of 100 bad": Refused(
        lambda: lines(*[GOOD] * 96, b"{", {}, b"[]", {"text": 3}),
        ("4 of 100 rows", "rows.jsonl:97", "rows.jsonl:98", "rows.jsonl:99", "data.max_bad_ratio=0.01"),
    ),
    "four of 20 bad and all named with long reasons": Refused(
        lambda: lines(*[GOOD] * 16, *[{f"{number} {'column' * 9}": 1 for number in range(9)}] * 4),
        ("4 of 20 rows", "rows.jsonl:17", "data.max_bad_ratio=0.01"),
    ),
    "a bad row where all is strict": Refused(
        lambda: lines(GOOD, b"{", b"}"), ("rows.jsonl:2: not valid JSON", "data.strict=true"), config={"strict": True}
    ),
    "no usable row": Refused(lambda: lines(b"{", b"["), ("none of the 2 rows", "rows.jsonl:1", "rows.jsonl:2")),
    "nothing set": Refused(lambda: None, ("data.path is not set",)),
    "weights for some": Refused(lambda: weighted(1.0, None), ("all parts a weight, or no part",)),
    "a weight too small": Refused(lambda: weighted(1e9, 1.0), ("weight 1 of part 2", "none of an epoch's 2 samples")),
    "a part without rows": Refused(
        lambda: (*weighted(None), DataPart(path=written("none.jsonl", b""))), ("none.jsonl' has no rows",)
    ),
    "a fraction that leaves nothing": Refused(
        lambda: lines(GOOD), ("data.val_fraction=1e-09", "1 samples"), config={"val_fraction": 1e-9}
    ),
}

CASES: dict[str, Case] = {
    **SYNTAX,
    **CONVERSATIONS,
    **OTHER_FORMATS,
    **TABLES,
    **FILES,
    **PLACES,
    **SETTINGS,
}

TAGS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>")


def _tool_turn(name: str = "add", arguments: Any = None, definition: str = "add") -> dict[str, Any]:
    call = {"name": name, "arguments": {"a": 1} if arguments is None else arguments}
    return chat(
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        ANSWER,
        tools=[{"name": definition}],
    )


SPOKEN: dict[str, Callable[[str], dict[str, Any]]] = {
    "system": lambda text: chat({"role": "system", "content": text}, USER, ANSWER),
    "user": lambda text: chat(USER | {"content": text}, ANSWER),
    "assistant": lambda text: chat(USER, ANSWER | {"content": f"So {text}"}),
    "an earlier answer": lambda text: chat(USER, ANSWER | {"content": f"So {text}"}, USER, ANSWER),
    "reasoning": lambda text: chat(USER, ANSWER | {"reasoning_content": text}),
    "a text part": lambda text: chat(USER | {"content": [{"type": "text", "text": text}]}, ANSWER),
    "tool": lambda text: chat(USER, ANSWER | {"tool_calls": [CALL]}, {"role": "tool", "content": text}, ANSWER),
    "a tool's name": lambda text: _tool_turn(name=text),
    "arguments": lambda text: _tool_turn(arguments={"a": text}),
    "a key of the arguments": lambda text: _tool_turn(arguments={text: 1}),
    "arguments as JSON text": lambda text: _tool_turn(arguments=json.dumps({"a": text})),
    "a tool's definition": lambda text: _tool_turn(definition=text),
    "sharegpt": lambda text: turns(("human", text), ("gpt", f"So {text}")),
    "alpaca": lambda text: alpaca(instruction=text, output=f"So {text}", history=[[text, f"So {text}"]], system=text),
    "prompt and completion": lambda text: {"prompt": text, "completion": f"So {text}"},
    "plain text": lambda text: {"text": text},
}
"""A row by the place at which it holds the text."""
