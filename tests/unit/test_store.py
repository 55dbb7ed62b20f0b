import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwlit.core.errors import DataError
from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.rows import NeedsTokenizer, parse_conversation
from qwlit.data.store import SampleStore, build_store, split_store
from qwlit.data.store_writer import Account
from tests.real_tokenizer import small_tokenizer
from tests.stores import VOCAB, build, messages, tokens, write


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(small_tokenizer("qwen3"))


def test_samples_come_back_with_mask_counts_and_origin(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "rows.jsonl", [messages("One."), b"", tokens(5), messages("Two, 二.")])
    store = build(path, encoder)
    assert len(store) == 3
    for index, row in ((0, messages("One.")), (2, messages("Two, 二."))):
        expected = encoder.encode(parse_conversation(row))
        input_ids, mask = store.sample(index)
        assert (input_ids.tolist(), mask.tolist()) == (expected.input_ids, expected.loss_mask)
    input_ids, mask = store.sample(1)
    assert (input_ids.tolist(), mask.tolist()) == ([5, 1, 2, 3, 4, 5], [0, 1, 1, 1, 1, 1])
    assert (input_ids.dtype, mask.dtype) == (np.int32, np.uint8)
    assert (store.lengths.dtype, store.num_supervised.dtype) == (np.int32, np.int32)
    assert [len(store.sample(i)[0]) for i in range(3)] == store.lengths.tolist()
    assert [store.sample(i)[1].sum() for i in range(3)] == store.num_supervised.tolist()
    assert [store.origin(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 3, 4)]


def test_every_row_is_accepted_too_long_or_quarantined(tmp_path: Path, encoder: ChatEncoder) -> None:
    nothing_learnt = {"input_ids": [1, 2, 3], "loss_mask": [1, 0, 0]}
    path = write(tmp_path / "rows.jsonl", [tokens(1), tokens(2, 40), messages("long " * 40), nothing_learnt, b"{", {}])
    store = build(path, encoder, max_seq_len=30)
    assert store.account == Account(read=6, accepted=1, too_long=2, quarantined=3)
    assert [(row["file"], row["line"]) for row in store.quarantine] == [(str(path), line) for line in (4, 5, 6)]
    assert store.quarantine[0]["reason"] == "nothing in it is supervised"
    assert len(store.quarantine[0]["sha256"]) == 64


def test_a_folder_is_one_store(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for name, first in (("b.jsonl", 2), ("a.jsonl", 1)):
        write(folder / name, [tokens(first), b"{"])
    store = build(folder)
    assert [store.sample(i)[0][0] for i in range(2)] == [1, 2]
    assert [store.origin(i) for i in range(2)] == [f"{folder}/a.jsonl:1", f"{folder}/b.jsonl:1"]
    assert [row["file"] for row in store.quarantine] == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]


def test_the_second_start_reads_nothing_and_finds_the_data_wherever_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "old" / "rows.jsonl", [tokens(i % 700) for i in range(1500)])
    counts: list[int] = []
    first = build(path, progress=counts.append)
    assert counts == [1000, 1500]
    moved = write(tmp_path / "new" / "rows.jsonl", [tokens(i % 700) for i in range(1500)])
    again = build_store(
        str(moved),
        DataConfig(),
        encoder=None,
        vocab_size=VOCAB,
        cache_root=tmp_path / "old/cache",
        progress=counts.append,
    )
    assert counts == [1000, 1500]
    assert again.fingerprint == first.fingerprint
    assert again.origin(7) == f"{moved}:8"


def test_whatever_shapes_the_samples_changes_the_fingerprint(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1)])
    prints = [build(path).fingerprint, build(path, max_seq_len=64).fingerprint, build(path, encoder).fingerprint]
    prints.append(build(path, format="tokenized").fingerprint)
    write(path, [tokens(2)])
    prints.append(build(path).fingerprint)
    assert len(set(prints)) == 5
    assert build(path, strict=True, packing=False, max_bad_ratio=0.5).fingerprint == prints[-1]


def test_bad_rows_above_the_ratio_stop_with_the_first_three_and_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i) for i in range(16)] + [b"{", {}, b"[]", {"messages": 1}])
    expected = rf"4 of 20 rows.*{path}:17: not valid JSON.*:18: unknown shape.*:19: a row must be.*data\.max_bad_ratio"
    for _ in range(2):  # built now, then found
        with pytest.raises(DataError, match=expected):
            build(path)
    assert build(path, max_bad_ratio=0.2).account == Account(20, 16, 0, 4)


def test_three_bad_rows_never_stop_a_run_unless_it_is_strict(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1), b"{", b"{", b"{"])
    with pytest.raises(DataError, match=rf"^{path}:2: not valid JSON.*strict"):
        build(path, strict=True)
    assert not list((tmp_path / "cache").glob("*/"))
    assert build(path).account.quarantined == 3
    with pytest.raises(DataError, match=rf"^{path}:2: not valid JSON.*strict"):
        build(path, strict=True)


def test_no_usable_row_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows can be used: .*:1: not valid JSON.*1 have more than"):
        build(write(tmp_path / "rows.jsonl", [b"{", tokens(1, 50)]), max_seq_len=8)


def test_messages_without_a_tokenizer_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [messages("One.")])
    with pytest.raises(NeedsTokenizer, match=f"{path}:1: messages need a tokenizer"):
        build(path)


def _build_slowly(path: Path, started: Any) -> None:
    def wait(rows: int) -> None:
        started.set()
        time.sleep(60)

    build(path, progress=wait)


def test_a_killed_build_leaves_nothing_half_valid(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i % 500) for i in range(2500)])
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_build_slowly, args=(path, started))
    process.start()
    assert started.wait(30)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == [".tmp"]
    assert build(path).account.accepted == 2500
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def _build_and_count(path: Path, built: Any) -> None:
    def count(rows: int) -> None:
        with built.get_lock():
            built.value += 1

    assert len(build(path, progress=count)) == 800


def test_processes_that_start_together_build_it_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i % 500) for i in range(800)])
    context = multiprocessing.get_context("fork")
    built = context.Value("i", 0)
    processes = [context.Process(target=_build_and_count, args=(path, built)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert built.value == 1


def test_a_pickled_store_opens_the_same_files(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [tokens(i) for i in range(400)]))
    pickled = pickle.dumps(split_store(store, 0.5))
    train, _ = split_store(store, 0.5)
    loaded, _ = pickle.loads(pickled)
    assert len(pickle.dumps(store)) < 500
    assert [loaded.origin(i) for i in range(9)] == [train.origin(i) for i in range(9)]


def test_a_split_holds_every_sample_once_and_about_the_asked_share(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [tokens(i % 700, 4 + i // 700) for i in range(2000)]))
    train, val = split_store(store, 0.2, seed=3)
    assert len(train) + len(val) == len(store)
    assert {train.origin(i) for i in range(len(train))}.isdisjoint(val.origin(i) for i in range(len(val)))
    assert 0.17 < len(val) / len(store) < 0.23
    for view in (train, val):
        assert [len(view.sample(i)[0]) for i in range(50)] == view.lengths[:50].tolist()
        assert [view.sample(i)[1].sum() for i in range(50)] == view.num_supervised[:50].tolist()
    assert train.fingerprint != val.fingerprint


def test_a_row_keeps_its_side_when_others_come_and_its_copies_follow_it(tmp_path: Path) -> None:
    few = build(write(tmp_path / "few.jsonl", [tokens(i) for i in range(100)]))
    many = build(write(tmp_path / "many.jsonl", [tokens(i % 150) for i in range(300)]))

    def held_out(store: SampleStore, seed: int) -> list[int]:
        _, val = split_store(store, 0.3, seed)
        return [int(val.sample(i)[0][0]) for i in range(len(val))]

    for seed in (0, 1, -5, 2**70):
        first = held_out(few, seed)
        again = held_out(many, seed)
        assert set(first) == {token for token in again if token < 100}
        assert all(again.count(token) == 2 for token in again)
    assert held_out(few, 0) != held_out(few, 1)


def test_a_split_that_leaves_a_side_empty_is_an_error(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [tokens(1)] * 50))
    with pytest.raises(DataError, match=r"leaves none for .*data\.val_path"):
        split_store(store, 0.5)
