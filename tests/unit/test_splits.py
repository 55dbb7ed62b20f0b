import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwlit.core.errors import ConfigError, DataError
from qwlit.data.encoded_batch import RowCounts
from qwlit.data.order import Order
from qwlit.data.samples import Samples
from qwlit.data.splits import DataSplit, open_stores, split_data, split_store
from qwlit.data.store import SampleStore
from qwlit.data.tokenizer import TextTokenizer
from tests.real_tokenizer import small_tokenizer
from tests.stores import build, first_tokens, lengths, messages, num_supervised, row_encoder, tokens, write


def load(tmp_path: Path, tokenizer: TextTokenizer | None = None, **config: Any) -> DataSplit:
    encoder = row_encoder(tokenizer, **config)
    return split_data(encoder.config, *open_stores(encoder.config, encoder, cache_root=tmp_path / "cache"))


def paths(tmp_path: Path, *ranges: range, bad: int = 0) -> list[str]:
    files = [write(tmp_path / f"{number}.jsonl", [tokens(i) for i in r]) for number, r in enumerate(ranges)]
    if bad:
        files[0].write_bytes(files[0].read_bytes() + b"\n{" * bad)
    return [str(file) for file in files]


def origins(samples: Samples) -> list[str]:
    return [samples.origin(index) for index in range(len(samples))]


def test_a_split_holds_every_sample_once_and_about_the_asked_share(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [tokens(i % 700, 4 + i // 700) for i in range(2000)]))
    train, val = split_store(store, 0.2)
    assert sorted(origins(train) + origins(val)) == sorted(origins(store))
    assert 0.17 < len(val) / len(store) < 0.23
    for view in (train, val):
        assert [len(view.read([i])[0]) for i in range(50)] == lengths(view)[:50]
        assert [view.read([i])[1].sum() for i in range(50)] == num_supervised(view)[:50]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.999])
def test_a_row_keeps_its_side_when_others_come_and_its_copies_follow_it(fraction: float, tmp_path: Path) -> None:
    few = build(write(tmp_path / "few.jsonl", [tokens(i) for i in range(100)]))
    many = build(write(tmp_path / "many.jsonl", [tokens(i % 150) for i in range(300)]))
    first, again = (first_tokens(split_store(store, fraction)[1]) for store in (few, many))
    assert set(first) == {token for token in again if token < 100}
    assert all(again.count(token) == 2 for token in again)


def test_a_larger_fraction_holds_out_what_a_smaller_one_does_and_more(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [tokens(i) for i in range(300)]))
    held_out = [set(first_tokens(split_store(store, fraction)[1])) for fraction in (0.1, 0.2, 0.5)]
    assert held_out[0] < held_out[1] < held_out[2]


def test_a_split_can_be_sent_to_another_process(tmp_path: Path) -> None:
    store = build(write(tmp_path / "rows.jsonl", [tokens(i) for i in range(400)]))
    train, _ = split_store(store, 0.5)
    loaded, _ = pickle.loads(pickle.dumps(split_store(store, 0.5)))
    assert origins(loaded) == origins(train)


def test_without_a_validation_set_all_is_trained_on(tmp_path: Path) -> None:
    (path,) = paths(tmp_path, range(9), bad=2)
    data = load(tmp_path, path=path)
    assert (len(data.train), data.validation) == (9, None)
    assert data.describe() == "9 samples, 54 tokens, 83% supervised; no validation set; 2 quarantined"
    assert data.totals == {**vars(RowCounts()), "read": 11, "accepted": 9, "quarantined": 2}
    assert [row["line"] for row in data.quarantine()] == [10, 11]
    assert data.fingerprint == data.stores[0].fingerprint[:16]
    assert data.describe_shares(0) == []


def test_a_validation_path_is_all_validated(tmp_path: Path) -> None:
    train, *val = paths(tmp_path, range(9), range(3), range(3, 5))
    data = load(tmp_path, path=train, val_path=val)
    assert data.validation is not None
    assert first_tokens(data.validation) == list(range(5))
    assert len(data.train) == 9
    assert [len(store) for store in data.stores] == [9, 3, 2]
    assert data.totals["read"] == 14
    assert "; 5 to validate" in data.describe()


def test_parts_are_joined_and_split_each_for_itself(tmp_path: Path) -> None:
    listed = paths(tmp_path, range(100), range(100, 150), range(150, 350))
    data = load(tmp_path, path=listed, val_fraction=0.2)
    assert data.validation is not None
    assert sorted(first_tokens(data.train) + first_tokens(data.validation)) == list(range(350))
    assert 40 < len(data.validation) < 100
    sides = [split_store(store, 0.2) for store in data.stores]
    assert origins(data.train) == [origin for train, _ in sides for origin in origins(train)]
    assert origins(data.validation) == [origin for _, val in sides for origin in origins(val)]
    assert [(part.path, size) for part, size in data.parts] == [
        (path, len(train)) for path, (train, _) in zip(listed, sides, strict=True)
    ]
    assert data.order(0).quotas == (len(data.train),)
    assert data.fingerprint == "+".join(store.fingerprint[:16] for store in data.stores) + "/0.2"


def test_weighted_parts_are_drawn_by_their_weights_of_what_is_left_to_train_on(tmp_path: Path) -> None:
    first, second = paths(tmp_path, range(300), range(300, 400))
    weights = [{"path": first, "weight": 1}, {"path": second, "weight": 3.0}]
    data = load(tmp_path, path=weights, val_fraction=0.1)
    sizes = [size for _, size in data.parts]
    order = data.order(5)
    assert sum(sizes) == len(data.train) == order.epoch_length
    assert order.sizes == tuple(sizes)
    epoch = order.at(np.arange(order.epoch_length))
    drawn = [sum(int(data.train.read([int(i)])[0][0]) < 300 for i in epoch)]
    assert drawn[0] == order.quotas[0] == round(len(data.train) / 4)
    assert data.describe_shares(5)[1] == (
        f"{second}: {order.quotas[1]} of {sizes[1]} samples an epoch ({order.quotas[1] / sizes[1]:.2g} times)"
    )
    assert data.fingerprint.endswith("*1,3/0.1")


def test_the_fingerprint_follows_all_that_decides_which_samples_are_met_how_often(tmp_path: Path) -> None:
    first, second = paths(tmp_path, range(50), range(50, 100))
    settings: list[dict[str, Any]] = [
        *({"path": first}, {"path": second}, {"path": [first, second]}, {"path": [second, first]}),
        *({"path": first, "val_fraction": fraction} for fraction in (0.3, 0.4)),
        *({"path": [{"path": first, "weight": 1}, {"path": second, "weight": w}]} for w in (1, 2)),
        {"path": first, "max_seq_len": 99},
    ]
    prints = [load(tmp_path, **setting).fingerprint for setting in settings]
    assert len(set(prints)) == len(prints)


def test_what_is_remarkable_is_said_of_all_parts_together(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number}.jsonl", [messages("a </think> b")] * 2) for number in range(2)]
    data = load(tmp_path, TextTokenizer(small_tokenizer("qwen3")), path=[str(file) for file in files])
    (remark,) = data.remarks
    assert remark.startswith("4 rows have <think> or <tool_call> tags inside a text")
    assert data.describe().endswith("3 duplicates")


@pytest.mark.parametrize("rows", [range(1), range(0, 50, 50)])
@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_split_that_leaves_a_side_empty_is_an_error(rows: range, fraction: float, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(1)] * len(rows))
    with pytest.raises(DataError, match=r"leaves none for (training|validation); .*data\.val_path"):
        load(tmp_path, path=str(path), val_fraction=fraction)


def test_bad_rows_are_judged_in_every_part_and_in_the_validation_set(tmp_path: Path) -> None:
    (good,) = paths(tmp_path, range(9))
    (bad,) = paths(tmp_path / "bad", range(9), bad=4)
    for setting in ({"path": [good, bad]}, {"path": good, "val_path": bad}):
        with pytest.raises(DataError, match=r"4 of 13 rows cannot be used: .*bad/0\.jsonl:10"):
            load(tmp_path, **setting)


def test_the_store_of_a_path_is_built_once_for_training_and_validation(tmp_path: Path) -> None:
    (path,) = paths(tmp_path, range(9))
    told: list[Any] = []
    encoder = row_encoder(path=[path, path], val_path=path)
    training, validation = open_stores(encoder.config, encoder, cache_root=tmp_path / "cache", progress=told.append)
    assert {store.folder for store in (*training, *validation)} == {training[0].folder}
    assert sum(reading.finished for reading in told) == 1
    assert all(isinstance(store, SampleStore) for store in training)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({}, r"data\.path is not set"),
        ({"path": [{"path": "a.jsonl", "weight": 1}, "b.jsonl"]}, "give all parts a weight, or no part"),
        ({"path": "a.jsonl", "val_path": [{"path": "b.jsonl", "weight": 1}]}, r"data\.val_path takes no weights"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_errors(setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **setting)


def test_a_reader_owns_twenty_bytes_a_sample_and_four_more_where_samples_are_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i % 700, 4 + i // 700) for i in range(3000)])
    store = build(path)
    assert sum(value.nbytes for value in vars(store).values() if isinstance(value, np.ndarray)) == 16 * len(store)
    train, _ = split_store(store, 0.5)
    assert train._indices.nbytes == 4 * len(train)
    order = Order.plain(0, len(store))
    order.at(np.arange(2000, 4000))
    assert sum(shuffle.nbytes for _, shuffle in order._shuffles.values()) == 4 * len(store)


def test_the_samples_that_a_row_was_cut_into_stay_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [tokens(i, 90) for i in range(60)])
    data = load(tmp_path, path=str(path), max_seq_len=16, too_long="split", val_fraction=0.3)
    assert data.validation is not None
    sides = [{side.origin(i) for i in range(len(side))} for side in (data.train, data.validation)]
    assert all(sides) and not sides[0] & sides[1]
    assert len(data.train) > 2 * len(sides[0])


def test_copies_in_other_parts_are_counted_and_dropped_and_leaks_are_said(tmp_path: Path) -> None:
    rows = [tokens(i) for i in range(10)]
    files = [str(write(tmp_path / name, part)) for name, part in (("a.jsonl", rows), ("b.jsonl", rows[5:] + rows[:1]))]
    data = load(tmp_path, path=files, val_path=files[1])
    assert (data.totals["duplicates"], len(data.train)) == (6, 16)
    assert data.remarks == ["6 validation samples are also in the training data: val/loss will be too low"]
    dropped = load(tmp_path, path=[*files, str(write(tmp_path / "c.jsonl", [tokens(99)]))], drop_duplicates=True)
    assert len(dropped.train) == 11
    with pytest.raises(DataError, match=r"gone\.jsonl' does not exist"):
        load(tmp_path / "fresh", path=[files[0], str(tmp_path / "gone.jsonl")])
    assert not (tmp_path / "fresh").exists()


def masked(first: int, mask: list[int]) -> dict[str, Any]:
    return {"input_ids": [first, 1, 2], "loss_mask": mask}


def test_samples_with_the_same_tokens_and_another_mask_are_no_duplicates(tmp_path: Path) -> None:
    rows = [masked(i, mask) for i in range(50) for mask in ([0, 1, 0], [0, 0, 1], [1, 1, 0])]
    path = write(tmp_path / "rows.jsonl", rows)
    other = write(tmp_path / "other.jsonl", [masked(0, [0, 1, 0]), masked(0, [0, 1, 1])])
    data = load(tmp_path, path=[str(path), str(other)])
    assert data.totals["duplicates"] == 50 + 1  # the first token is nobody's target, whatever its mask
    assert len(load(tmp_path, path=[str(path), str(other)], drop_duplicates=True).train) == 101


def test_copies_with_another_mask_stand_on_the_same_side_and_count_as_leaked(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [masked(i, mask) for i in range(200) for mask in ([0, 1, 0], [0, 0, 1])])
    data = load(tmp_path, path=str(path), val_fraction=0.3)
    assert data.validation is not None
    trained, held_out = set(first_tokens(data.train)), set(first_tokens(data.validation))
    assert trained and held_out and not trained & held_out
    val = write(tmp_path / "val.jsonl", [masked(3, [0, 1, 1]), masked(300, [0, 1, 1])])
    leaked = load(tmp_path, path=str(path), val_path=str(val))
    assert leaked.num_leaked == 1


def test_turns_of_another_format_are_refused_with_the_columns_that_read_them(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(small_tokenizer("qwen3"))
    rows = [{"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}] * 9
    file = str(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=r"'\{conversations: messages\}'\. All are in"):
        load(tmp_path, tokenizer, path=file)
    assert len(load(tmp_path, tokenizer, path=file, columns={"conversations": "messages"}).train) == 9
    unknown = str(write(tmp_path / "unknown.jsonl", [{"messages": [{"role": "zzz", "content": "Hi"}]}] * 9))
    with pytest.raises(DataError, match=r"user, assistant, tool\. All are in"):
        load(tmp_path, tokenizer, path=unknown)


def test_named_validation_sets_keep_their_order_and_their_parts(tmp_path: Path) -> None:
    train, *val = paths(tmp_path, range(9), range(10, 13), range(20, 22), range(30, 31))
    data = load(tmp_path, path=train, val_path={"math": val[0], "chat": val[1:]})
    assert {name: first_tokens(samples) for name, samples in data.validation_sets.items()} == {
        "math": [10, 11, 12],
        "chat": [20, 21, 30],
    }
    assert data.validation is not None and first_tokens(data.validation) == [10, 11, 12, 20, 21, 30]
    assert "; 6 to validate (math 3, chat 3)" in data.describe()
    unnamed = load(tmp_path, path=train, val_path=val)
    assert list(unnamed.validation_sets) == [""] and unnamed.fingerprint == data.fingerprint
    assert load(tmp_path, path=train).validation_sets == {}
    swapped = load(tmp_path, path=train, val_path={"math": val[1], "chat": [val[0], val[2]]})
    one, two, three = data.contents["data.val_path.math"] + data.contents["data.val_path.chat"]
    assert swapped.contents == data.contents | {"data.val_path.math": [two], "data.val_path.chat": [one, three]}
    assert unnamed.contents == {"data.path": data.contents["data.path"], "data.val_path": [one, two, three]}
