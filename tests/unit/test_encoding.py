import pickle
from typing import Any

import numpy as np
import pytest

from qwlit.data.conversation import parse_conversation
from qwlit.data.encoded_batch import DTYPES, EncodedBatch, RowCounts
from qwlit.data.encoding import RowEncoder
from qwlit.data.remarks import HISTORY_THINKING, TAGS_AS_TEXT
from qwlit.data.rows import Document, NeedsTokenizer, QuarantinedRow, Row
from qwlit.data.tokenizer import TextTokenizer
from tests.real_tokenizer import small_tokenizer
from tests.stores import messages, row_encoder, tokens

PROSE = "It was the best of times, it was the worst of times. "
LONG = messages(PROSE)
MASKED = {"input_ids": list(range(3, 43)), "loss_mask": [0, 1] * 20}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3"))


def encode(encoder: RowEncoder, *contents: Any) -> EncodedBatch:
    return encoder(
        [c if isinstance(c, QuarantinedRow) else Row(0, line, c) for line, c in enumerate(contents, start=1)]
    )


def samples(batch: EncodedBatch) -> list[tuple[list[int], list[int]]]:
    ends = np.cumsum(batch.arrays["lengths"])
    ids, masks = (np.split(batch.arrays[name], ends) for name in ("tokens", "mask"))
    assert ids.pop().size == masks.pop().size == 0
    return [(i.tolist(), m.tolist()) for i, m in zip(ids, masks, strict=True)]


def whole(encoder: RowEncoder, row: Any) -> tuple[list[int], list[int]]:
    """A row's tokens and mask, were there no limit."""
    unlimited = row_encoder(encoder.tokenizer, loss_on=encoder.config.loss_on, max_seq_len=2**20)
    (sample,) = samples(encode(unlimited, row))
    return sample


def test_every_kind_of_row_becomes_a_sample(tokenizer: TextTokenizer) -> None:
    encoder = row_encoder(tokenizer)
    assert encoder.chat is not None
    rows = [messages("One."), tokens(5), {"text": "Prose, 二."}, Document("Prose, 二."), messages("Two, 二.")]
    batch = encode(encoder, *rows)
    rendered = [encoder.chat.render(parse_conversation(rows[i]["messages"])) for i in (0, 4)]
    first, second = ((sample.input_ids, sample.loss_mask) for sample in encoder.chat.encode_batch(rendered))
    (prose,) = tokenizer.encode(["Prose, 二."])
    document = ([*prose, tokenizer.end_of_text_id], [0] + [1] * len(prose))
    assert samples(batch) == [first, ([5, 1, 2, 3, 4, 5], [0, 1, 1, 1, 1, 1]), document, document, second]
    assert batch.row_counts == RowCounts(read=5, accepted=5)
    assert (batch.quarantined_rows, batch.stop) == ([], None)


def test_the_arrays_say_of_each_sample_how_long_it_is_what_is_supervised_and_where_it_stood(
    tokenizer: TextTokenizer,
) -> None:
    encoder = row_encoder(tokenizer, max_seq_len=20, too_long="split")
    batch = encoder([Row(0, 3, tokens(1)), Row(1, 1, b"{"), Row(1, 2, {"text": PROSE}), Row(2, 9, tokens(1))])
    found = samples(batch)
    assert {name: array.dtype.str for name, array in batch.arrays.items()} == DTYPES
    assert batch.arrays["num_supervised"].tolist() == [sum(mask) for _, mask in found]
    origins = list(zip(batch.arrays["sources"].tolist(), batch.arrays["lines"].tolist(), strict=True))
    assert origins == [(0, 3), *[(1, 2)] * (len(found) - 2), (2, 9)]
    digests = batch.arrays["digests"].tolist()
    assert digests[0] == digests[-1]
    assert len(set(digests)) == len(found) - 1


def test_a_batch_without_a_sample_has_empty_arrays_of_the_same_kinds() -> None:
    batch = encode(row_encoder(), b"{", b"[]")
    assert {name: (array.dtype.str, array.size) for name, array in batch.arrays.items()} == {
        name: (dtype, 0) for name, dtype in DTYPES.items()
    }
    assert batch.row_counts == RowCounts(read=2, quarantined=2)


def test_each_row_is_encoded_the_same_alone_and_among_others(tokenizer: TextTokenizer) -> None:
    encoder = row_encoder(tokenizer, max_seq_len=24, too_long="split")
    rows: list[Any] = [messages("One."), b"{", {"text": PROSE}, LONG, tokens(5, 60), {"text": ""}, {"text": "x"}]
    together = encode(encoder, *rows)
    alone = [encode(encoder, row) for row in rows]
    assert samples(together) == [sample for batch in alone for sample in samples(batch)]
    row_counts = RowCounts()
    for batch in alone:
        row_counts.add(batch.row_counts)
    assert together.row_counts == row_counts


@pytest.mark.parametrize("row", [LONG, MASKED, {"text": PROSE}, Document(PROSE)])
def test_a_row_as_long_as_the_limit_is_never_touched(row: Any, tokenizer: TextTokenizer) -> None:
    ids, mask = whole(row_encoder(tokenizer), row)
    for too_long in ("auto", "drop", "truncate", "split", "error"):
        batch = encode(row_encoder(tokenizer, too_long=too_long, max_seq_len=len(ids)), row)
        assert samples(batch) == [(ids, mask)]
        assert batch.row_counts == RowCounts(read=1, accepted=1)


@pytest.mark.parametrize("row", [LONG, MASKED, {"text": PROSE}, Document(PROSE)])
def test_drop_leaves_a_longer_row_out(row: Any, tokenizer: TextTokenizer) -> None:
    batch = encode(row_encoder(tokenizer, too_long="drop", max_seq_len=24), row, tokens(1))
    assert samples(batch) == [([1, 1, 2, 3, 4, 5], [0, 1, 1, 1, 1, 1])]
    assert batch.row_counts == RowCounts(read=2, accepted=1, too_long=1)


@pytest.mark.parametrize("row", [LONG, MASKED, {"text": PROSE}, Document(PROSE)])
def test_truncate_keeps_the_beginning(row: Any, tokenizer: TextTokenizer) -> None:
    encoder = row_encoder(tokenizer, too_long="truncate", max_seq_len=24)
    ids, mask = whole(encoder, row)
    batch = encode(encoder, row, tokens(1))
    assert samples(batch)[0] == (ids[:24], mask[:24])
    assert batch.row_counts == RowCounts(read=2, accepted=2, truncated=1)


@pytest.mark.parametrize("row", [LONG, MASKED, {"text": PROSE}, Document(PROSE)])
@pytest.mark.parametrize("limit", [2, 3, 16, 24])
def test_split_makes_every_token_but_the_first_a_target_exactly_once(
    row: Any, limit: int, tokenizer: TextTokenizer
) -> None:
    encoder = row_encoder(tokenizer, too_long="split", max_seq_len=limit, loss_on="all")
    ids, mask = whole(encoder, row)
    batch = encode(encoder, row)
    start = 0
    for piece, mask_part in _with_those_left_out(samples(batch), ids, mask, limit):
        assert piece == ids[start : start + limit]
        assert mask_part == [0, *mask[start + 1 : start + limit]]
        start += len(piece) - 1
    assert start == len(ids) - 1
    assert batch.arrays["num_supervised"].sum() == sum(mask)
    assert batch.row_counts == RowCounts(read=1, accepted=1, split=1)


def _with_those_left_out(found: list[Any], ids: list[int], mask: list[int], limit: int) -> list[Any]:
    """Put back the pieces without a supervised token: they are not samples."""
    pieces = []
    left = iter(found)
    for start in range(0, len(ids) - 1, limit - 1):
        mask_part = [0, *mask[start + 1 : start + limit]]
        pieces.append(next(left) if any(mask_part) else (ids[start : start + limit], mask_part))
    assert next(left, None) is None
    return pieces


@pytest.mark.parametrize(("row", "size"), [(LONG, "tokens"), (MASKED, "40 tokens"), ({"text": PROSE}, "tokens")])
def test_error_stops_at_the_first_longer_row_and_names_it(row: Any, size: str, tokenizer: TextTokenizer) -> None:
    batch = encode(row_encoder(tokenizer, too_long="error", max_seq_len=24), tokens(1), b"{", row, row)
    assert batch.stop is not None
    assert (batch.stop.source, batch.stop.line) == (0, 3)
    assert size in batch.stop.reason
    assert batch.stop.reason.endswith("; data.max_seq_len=24 (data.too_long=error stops at it)")


def test_auto_splits_prose_and_drops_the_rest(tokenizer: TextTokenizer) -> None:
    batch = encode(row_encoder(tokenizer, max_seq_len=24), LONG, MASKED, {"text": PROSE}, Document(PROSE))
    assert batch.row_counts == RowCounts(read=4, accepted=2, too_long=2, split=2)
    by_name = encode(row_encoder(tokenizer, max_seq_len=24, too_long="split"), {"text": PROSE}, Document(PROSE))
    assert samples(batch) == samples(by_name)


BLOCKS = [Document(PROSE, is_last=False), Document(PROSE, False, False), Document("Short.", is_first=False)]


def test_of_a_text_in_blocks_only_the_last_ends_with_the_end_of_text(tokenizer: TextTokenizer) -> None:
    batch = encode(row_encoder(tokenizer), *BLOCKS)
    ids = tokenizer.encode([block.text for block in BLOCKS])
    ids[-1].append(tokenizer.end_of_text_id)
    assert samples(batch) == [(tokens, [0] + [1] * (len(tokens) - 1)) for tokens in ids]
    assert batch.row_counts == RowCounts(read=3, accepted=3)


@pytest.mark.parametrize(
    ("too_long", "row_counts"),
    [
        ("auto", RowCounts(read=3, accepted=3, split=2)),
        ("split", RowCounts(read=3, accepted=3, split=2)),
        ("drop", RowCounts(read=3, too_long=3)),
        ("truncate", RowCounts(read=3, accepted=1, too_long=2, truncated=1)),
    ],
)
def test_a_text_in_blocks_is_one_long_text_to_the_policy(
    too_long: str, row_counts: RowCounts, tokenizer: TextTokenizer
) -> None:
    assert encode(row_encoder(tokenizer, too_long=too_long, max_seq_len=12), *BLOCKS).row_counts == row_counts


def test_a_text_in_blocks_is_an_error_where_long_ones_are(tokenizer: TextTokenizer) -> None:
    stop = encode(row_encoder(tokenizer, too_long="error"), *BLOCKS).stop
    assert stop is not None
    assert stop.reason.startswith("a long text; data.max_seq_len=2048")


@pytest.mark.parametrize(
    ("too_long", "mask", "reason"),
    [
        ("auto", [0] * 6, "nothing in it is supervised"),
        ("auto", [1] + [0] * 5, "nothing in it is supervised"),
        ("split", [0] * 20, "nothing in it is supervised"),
        ("truncate", [0] * 10 + [1] * 10, "nothing in it is supervised within its first 8 tokens"),
    ],
)
def test_a_row_with_nothing_supervised_is_quarantined(too_long: str, mask: list[int], reason: str) -> None:
    row = {"input_ids": list(range(len(mask))), "loss_mask": mask}
    batch = encode(row_encoder(too_long=too_long, max_seq_len=8), tokens(1), row)
    assert batch.row_counts == RowCounts(read=2, accepted=1, quarantined=1)
    assert [(row.line, row.reason) for row in batch.quarantined_rows] == [(2, reason)]
    assert len(samples(batch)) == 1


def test_pieces_with_nothing_supervised_are_no_samples_of_a_row_that_is_split() -> None:
    row = {"input_ids": list(range(20)), "loss_mask": [0] * 9 + [1] + [0] * 10}
    batch = encode(row_encoder(too_long="split", max_seq_len=8), row)
    assert samples(batch) == [(list(range(7, 15)), [0, 0, 1, 0, 0, 0, 0, 0])]
    assert batch.row_counts == RowCounts(read=1, accepted=1, split=1)


def test_the_account_is_exact_and_every_reject_says_why(tokenizer: TextTokenizer) -> None:
    unreadable = QuarantinedRow(0, 3, "unreadable", "0" * 64)
    rows: list[Any] = [tokens(7), b"{", unreadable, {"text": ""}, LONG, tokens(2, 60), {"text": PROSE}, {"x": 1}]
    batch = encode(row_encoder(tokenizer, max_seq_len=24), *rows)
    assert batch.row_counts == RowCounts(read=8, accepted=2, too_long=2, quarantined=4, split=1)
    assert batch.quarantined_rows[1] == unreadable
    assert [row.line for row in batch.quarantined_rows] == [2, 3, 4, 8]
    assert all(row.reason and len(row.sha256) == 64 for row in batch.quarantined_rows)


@pytest.mark.parametrize(
    "bad", [b"{", {"x": 1}, {"input_ids": [1, 2], "loss_mask": [0, 0]}, QuarantinedRow(0, 2, "unreadable", "0" * 64)]
)
def test_strict_stops_at_the_first_bad_row(bad: Any) -> None:
    batch = encode(row_encoder(strict=True), tokens(1), bad, b"[]")
    assert batch.stop is not None
    assert (batch.stop.source, batch.stop.line) == (0, 2)
    assert batch.stop.reason.endswith(" (data.strict=true stops at the first bad row)")
    assert len(samples(batch)) == 1


def test_strict_lets_long_rows_pass() -> None:
    batch = encode(row_encoder(strict=True, max_seq_len=8), tokens(1, 9), tokens(1))
    assert (batch.stop, batch.row_counts.too_long) == (None, 1)


@pytest.mark.parametrize("row", [messages("x"), {"text": "x"}, Document("x")])
def test_text_without_a_tokenizer_is_an_error_that_says_why_there_is_none(row: Any) -> None:
    with pytest.raises(NeedsTokenizer, match="need"):
        encode(row_encoder(), tokens(1), row)
    config = row_encoder().config
    with pytest.raises(NeedsTokenizer, match=r"^there is no tokenizer here$"):
        encode(RowEncoder(config, 700, None, None, "there is no tokenizer here"), row)


def test_text_needs_no_chat_template(tokenizer: TextTokenizer) -> None:
    encoder = RowEncoder(row_encoder().config, 700, tokenizer, None, "no template")
    assert encode(encoder, {"text": "x"}, tokens(1)).row_counts.accepted == 2
    with pytest.raises(NeedsTokenizer, match="no template"):
        encode(encoder, messages("x"))


def test_remarkable_rows_are_counted(tokenizer: TextTokenizer) -> None:
    thinking = {"messages": [*messages("<think>hm</think>One.")["messages"], *messages("x")["messages"]]}
    batch = encode(row_encoder(tokenizer), thinking, messages("a </think> b"), thinking, b"{")
    assert batch.remarks == {HISTORY_THINKING: 2, TAGS_AS_TEXT: 1}


def test_the_settings_of_what_is_supervised_reach_the_samples(tokenizer: TextTokenizer) -> None:
    row = {"messages": messages("One.")["messages"] * 2}
    shares = {
        loss_on: encode(row_encoder(tokenizer, loss_on=loss_on), row).arrays["num_supervised"].tolist()
        for loss_on in ("last_assistant", "assistant", "all")
    }
    (last,), (every,), (whole_row,) = shares.values()
    assert last * 2 == every < whole_row == encode(row_encoder(tokenizer), row).arrays["lengths"][0] - 1
    kept, masked = (row_encoder(tokenizer, thinking=thinking) for thinking in ("keep", "mask_empty"))
    assert encode(kept, row).arrays["num_supervised"][0] > encode(masked, row).arrays["num_supervised"][0]


def test_an_encoder_can_be_sent_to_another_process(tokenizer: TextTokenizer) -> None:
    encoder = row_encoder(tokenizer, max_seq_len=24, too_long="split")
    sent = pickle.loads(pickle.dumps(encoder))
    rows = [messages("One."), {"text": PROSE}, tokens(1), b"{"]
    first, second = encode(encoder, *rows), encode(sent, *rows)
    assert samples(first) == samples(second)
    assert (first.row_counts, first.quarantined_rows) == (second.row_counts, second.quarantined_rows)
    assert sent.fingerprint == encoder.fingerprint


def test_whatever_decides_what_is_stored_is_in_the_fingerprint(tokenizer: TextTokenizer) -> None:
    changes: list[dict[str, Any]] = [
        *({"format": "messages"}, {"max_seq_len": 99}, {"too_long": "drop"}, {"drop_duplicates": True}),
        *({"loss_on": "all"}, {"thinking": "keep"}, {"template": "qwen2_5"}),
    ]
    prints = [row_encoder(tokenizer, **change).fingerprint for change in ({}, *changes)]
    other = TextTokenizer(small_tokenizer("qwen3", extra=["<think>"]))
    prints += [row_encoder().fingerprint, row_encoder(other).fingerprint]
    assert len({repr(fingerprint) for fingerprint in prints}) == len(prints)
    unchanged = row_encoder(tokenizer, strict=True, packing=False, max_bad_ratio=0.5, val_fraction=0.1, exact_match=3)
    assert unchanged.fingerprint == prints[0]
