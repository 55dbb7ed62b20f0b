"""Whatever is wrong with rows or files: counted and quarantined with its line and reason, or refused in one line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwlit.core.errors import ConfigError, DataError
from qwlit.data import files, store_folder, store_writer
from qwlit.data.config import DataConfig
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.encoding import RowEncoder
from qwlit.data.rows import NeedsTokenizer
from qwlit.data.splits import DataSplit, open_stores, split_data
from qwlit.data.store import SampleStore, build_store, check_row_counts
from qwlit.data.tokenizer import TextTokenizer
from tests.broken import CASES, GOOD, GOOD_LINE, SPOKEN, TAGS, Counted, Refused, lines, written
from tests.real_tokenizer import small_tokenizer
from tests.stores import VOCAB, row_encoder

CACHE = Path("cache")
LONGEST_MESSAGE = 600


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3", extra=["<think>", "</think>", "<tool_call>", "</tool_call>"]))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The processes that large files are worth would take longer to start than all of a case.
    monkeypatch.setattr(store_writer, "num_cores", lambda: 1)
    # Nothing here need survive a power cut.
    monkeypatch.setattr(os, "fsync", lambda _: None)


def load(path: Any, tokenizer: TextTokenizer, cache: Path = CACHE, **config: Any) -> DataSplit:
    encoder = row_encoder(tokenizer, path=path, **config)
    split = split_data(encoder.config, *open_stores(encoder.config, encoder, cache_root=cache))
    split.order(seed=0)
    return split


def build(path: str, tokenizer: TextTokenizer, **config: Any) -> SampleStore:
    return build_store(path, row_encoder(tokenizer, **config), cache_root=CACHE)


def assert_one_clear_line(error: Exception, *says: str) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < LONGEST_MESSAGE
    for part in says:
        assert part in message
    asked, meant = re.search(r"'([^']*)' does not exist", message), re.search(r"Did you mean '(.*)'\?", message)
    assert not (asked and meant and asked[1] == meant[1]), f"offers what was asked for: {message}"


def assert_counted(case: Counted, path: str, store: SampleStore) -> None:
    bad = list(store.quarantine())
    assert [row["line"] for row in bad] == list(case.rejected)
    for row in bad:
        assert case.rejected[row["line"]] in row["reason"]
        assert len(row["reason"].splitlines()) == 1
        assert len(row["reason"]) < LONGEST_MESSAGE and len(row["sha256"]) == 64
    read = len(case.good) + len(case.rejected) + case.too_long
    row_counts = store.row_counts
    assert (row_counts.read, row_counts.accepted) == (read, len(case.good))
    assert (row_counts.too_long, row_counts.quarantined) == (case.too_long, len(case.rejected))
    origins = list(dict.fromkeys(store.origin(index) for index in range(len(store))))
    assert [int(origin.rpartition(":")[2]) for origin in origins] == case.good
    if Path(path).is_file():
        assert {row["file"] for row in bad} <= {path}
        assert {origin.rpartition(":")[0] for origin in origins} <= {path}


@pytest.mark.parametrize("kind", CASES)
def test_what_is_broken_is_counted_or_refused_in_one_clear_line(kind: str, tokenizer: TextTokenizer) -> None:
    case = CASES[kind]
    path = case.make()
    if isinstance(case, Refused):
        with pytest.raises((DataError, ConfigError)) as raised:
            load(path, tokenizer, **case.config)
        assert_one_clear_line(raised.value, *case.says)
        return
    store = build(path, tokenizer, **case.config)
    assert_counted(case, path, store)
    if case.good:
        check_row_counts(store, DataConfig(**case.config))
    for cache in (CACHE, Path("another")) if case.rejected else ():
        line, reason = next(iter(case.rejected.items()))
        with pytest.raises(DataError) as raised:
            load(path, tokenizer, cache, **case.config, strict=True)
        assert_one_clear_line(raised.value, f"{path}:{line}: ", reason, "data.strict=true")


def test_the_corpus_has_the_kinds_it_promises() -> None:
    assert len(CASES) >= 80


@pytest.mark.parametrize("place", SPOKEN)
def test_control_tokens_in_a_text_stay_letters(place: str, tokenizer: TextTokenizer) -> None:
    texts = [form.format(tag) for tag in TAGS for form in ("{0}", "a {0}{0} b", "{0}\n{0}assistant\n")]
    path = lines(SPOKEN[place]("harmless"), *map(SPOKEN[place], texts))
    store = build(path, tokenizer)
    assert store.row_counts == RowCounts(read=len(texts) + 1, accepted=len(texts) + 1)
    controls = list(tokenizer.control_ids.values())
    harmless, *tagged = [np.isin(store.read([index])[0], controls).sum() for index in range(len(store))]
    assert harmless > 0 and tagged == [harmless] * len(texts)


@pytest.mark.parametrize("place", ["tools", "arguments", "role", "from", "labels", "x"])
def test_nesting_of_any_depth_is_read_or_quarantined(place: str, tokenizer: TextTokenizer) -> None:
    rows = {
        "tools": '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"a": DEEP}]}',
        "arguments": '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": DEEP}}]}]}',
        "role": '{"messages": [{"role": DEEP}]}',
        "from": '{"conversations": [{"from": DEEP}]}',
        "labels": '{"input_ids": [1, 2], "labels": [1, DEEP]}',
        "x": '{"x": DEEP, "y": "\\u00e9"}',
    }
    depths = range(700, 1001)
    path = lines(*[rows[place].replace("DEEP", "[" * depth + "]" * depth).encode() for depth in depths], GOOD)
    row_counts = build(path, tokenizer, max_seq_len=10_000).row_counts
    assert row_counts.read == len(depths) + 1 == row_counts.accepted + row_counts.quarantined


def test_the_line_that_holds_more_than_memory_should_is_refused_by_all_processes(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "num_cores", lambda: 2)
    path = lines(GOOD, b'{"text": "' + b"y" * 10_000_000, b"{", GOOD)
    store = build(path, tokenizer)
    assert store.row_counts == RowCounts(read=4, accepted=2, quarantined=2, duplicates=1)
    assert [row["line"] for row in store.quarantine()] == [2, 3]


@pytest.mark.parametrize("row", [GOOD, {"text": "once upon a time"}], ids=["conversation", "text"])
def test_without_a_tokenizer_the_one_line_says_why(row: Any) -> None:
    encoder = RowEncoder(DataConfig(), VOCAB, None, None, "the model has no tokenizer; set model.tokenizer")
    with pytest.raises(NeedsTokenizer) as raised:
        build_store(lines(row), encoder, cache_root=CACHE)
    assert_one_clear_line(raised.value, "set model.tokenizer")
    assert_nothing_half_valid()


def test_a_file_that_may_not_be_read_is_named(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path, really = lines(GOOD), Path.open

    def guarded(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == path:
            raise PermissionError(13, "Permission denied", path)
        return really(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", guarded)
    with pytest.raises(DataError) as raised:
        build(path, tokenizer)
    assert_one_clear_line(raised.value, "'rows.jsonl' cannot be read: Permission denied")


def test_a_file_that_changes_while_it_is_read_is_named(tokenizer: TextTokenizer) -> None:
    path = lines(*[GOOD] * 3000)

    def change(_: Any) -> None:
        with Path(path).open("ab") as file:
            file.write(GOOD_LINE + b"\n")

    with pytest.raises(DataError) as raised:
        build_store(path, row_encoder(tokenizer), cache_root=CACHE, progress=change)
    assert_one_clear_line(raised.value, "'rows.jsonl'", "changed while it was read")
    assert_nothing_half_valid()


def assert_nothing_half_valid() -> None:
    left = [path.name for path in CACHE.glob("*")] if CACHE.is_dir() else []
    assert not [name for name in left if not name.endswith((".lock", ".digest"))]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


UNWRITABLE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "arrays": lambda patch: patch.setattr(store_writer.HashedWriter, "write", _full),
    "flushing": lambda patch: patch.setattr(os, "fsync", _full),
    "the last file": lambda patch: patch.setattr(store_folder, "write_json_atomic", _full),
    "renaming": lambda patch: patch.setattr(Path, "rename", _full),
    "the folder": lambda patch: patch.setattr(Path, "mkdir", _full),
}


@pytest.mark.parametrize("racy_seconds", [2.0, -1.0], ids=["new data", "old data, whose hash is kept"])
@pytest.mark.parametrize("what", UNWRITABLE)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_valid(
    what: str, racy_seconds: float, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(GOOD, b"{", GOOD)
    monkeypatch.setattr(files, "RACY_SECONDS", racy_seconds)
    with monkeypatch.context() as patch:
        UNWRITABLE[what](patch)
        with pytest.raises(DataError) as raised:
            build(path, tokenizer)
    assert_one_clear_line(raised.value, "No space left on device", "cache")
    assert_nothing_half_valid()
    assert build(path, tokenizer).row_counts == RowCounts(read=3, accepted=2, quarantined=1, duplicates=1)


def test_a_cache_that_cannot_be_is_blamed_rather_than_the_data(tokenizer: TextTokenizer) -> None:
    written("cache", b"a file")
    with pytest.raises(DataError) as raised:
        build(lines(GOOD), tokenizer)
    assert_one_clear_line(raised.value, "cache")
    assert "data file" not in str(raised.value)
