"""Small files that expand to much: each builds a data file, or the chat template of a tokenizer."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MIB, GIB = 2**20, 2**30
ROW = 8 * MIB - 200
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = json.dumps({"messages": [USER, ANSWER]}).encode()


def packed(*parts: tuple[bytes, int]) -> Callable[[Path], None]:
    """A gzip file of parts, each repeated up to so many bytes; a part of 8 MiB or more is packed once."""

    def build(path: Path) -> None:
        with path.open("wb") as file:
            for part, size in parts:
                block = part * max(1, min(size, 8 * MIB) // len(part))
                member = gzip.compress(block, 6)
                for _ in range(max(1, size // len(block))):
                    file.write(member)

    return build


def sparse(start: bytes, size: int) -> Callable[[Path], None]:
    """A file that says it has so many bytes; behind `start` they are zeros."""

    def build(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return build


def line(row: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(row, ensure_ascii=False, separators=(",", ":")))


def text(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def parquet(columns: Callable[[], dict], **options: object) -> Callable[[Path], None]:
    options = {"compression": "zstd", "store_schema": False} | options
    return lambda path: pq.write_table(pa.table(columns()), path, **options)


def repeated(value: object, count: int) -> pa.Array:
    """One value in a dictionary, and so many places that point to it."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


def one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def saved(columns: Callable[[], dict], **options: object) -> Callable[[Path], None]:
    """A folder as `datasets.save_to_disk` writes it, with an Arrow file of our own."""

    def build(path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(path)
        (file,) = path.glob("*.arrow")
        table = pa.table(columns())
        with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
            stream.write_table(table)

    return build


def long_state(path: Path) -> None:
    saved(lambda: {"text": ["a"]})(path)
    sparse(b'{"_data_files": [', 2 * GIB)(path / "state.json")


def claims_rows(path: Path) -> None:
    """A Parquet file whose end claims more rows than it has."""
    pq.write_table(pa.table({"text": pa.nulls(30_000_000, pa.string())}), path, row_group_size=30_000_000)


def interlocked_quotes() -> bytes:
    """Each line opens a quote that the others never close; each would be parsed again from every line before it."""
    return b"a,b\n" + b'b","\n' * (MIB // 5 * 2)


DATA: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a line of 1 GiB": ("a.jsonl", sparse(b"{", GIB)),
    "a packed line of 2 GiB": ("a.jsonl.gz", packed((b"a", 2 * GIB))),
    "packed rows without end": ("a.jsonl.gz", packed((b"{}\n", 2 * GIB))),
    "one good row, then bad ones without end": ("a.jsonl.gz", packed((GOOD + b"\n", 1), (b"{}\n", 2 * GIB))),
    "packed blank lines": ("a.jsonl.gz", packed((b"\n", 2 * GIB))),
    "an array with an element of 2 GiB": ("a.json.gz", packed((b'["', 1), (b"a", 2 * GIB))),
    "an array of empty objects": ("a.json.gz", packed((b"[{}", 1), (b",{}", 2 * GIB))),
    "an array of lists in lists": ("a.json.gz", packed((b"[", 2 * GIB))),
    "an array and spaces": ("a.json.gz", packed((b"[" + GOOD, 1), (b" ", 2 * GIB))),
    "an object over many lines": ("a.json.gz", packed((b'{\n"text": [\n', 1), (b"1,\n", GIB))),
    "a row of empty objects": ("a.jsonl", line({"messages": [USER, ANSWER], "tools": [{}] * (ROW // 4)})),
    "a row of empty lists": ("a.jsonl", line({"messages": [[]] * (ROW // 4)})),
    "a row of lists in lists": (
        "a.jsonl",
        text(b'{"messages": [%b]}\n' % b",".join([b"[" * 200 + b"]" * 200] * (ROW // 402))),
    ),
    "an array of lists in lists on one line": (
        "a.jsonl",
        text(b"[{},%b]\n" % b",".join([b"[" * 200 + b"]" * 200] * (ROW // 402))),
    ),
    "a row of messages": ("a.jsonl", line({"messages": [USER, ANSWER] * (ROW // 80)})),
    "a message of 8 MiB": ("a.jsonl", line({"messages": [{**USER, "content": "a b c d " * (ROW // 8)}, ANSWER]})),
    "a word of 8 MiB": ("a.jsonl", line({"text": "a" * ROW})),
    "a CSV line of 1 GiB": ("a.csv", sparse(b"instruction,output\n3,", GIB)),
    "a packed CSV cell of 2 GiB": ("a.csv.gz", packed((b'instruction,output\n1,"', 1), (b"a\n", 2 * GIB))),
    "millions of columns": ("a.csv", text(b",".join([b"%d" % number for number in range(MIB)]) + b"\n1\n")),
    "interlocked quotes": ("a.csv", text(interlocked_quotes())),
    "a packed text of one word": ("a.txt.gz", packed((b"a", 2 * GIB))),
    "packed blank text": ("a.txt.gz", packed((b"a\n", 1), (b"\n", 2 * GIB))),
    "Parquet: a text of 1 MiB, 3,000 times": ("a.parquet", parquet(lambda: {"text": repeated("x" * MIB, 3000)})),
    "Parquet: the same as categories": (
        "a.parquet",
        parquet(lambda: {"text": repeated("x" * MIB, 3000)}, store_schema=True),
    ),
    "Parquet: a list of a text of 1 MiB": (
        "a.parquet",
        parquet(lambda: {"messages": one_list(repeated("x" * MIB, 300_000))}),
    ),
    "Parquet: a page of 512 MiB": (
        "a.parquet",
        parquet(lambda: {"text": ["y" * (GIB // 2)]}, use_dictionary=False, data_page_size=2 * GIB),
    ),
    "Parquet: a list of nulls": (
        "a.parquet",
        parquet(lambda: {"messages": one_list(pa.nulls(50_000_000, pa.int32()))}),
    ),
    "Parquet: a list of bits": (
        "a.parquet",
        parquet(lambda: {"input_ids": one_list(pa.array(np.zeros(50_000_000, bool)))}),
    ),
    "Parquet: rows of nulls": ("a.parquet", claims_rows),
    "Parquet: rows of unknown columns": (
        "a.parquet",
        parquet(lambda: {"question": repeated("a", 900_000)}, row_group_size=900_000),
    ),
    "Parquet: a wide table": ("a.parquet", parquet(lambda: {f"column {number}": [1] for number in range(100_000)})),
    "Arrow: a packed text of 512 MiB": ("saved", saved(lambda: {"text": ["z" * (GIB // 2)]}, compression="zstd")),
    "Arrow: a list of nulls": ("saved", saved(lambda: {"messages": one_list(pa.nulls(50_000_000))})),
    "Arrow: a text of 1 MiB, 3,000 times": ("saved", saved(lambda: {"text": repeated("x" * MIB, 3000)})),
    "Arrow: rows without a byte": ("saved", saved(lambda: {"text": pa.nulls(100_000_000)})),
    "Arrow: a state of 2 GiB": ("saved", long_state),
}

MARKED = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{%- generation %}"
    "{{ m.content ~ eos_token }}{%- endgeneration %}{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~"
    " '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
)
LOOP = "{%- for {name} in range(100000) %}"


def nested(depth: int, body: str) -> str:
    return "".join(LOOP.replace("{name}", f"i{level}") for level in range(depth)) + body + "{%- endfor %}" * depth


TEMPLATES = {
    "nested loops": nested(4, ""),
    "nested loops that write": nested(4, "xxxxxxxxxxxxxxxx"),
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a power of powers": "{%- set x = 9 ** (9 ** (9 ** 9)) %}",
    "growing numbers": "{%- set n = namespace(x=3) %}" + nested(1, "{%- set n.x = n.x * n.x %}"),
    "a long text": "{%- set x = 'a' * 10 ** 10 %}",
    "a long list": "{%- set x = [0] * 10 ** 9 %}",
    "a text that doubles": "{%- set n = namespace(x='a') %}" + nested(1, "{%- set n.x = n.x ~ n.x %}"),
    "a list that doubles": "{%- set n = namespace(x=[1]) %}" + nested(1, "{%- set n.x = n.x + n.x %}"),
    "a macro that calls itself": "{%- macro f() %}{{ f() }}{{ f() }}{%- endmacro %}{{ f() }}",
    "a huge range": "{{ range(10 ** 12) | list | length }}",
    "a filter that fills": "{{ 'a' | center(10 ** 10) }}",
    "a format that fills": "{{ '%10000000000d' | format(1) }}",
    "a replacement that grows": "{%- set x = 'a' * 1000000 %}{{ x | replace('a', x) | length }}",
    "an indent that grows": "{{ [[[1]]] | tojson(indent=10 ** 9) }}",
    "a text of many lines": "{{ ('a\n' * 1000000) | indent(100000) | length }}",
    "joined lists": "{{ range(99999) | join('a' * 1000000) | length }}",
    "a long template": "{# " + "a" * (4 * MIB) + " #}",
    "deep parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep blocks": "{%- if true %}" * 20_000 + "{%- endif %}" * 20_000,
}


def template_folder(folder: Path, template: str) -> None:
    """Save a tokenizer with the template."""
    from tests.real_tokenizer import small_tokenizer

    tokenizer = small_tokenizer("qwen3")
    tokenizer.chat_template, tokenizer.eos_token = template + MARKED, "<|im_end|>"
    tokenizer.save_pretrained(folder)


def all_names() -> Iterator[tuple[str, str]]:
    yield from (("data", name) for name in DATA)
    yield from (("template", name) for name in TEMPLATES)
