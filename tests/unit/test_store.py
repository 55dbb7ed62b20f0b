import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from qwlit.core.errors import DataError
from qwlit.data import store_folder, store_writer
from qwlit.data.batches import StepDataset, train_loader
from qwlit.data.conversation import parse_conversation
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.order import Order
from qwlit.data.remarks import TAGS_AS_TEXT
from qwlit.data.rows import NeedsTokenizer
from qwlit.data.step_plan import Limits, StepPlan
from qwlit.data.store import DamagedStore, DigestOf, SampleStore, check_row_counts
from qwlit.data.store_writer import BuildProgress
from qwlit.data.tokenizer import TextTokenizer
from tests.broken_stores import CASES, KINDS, WHILE_READ, Broken, flip, rows
from tests.real_tokenizer import small_tokenizer
from tests.stores import build, first_tokens, lengths, messages, num_supervised, row_encoder, tokens, write

DIGESTS: tuple[DigestOf, ...] = get_args(DigestOf)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3"))


def check(store: SampleStore, **config: Any) -> None:
    check_row_counts(store, row_encoder(**config).config)


def test_samples_come_back_with_mask_counts_and_origin(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    chat = row_encoder(tokenizer).chat
    assert chat is not None
    path = write(tmp_path / "rows.jsonl", [messages("One."), b"", tokens(5), messages("Two, 二.")])
    store = build(path, tokenizer)
    assert len(store) == 3
    for index, row in ((0, messages("One.")), (2, messages("Two, 二."))):
        (expected,) = chat.encode_batch([chat.render(parse_conversation(row["messages"]))])
        input_ids, mask = store.read([index])
        assert (input_ids.tolist(), mask.tolist()) == (expected.input_ids, expected.loss_mask)
    input_ids, mask = store.read([1])
    assert (input_ids.tolist(), mask.tolist()) == ([5, 1, 2, 3, 4, 5], [0, 1, 1, 1, 1, 1])
    assert (input_ids.dtype, mask.dtype) == (np.int32, np.uint8)
    ids = np.arange(3)
    assert (store.lengths(ids).dtype, store.num_supervised(ids).dtype) == (np.int32, np.int32)
    assert [len(store.read([i])[0]) for i in range(3)] == lengths(store)
    assert [store.read([i])[1].sum() for i in range(3)] == num_supervised(store)
    assert [store.origin(i) for i in range(3)] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert store.lengths(np.array([1, 1])).tolist() == [6, 6]


def test_every_row_is_accepted_too_long_or_quarantined(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    nothing_supervised = {"input_ids": [1, 2, 3], "loss_mask": [1, 0, 0]}
    path = write(
        tmp_path / "rows.jsonl", [tokens(1), tokens(2, 40), messages("long " * 40), nothing_supervised, b"{", {}]
    )
    store = build(path, tokenizer, max_seq_len=30)
    assert store.row_counts == RowCounts(read=6, accepted=1, too_long=2, quarantined=3)
    quarantine = list(store.quarantine())
    assert [(row["file"], row["line"]) for row in quarantine] == [(str(path), line) for line in (4, 5, 6)]
    assert quarantine[0]["reason"] == "nothing in it is supervised"
    assert len(quarantine[0]["sha256"]) == 64
    assert list(store.quarantine()) == quarantine


def test_a_row_in_several_pieces_is_several_samples_of_one_origin(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1), {"text": "It was the best of times. " * 9}, tokens(2)])
    store = build(path, tokenizer, max_seq_len=12)
    assert store.row_counts == RowCounts(read=3, accepted=3, split=1)
    assert len(store) > 6
    assert [store.origin(i) for i in range(len(store))] == [
        f"{path}:1",
        *[f"{path}:2"] * (len(store) - 2),
        f"{path}:3",
    ]


def test_what_is_remarkable_in_rows_is_kept(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", [messages("a </think> b"), messages("x"), messages("a </think> b")])
    for _ in range(2):  # built now, then found
        assert build(path, tokenizer).remarks == {TAGS_AS_TEXT: 2}


@pytest.mark.parametrize("name", ["rows", "rows/*.jsonl"])
def test_a_folder_or_a_glob_is_one_store(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for file, first in (("b.jsonl", 2), ("a.jsonl", 1)):
        write(folder / file, [tokens(first), b"{"])
    store = build(tmp_path / name, cache_root=tmp_path / "cache")
    assert first_tokens(store) == [1, 2]
    assert [store.origin(i) for i in range(2)] == [f"{folder}/a.jsonl:1", f"{folder}/b.jsonl:1"]
    assert [row["file"] for row in store.quarantine()] == [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]


def test_the_second_start_reads_nothing_and_finds_the_data_wherever_it_lies(tmp_path: Path) -> None:
    rows = [tokens(i % 700) for i in range(2500)]
    path = write(tmp_path / "old" / "rows.jsonl", rows)
    told: list[BuildProgress] = []
    first = build(path, progress=told.append)
    assert [(reading.rows, reading.tokens, reading.finished) for reading in told] == [
        *((2000, 12000, False), (2500, 15000, False), (2500, 15000, True))
    ]
    assert first_tokens(first) == [i % 700 for i in range(2500)]
    assert told[-1].bytes_read == told[-1].bytes_in_all == path.stat().st_size
    moved = write(tmp_path / "new" / "rows.jsonl", rows)
    again = build(moved, cache_root=tmp_path / "old/cache", progress=told.append)
    assert len(told) == 3
    assert again.fingerprint == first.fingerprint
    assert again.origin(7) == f"{moved}:8"


def test_whatever_shapes_the_samples_changes_the_fingerprint(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1)])
    prints = [build(path).fingerprint, build(path, max_seq_len=64).fingerprint, build(path, tokenizer).fingerprint]
    prints.append(build(path, format="tokenized").fingerprint)
    prints.append(build(write(tmp_path / "other.jsonl", [tokens(1)])).fingerprint)
    write(path, [tokens(2)])
    prints.append(build(path).fingerprint)
    assert len(set(prints)) == 6
    assert build(path, strict=True, packing=False, max_bad_ratio=0.5).fingerprint == prints[-1]


def test_several_processes_store_what_one_does(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [messages(f"{number} " * (number % 40)) for number in range(1, 4500)]
    path = write(tmp_path / "rows.jsonl", [*rows, b"{", {"text": "It was the best of times. " * 9}])
    alone = build(path, tokenizer, cache_root=tmp_path / "alone", max_seq_len=40)
    monkeypatch.setattr(store_writer, "BYTES_WORTH_WORKERS", 0)
    monkeypatch.setattr(store_writer, "num_cores", lambda: 2)
    together = build(path, tokenizer, cache_root=tmp_path / "together", max_seq_len=40)
    assert together.fingerprint == alone.fingerprint
    assert together.row_counts == alone.row_counts
    for file in sorted(alone.folder.iterdir()):
        if file.name != "meta.json":
            assert (together.folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_samples_with_the_same_tokens_are_counted_and_left_out_where_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(n % 20, 4 + n % 20) for n in (*range(20), *range(5), 20, 21)])
    row_counts = RowCounts(read=27, accepted=27, duplicates=7)
    assert build(path).row_counts == row_counts
    store = build(path, drop_duplicates=True)
    assert store.row_counts == row_counts
    assert first_tokens(store) == list(range(20))
    assert [store.origin(i) for i in range(20)] == [f"{path}:{line}" for line in range(1, 21)]
    assert lengths(store) == [len(store.read([i])[0]) for i in range(20)] == [4 + n for n in range(20)]
    assert num_supervised(store) == [store.read([i])[1].sum() for i in range(20)]


def test_bad_rows_above_the_ratio_stop_with_the_first_three_and_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i) for i in range(16)] + [b"{", {}, b"[]", {"messages": 1}])
    expected = rf"4 of 20 rows.*{path}:17: not valid JSON.*:18: unknown format.*:19: a row must be.*data\.max_bad_ratio"
    for _ in range(2):  # built now, then found
        with pytest.raises(DataError, match=expected):
            check(build(path))
    check(build(path, max_bad_ratio=0.2), max_bad_ratio=0.2)


def test_three_bad_rows_never_stop_a_run_unless_it_is_strict(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1), b"{", b"{", b"{"])
    with pytest.raises(DataError, match=rf"^{path}:2: not valid JSON.*strict"):
        build(path, strict=True)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    store = build(path)
    check(store)
    assert store.row_counts.quarantined == 3
    with pytest.raises(DataError, match=rf"^{path}:2: not valid JSON.*strict"):
        check(build(path, strict=True), strict=True)


def test_a_row_that_is_too_long_stops_where_that_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1), tokens(2, 50)])
    with pytest.raises(DataError, match=rf"^{path}:2: 50 tokens; data\.max_seq_len=8 \(data\.too_long=error"):
        build(path, too_long="error", max_seq_len=8)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_no_usable_row_is_an_error_that_says_why(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [b"{", tokens(1, 50)]), max_seq_len=8)
    assert len(store) == 0
    with pytest.raises(DataError, match=r"none of the 2 rows can be used: .*:1: not valid JSON.*1 have more than"):
        check(store, max_seq_len=8)


def test_messages_without_a_tokenizer_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(NeedsTokenizer, match="need a tokenizer"):
        build(write(tmp_path / "rows.jsonl", [messages("One.")]))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i % 700) for i in range(2500)])

    def change(reading: BuildProgress) -> None:
        with path.open("ab") as handle:
            handle.write(b"\n" + json.dumps(tokens(1)).encode())

    with pytest.raises(DataError, match=r"rows\.jsonl' or a file beside it changed while it was read; start again"):
        build(path, progress=change)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert build(path).row_counts.read > 2500


def everything(store: SampleStore) -> Any:
    ids = list(range(len(store)))
    arrays = [
        store.lengths(ids),
        store.num_supervised(ids),
        *store.read(ids),
        *map(partial(store.digests, ids), DIGESTS),
    ]
    return [array.tolist() for array in arrays], [store.origin(i) for i in ids], list(store.quarantine())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SampleStore, SampleStore]:
    """A file of rows, its store, and another store of the same shape."""
    folder = tmp_path_factory.mktemp("stored")
    paths = [write(folder / f"{shift}.jsonl", rows(shift)) for shift in (0, 1)]
    return paths[0], *map(build, paths)


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_a_damaged_store_is_built_again_with_a_line_that_names_the_file(
    kind: str,
    number: int,
    stored: tuple[Path, SampleStore, SampleStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, good, other = stored
    cache = tmp_path / "cache"
    shutil.copytree(good.folder.parent, cache)
    broken = KINDS[kind][number]
    broken.damage(cache / good.folder.name, other.folder)
    said: list[str] = []
    # What only a reader of samples finds is found now, and the store is built again at the next start.
    with suppress(DamagedStore):
        assert everything(build(path, cache_root=cache, say=said.append)) == everything(good)
    again = build(path, cache_root=cache, say=said.append)
    assert everything(again) == everything(good)
    (line,) = said
    assert re.search(
        rf"'{path}' are damaged \(.*/{good.folder.name}: {re.escape(broken.file)}.*tokenizes them again", line
    )
    assert build(path, cache_root=cache, say=said.append).rebuilt is None and len(said) == 1
    assert {entry.suffix for entry in cache.iterdir()} <= {".lock", ".digest", ""}


@pytest.mark.parametrize("broken", WHILE_READ)
def test_what_is_damaged_while_it_is_read_is_an_error_and_built_again_at_the_next_start(
    broken: Broken, stored: tuple[Path, SampleStore, SampleStore], tmp_path: Path
) -> None:
    path, good, other = stored
    cache = tmp_path / "cache"
    shutil.copytree(good.folder.parent, cache)
    store = build(path, cache_root=cache)
    ids = list(range(len(store)))
    store.read(ids[-1:])
    broken.damage(store.folder, other.folder)
    with pytest.raises(DamagedStore, match=rf"{store.folder}: {broken.file}.*; run the same command again, and"):
        store.read(ids)
    again = build(path, cache_root=cache)
    assert broken.file in (again.rebuilt or "")
    assert everything(again) == everything(good)
    # A reader of the old files does not mark the new ones.
    with pytest.raises(DamagedStore):
        store.read(ids)
    assert build(path, cache_root=cache).rebuilt is None


def test_damage_that_cannot_be_marked_is_an_error_with_the_remedy(
    stored: tuple[Path, SampleStore, SampleStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good, other = stored
    shutil.copytree(good.folder.parent, tmp_path / "cache")
    store = build(path, cache_root=tmp_path / "cache")
    flip("tokens.bin").damage(store.folder, other.folder)
    monkeypatch.setattr(store_folder, "write_text_atomic", no_space)
    with pytest.raises(DamagedStore, match="; delete that folder and run the same command again, and"):
        store.read(list(range(len(store))))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_finds_damaged_is_the_same_line(
    num_workers: int, stored: tuple[Path, SampleStore, SampleStore], tmp_path: Path
) -> None:
    path, good, other = stored
    shutil.copytree(good.folder.parent, tmp_path / "cache")
    store = build(path, cache_root=tmp_path / "cache")
    flip("tokens.bin").damage(store.folder, other.folder)
    plan = StepPlan(store, Order.plain(0, len(store)), len(store), 1, Limits(max_samples=64), packing=True)
    steps = StepDataset(store, plan, 0, pad_id=0)
    loader = train_loader(steps, start_step=0, total_steps=1, num_workers=num_workers, pin_memory=False)
    with pytest.raises(DamagedStore) as raised:
        next(iter(loader))
    assert re.fullmatch(rf"the tokenized data of .* \({store.folder}: tokens\.bin: .*\); run .*", str(raised.value))
    assert "Traceback" not in str(raised.value)


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_process_without_open_files_left_is_no_damage(
    stored: tuple[Path, SampleStore, SampleStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = stored[1].folder, os.open

    def too_many(path: Any, *more: Any, **options: Any) -> int:
        if Path(path).is_relative_to(folder):
            raise OSError(24, "Too many open files")
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", too_many)
    with pytest.raises(DataError, match=r"cannot be read: Too many open files; .*ulimit"):
        SampleStore(folder, "rows.jsonl", [])


def test_only_the_blocks_of_a_sample_are_read(stored: tuple[Path, SampleStore, SampleStore]) -> None:
    path, good, _ = stored
    store = SampleStore(good.folder, str(path), [])
    blocks = store._tokens._unverified
    assert len(blocks) == 5
    store.read([0, 1])
    assert blocks == b"\0" + b"\1" * 4
    store.read([len(store) - 1])
    assert blocks == b"\0" + b"\1" * 3 + b"\0"


def test_a_cache_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1)])
    said = r"cannot be written to .*rows\.jsonl/cache: .*: Not a directory; .*: move it away, or set run\.root"
    with pytest.raises(DataError, match=said):
        build(path, cache_root=path / "cache")


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("rows.jsonl", errno.EIO, r"^data file '.*/rows\.jsonl' cannot be read: Input/output error; check the disk$"),
        ("tokens.bin", errno.EDQUOT, r"cannot be written to .*/tokens\.bin: .*; free space in your quota, or set run"),
    ],
)
def test_a_disk_that_fails_is_named_with_its_file(
    name: str, number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = write(tmp_path / "rows.jsonl", [tokens(1)]), Path.open

    def open(self: Path, *more: Any, **options: Any) -> Any:
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *more, **options)

    monkeypatch.setattr(Path, "open", open)
    with pytest.raises(DataError, match=said):
        build(path, cache_root=tmp_path / "cache")


def _build_slowly(path: Path, started: Any) -> None:
    def wait(reading: BuildProgress) -> None:
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
    assert build(path).row_counts.accepted == 2500
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def _build_and_count(path: Path, built: Any) -> None:
    def count(reading: BuildProgress) -> None:
        with built.get_lock():
            built.value += reading.finished

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
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    loaded = pickle.loads(pickled)
    assert first_tokens(loaded) == first_tokens(store)
    assert loaded.origin(9) == store.origin(9)
