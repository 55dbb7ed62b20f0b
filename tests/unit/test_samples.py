import pickle
from pathlib import Path

import numpy as np
import pytest

from qwlit.data import samples as samples_module
from qwlit.data.samples import (
    ConcatSamples,
    Samples,
    SampleSubset,
    chunks,
    concat,
    count_tokens,
    longest,
    sample_statistics,
)
from tests.stores import build, first_tokens, lengths, num_supervised, tokens, write


@pytest.fixture
def parts(tmp_path: Path) -> list[Samples]:
    """Stores of 5, 1, 0 and 20 samples, all of different first tokens and lengths."""
    found = []
    first = 0
    for number, size in enumerate((5, 1, 0, 20)):
        rows = [tokens(first + index, 3 + first + index) for index in range(size)]
        # The quarantined row keeps the file from being empty.
        found.append(build(write(tmp_path / f"{number}.jsonl", [b"{", *rows])))
        first += size
    return found


def test_some_of_the_samples_in_the_order_chosen(parts: list[Samples]) -> None:
    whole = parts[3]
    chosen = SampleSubset(whole, np.array([7, 3, 3, 19], dtype=np.int32))
    assert len(chosen) == 4
    assert first_tokens(chosen) == [first_tokens(whole)[i] for i in (7, 3, 3, 19)]
    assert lengths(chosen) == [lengths(whole)[i] for i in (7, 3, 3, 19)]
    assert num_supervised(chosen) == [num_supervised(whole)[i] for i in (7, 3, 3, 19)]
    assert [chosen.origin(i) for i in range(4)] == [whole.origin(i) for i in (7, 3, 3, 19)]


def test_parts_laid_end_to_end_are_numbered_through(parts: list[Samples]) -> None:
    joined = concat(parts)
    assert isinstance(joined, ConcatSamples)
    assert len(joined) == 26
    assert first_tokens(joined) == list(range(26))
    assert lengths(joined) == [3 + index for index in range(26)]
    assert num_supervised(joined) == [2 + index for index in range(26)]
    assert [joined.origin(i) for i in range(26)] == [part.origin(i) for part in parts for i in range(len(part))]
    assert joined.lengths(np.array([25, 0, 5, 5])).tolist() == [28, 3, 8, 8]
    assert joined.lengths(np.array([25, 0])).dtype == np.int32


def test_one_part_is_itself(parts: list[Samples]) -> None:
    assert concat(parts[:1]) is parts[0]


def test_views_can_be_nested_and_sent_to_other_processes(parts: list[Samples]) -> None:
    chosen = [SampleSubset(part, np.arange(len(part), dtype=np.int32)[::2]) for part in parts]
    joined = concat(chosen)
    assert first_tokens(joined) == [0, 2, 4, 5, *range(6, 26, 2)]
    loaded = pickle.loads(pickle.dumps(joined))
    assert first_tokens(loaded) == first_tokens(joined)
    assert lengths(loaded) == lengths(joined)


@pytest.mark.parametrize("chunk", [1, 7, 26, 2**20])
def test_sums_over_all_samples_do_not_depend_on_how_many_are_looked_at_a_time(
    chunk: int, parts: list[Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "CHUNK", chunk)
    joined = concat(parts)
    assert np.concatenate(list(chunks(joined))).tolist() == list(range(26))
    assert longest(joined) == 28
    assert count_tokens(joined) == (sum(range(3, 29)), sum(range(2, 28)))


def test_statistics_count_every_sample_and_name_percentiles_that_occur(parts, monkeypatch):
    monkeypatch.setattr(samples_module, "CHUNK", 4)
    joined = concat(parts)
    found = sample_statistics(joined)
    assert found["number"] == 26
    for kind, counts in (("tokens", lengths(joined)), ("supervised_tokens", num_supervised(joined))):
        assert found[kind]["sum"] == sum(counts)
        percentiles = found[kind]["percentiles"]
        assert len(percentiles) == 21 and set(percentiles) <= set(counts)
        assert (percentiles[0], percentiles[-1]) == (min(counts), max(counts))
        assert percentiles[10] in (sorted(counts)[12], sorted(counts)[13])
