"""The same bilingual conversations in every format and every kind of file."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]


@dataclass(frozen=True)
class Talk:
    """A conversation that every format can express."""

    pairs: tuple[tuple[str, str], ...]
    """Questions and answers."""
    system: str | None = None


CHINESE = ("{} 的下一个数，\n是什么？", "是{}。")
ENGLISH = ('What comes after "{}", please?', "{}, it is.")


def talks(number: int, *, turns: int = 1) -> list[Talk]:
    """Every other one in Chinese, every third with a system message, some with commas, quotes and line breaks."""
    made = []
    for i in range(number):
        asks, answers = CHINESE if i % 2 else ENGLISH
        pairs = tuple((f"{asks.format(i)} {turn}", answers.format(i + 1 + turn)) for turn in range(turns))
        made.append(Talk(pairs, None if i % 3 else "你是一个有用的助手。Be brief."))
    return made


def as_messages(talk: Talk) -> Row:
    messages = [{"role": "system", "content": talk.system}] if talk.system is not None else []
    for question, answer in talk.pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def as_sharegpt(talk: Talk) -> Row:
    turns = [
        {"from": speaker, "value": text}
        for pair in talk.pairs
        for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"conversations": turns, "system": talk.system}


def as_alpaca(talk: Talk) -> Row:
    *history, (question, answer) = talk.pairs
    instruction, _, text = question.partition("\n")
    columns = {"instruction": instruction, "input": text, "output": answer, "system": talk.system}
    return columns | ({"history": [list(pair) for pair in history]} if history else {})


def as_prompt_completion(talk: Talk) -> Row:
    """Two texts, or after several turns two lists of messages."""
    if len(talk.pairs) == 1:
        ((question, answer),) = talk.pairs
        return {"prompt": question, "completion": answer, "system": talk.system}
    *before, last = as_messages(talk)["messages"]
    return {"prompt": before, "completion": [last]}


FORMATS: dict[str, Callable[[Talk], Row]] = {
    "messages": as_messages,
    "sharegpt": as_sharegpt,
    "alpaca": as_alpaca,
    "prompt_completion": as_prompt_completion,
}


def json_lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_array(rows: Sequence[Row]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=2).encode()


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """A table of texts: what is no text becomes JSON text, what is missing an empty cell."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        writer.writerow({key: "" if row[key] is None else cell for key, cell in cells.items()})
    return out.getvalue().encode("utf-8", "surrogatepass")


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), out)
    return out.getvalue()


KINDS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "jsonl": json_lines,
    "jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "json": json_array,
    "json.gz": lambda rows: gzip.compress(json_array(rows)),
    "csv": csv_bytes,
    "csv.gz": lambda rows: gzip.compress(csv_bytes(rows)),
    "parquet": parquet_bytes,
}

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {"city": "string"}}}]


def with_tools(number: int) -> Row:
    """A question that takes a tool and some thought."""
    call = {"name": "weather", "arguments": {"city": ("北京", "Berlin")[number % 2]}}
    return {
        "messages": [
            {"role": "user", "content": f"明天 {number} 点的天气怎么样？"},
            {"role": "assistant", "content": None, "reasoning_content": "要查一下。", "tool_calls": [call]},
            {"role": "tool", "content": f"{number} °C, 晴"},
            {"role": "assistant", "reasoning_content": "Warm enough.", "content": f"晴，{number} 度。"},
        ],
        "tools": TOOLS,
    }


def tokenized(number: int) -> Row:
    ids = [(number * 7 + step) % 500 for step in range(12)]
    return {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}


NUM_ROWS = 24
BOOK = "第一章\n\n　　从前有座山，山上有座庙。\n\nChapter one: once upon a time there was a mountain.\n" * 40
TALKS = talks(NUM_ROWS)


@dataclass(frozen=True)
class Fixture:
    name: str
    content: bytes
    num_rows: int = NUM_ROWS
    words: tuple[str, ...] = ()
    """What else the command line needs."""

    def write(self, folder: Path) -> str:
        (folder / self.name).write_bytes(self.content)
        return f"data.path={self.name}"


def _texts(number: int) -> list[Row]:
    return [{"text": f"{BOOK[i : i + 90]} {i}"} for i in range(number)]


PRETRAIN = ("recipe=pretrain", "data.max_seq_len=64")
FIXTURES: dict[str, Fixture] = {
    fixture.name: fixture
    for fixture in (
        Fixture("messages.jsonl", json_lines([as_messages(talk) for talk in TALKS])),
        Fixture("messages.jsonl.gz", gzip.compress(json_lines([as_messages(talk) for talk in TALKS]))),
        Fixture("messages.json", json_array([as_messages(talk) for talk in TALKS])),
        Fixture("sharegpt.json", json_array([as_sharegpt(talk) for talk in TALKS])),
        Fixture("alpaca.csv", csv_bytes([as_alpaca(talk) for talk in TALKS])),
        Fixture("messages.csv", csv_bytes([with_tools(number) for number in range(NUM_ROWS)])),
        Fixture("prompt_completion.parquet", parquet_bytes([as_prompt_completion(talk) for talk in TALKS])),
        Fixture("tools_and_reasoning.jsonl", json_lines([with_tools(number) for number in range(NUM_ROWS)])),
        Fixture("tokenized.jsonl", json_lines([tokenized(number) for number in range(NUM_ROWS)])),
        Fixture("text.jsonl", json_lines(_texts(NUM_ROWS)), words=PRETRAIN),
        Fixture("book.txt", BOOK.encode(), num_rows=1, words=PRETRAIN),
    )
}
