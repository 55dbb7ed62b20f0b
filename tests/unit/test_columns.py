"""`data.columns`: a file with columns of other names is read as the same file with its columns renamed."""

from pathlib import Path
from typing import Any

import pytest

from qwlit.core.errors import DataError
from qwlit.data.store import SampleStore
from qwlit.data.tokenizer import TextTokenizer
from tests.formats import KINDS, TALKS, Row, as_alpaca, as_prompt_completion, json_lines, tokenized
from tests.real_tokenizer import small_tokenizer
from tests.stores import build


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3"))


def renamed(rows: list[Row], columns: dict[str, str]) -> list[Row]:
    return [{columns.get(key, key): value for key, value in row.items()} for row in rows]


def content(store: SampleStore) -> Any:
    samples = [[array.tolist() for array in store.read([index])] for index in range(len(store))]
    return samples, store.row_counts, store.remarks


def write(folder: Path, rows: list[Row], kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "saved":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(folder / "rows")
        return folder / "rows"
    path = folder / f"rows.{kind}"
    path.write_bytes(KINDS[kind](rows))
    return path


ALPACA = {"instruction": "question", "input": "上下文", "output": "the answer?", "system": "role"}
SWAP = {"prompt": "completion", "completion": "prompt"}


@pytest.mark.parametrize("kind", [*KINDS, "saved"])
@pytest.mark.parametrize("columns", [ALPACA, SWAP], ids=["other names", "a swap"])
def test_columns_of_other_names_give_the_samples_of_a_renamed_file(
    kind: str, columns: dict[str, str], tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    rows = [{"id": n, **(as_alpaca if columns is ALPACA else as_prompt_completion)(t)} for n, t in enumerate(TALKS)]
    expected = build(write(tmp_path / "renamed", rows, kind), tokenizer)
    found = build(write(tmp_path / "own", renamed(rows, columns), kind), tokenizer, columns=columns)
    assert content(found) == content(expected)
    assert found.row_counts.accepted == len(TALKS) and found.remarks["a row key that is not read: 'id'"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("key", "row_format", "rows"),
    [
        ("text", "text", [{"text": f"Es war {n} mal."} for n in range(5)]),
        ("input_ids", "auto", [tokenized(n) for n in range(5)]),
    ],
)
def test_a_renamed_column_is_read_in_every_format(
    kind: str, key: str, row_format: str, rows: list[Row], tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    expected = build(write(tmp_path / "renamed", rows, kind), tokenizer, format=row_format)
    own = write(tmp_path / "own", renamed(rows, {key: "body"}), kind)
    assert content(build(own, tokenizer, format=row_format, columns={key: "body"})) == content(expected)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_whose_name_another_one_takes_is_not_read_and_named(
    kind: str, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    rows = [{"text": f"old {n}", "body": f"new {n}"} for n in range(3)]
    store = build(write(tmp_path, rows, kind), tokenizer, columns={"text": "body"})
    expected = build(write(tmp_path / "new", [{"text": row["body"]} for row in rows], kind), tokenizer)
    assert content(store)[:2] == content(expected)[:2]
    assert store.remarks == {"a row key that is not read: 'text'": 3}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["bodi", "x"])
def test_a_column_that_no_row_has_is_named_with_the_columns_that_are_there(
    kind: str, column: str, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    path = write(tmp_path, [{"id": n, "body": f"new {n}"} for n in range(30)], kind)
    hint = " Did you mean 'body'?" if column == "bodi" else ""
    with pytest.raises(DataError) as caught:
        build(path, tokenizer, columns={"text": column})
    assert str(caught.value) == (
        f"{path}: no row has the column '{column}', which data.columns reads as 'text';"
        f" columns here: 'body', 'id'.{hint} data.columns is for all files: rename the columns in this one"
    )


def test_a_row_without_the_column_is_quarantined_with_that_reason_and_an_optional_column_may_be_missing(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    pair = {"q": "1 + 1?", "a": "2"}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([pair, pair | {"role": "Be brief."}, {"q": "1 + 2?"}]))
    store = build(path, tokenizer, columns={"prompt": "q", "completion": "a", "system": "role"})
    assert (store.row_counts.accepted, store.row_counts.quarantined) == (2, 1)
    (bad,) = store.quarantine()
    assert bad["line"] == 3 and bad["reason"].endswith("; it has no 'a', which data.columns reads as 'completion'")


def test_plain_text_has_no_columns_to_rename(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "a.txt").write_text("Es war einmal.")
    with pytest.raises(DataError, match=r"a\.txt: no row has the column 'body'.*; columns here: none\."):
        build(tmp_path / "a.txt", tokenizer, columns={"text": "body"})


def test_the_fingerprint_changes_with_the_columns_and_not_with_their_order(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"prompt": "a", "completion": "b", "text": "c"}]))
    pairs = [("prompt", "text"), ("completion", "prompt")]
    maps: list[Any] = [None, dict(pairs), dict(reversed(pairs)), {"completion": "text"}]
    prints = [build(tmp_path / "a.jsonl", tokenizer, columns=columns).fingerprint for columns in maps]
    assert prints[1] == prints[2] and len(set(prints)) == 3
