"""Every format and kind of file trains from the command line, and the same conversation is the same sample in each."""

import json
import signal
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from qwlit.data.tokenizer import TextTokenizer
from tests.formats import (
    FIXTURES,
    FORMATS,
    KINDS,
    TALKS,
    as_alpaca,
    as_messages,
    csv_bytes,
    json_lines,
    talks,
    with_tools,
)
from tests.real_tokenizer import small_tokenizer
from tests.runs.runs import (
    ENVIRONMENT,
    assert_same_run,
    losses,
    qwlit_process,
    rows,
    started,
    summary,
    train,
)
from tests.stores import build

TWO_STEPS = ["train.max_steps=2", "dropout=none", "run.name=a"]
Samples = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer("qwen3", extra=["<think>", "</think>", "<tool_call>", "</tool_call>"]))


@pytest.mark.parametrize("name", FIXTURES)
def test_every_format_and_kind_of_file_trains(name: str, tmp_path: Path) -> None:
    fixture = FIXTURES[name]
    run = train([fixture.write(tmp_path), *TWO_STEPS, *fixture.words], tmp_path)
    done = summary(run)
    assert (done["status"], done["steps"]) == ("done", 2)
    counts = done["rows"]
    assert counts["read"] == fixture.num_rows == counts["accepted"] + counts["too_long"] + counts["quarantined"]
    assert counts["accepted"] == fixture.num_rows
    assert [step for step, _ in losses(run)] == [1, 2]
    assert rows(run, "quarantine.jsonl") == []


def samples_of(path: Path, tokenizer: TextTokenizer) -> Samples:
    store = build(path, tokenizer)
    assert store.row_counts.accepted == store.row_counts.read
    return [(ids.tolist(), mask.tolist()) for ids, mask in map(store.read, [[i] for i in range(len(store))])]


# A prompt of several messages is no text, and a table has texts alone.
COMBINATIONS = [
    (name, kind, turns)
    for name, kind, turns in product(FORMATS, KINDS, (1, 3))
    if (name, turns) != ("prompt_completion", 3) or "csv" not in kind
]


@pytest.mark.parametrize(("name", "kind", "turns"), COMBINATIONS)
def test_the_same_conversation_is_the_same_sample_in_every_format_and_kind_of_file(
    name: str, kind: str, turns: int, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    said = talks(12, turns=turns)
    plain, other = tmp_path / "plain.jsonl", tmp_path / f"rows.{kind}"
    plain.write_bytes(json_lines([as_messages(talk) for talk in said]))
    other.write_bytes(KINDS[kind]([FORMATS[name](talk) for talk in said]))
    samples = samples_of(plain, tokenizer)
    assert len(samples) == 12 and all(0 < sum(mask) < len(mask) for _, mask in samples)
    assert samples_of(other, tokenizer) == samples


@pytest.mark.parametrize("kind", KINDS)
def test_tools_and_reasoning_are_the_same_in_every_kind_of_file(
    kind: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    made = [with_tools(number) for number in range(6)]
    plain, other = tmp_path / "plain.jsonl", tmp_path / f"rows.{kind}"
    plain.write_bytes(json_lines(made))
    other.write_bytes(KINDS[kind](made))
    assert samples_of(other, tokenizer) == samples_of(plain, tokenizer)


def test_tool_calls_are_the_same_as_turns_of_their_own(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    def without_reasoning(number: int) -> dict[str, Any]:
        row = with_tools(number)
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in row["messages"]]
        return {"messages": messages, "tools": row["tools"]}

    def as_turns(row: dict[str, Any]) -> dict[str, Any]:
        asked, called, observed, answered = row["messages"]
        spoken = (
            ("human", asked["content"]),
            ("function_call", json.dumps(called["tool_calls"][0])),
            ("observation", observed["content"]),
            ("gpt", answered["content"]),
        )
        turns = [{"from": speaker, "value": text} for speaker, text in spoken]
        return {"conversations": turns, "tools": json.dumps(row["tools"])}

    made = [without_reasoning(number) for number in range(4)]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(json_lines(made))
    b.write_bytes(json_lines([as_turns(row) for row in made]))
    assert samples_of(a, tokenizer) == samples_of(b, tokenizer)


MIXTURE = "data.path=[{path:a.jsonl,weight:3},{path:b.csv,weight:1}]"


def write_mixture(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(json_lines([as_messages(talk) for talk in talks(40)]))
    (folder / "b.csv").write_bytes(csv_bytes([as_alpaca(talk) for talk in talks(20)]))


def test_a_weighted_mixture_that_is_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    write_mixture(tmp_path)
    words = [MIXTURE, "train.max_steps=40", "checkpoint.every_steps=3", "dropout=pretrain"]
    whole = train([*words, "run.name=whole"], tmp_path)
    cut = tmp_path / "runs" / "cut"
    process = started([*words, "run.name=cut"], cut, logged=5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    train([*words, "run.name=cut"], tmp_path)
    assert 0 < summary(cut)["resumed_from"] < 40
    assert_same_run(whole, cut)
    assert summary(cut)["rows"]["read"] == 60


CHINESE_PATHS = [
    "[数据.jsonl,b.jsonl]",
    "[b.jsonl,训练/第一 部分.jsonl]",
    "[{path:数据.jsonl,weight:3},{path:b.jsonl,weight:1}]",
]


@pytest.mark.parametrize("paths", CHINESE_PATHS)
def test_a_list_of_files_with_chinese_names_trains(paths: str, tmp_path: Path) -> None:
    (tmp_path / "训练").mkdir()
    for name in ("数据.jsonl", "b.jsonl", "训练/第一 部分.jsonl"):
        (tmp_path / name).write_bytes(json_lines([as_messages(talk) for talk in TALKS]))
    run = train([f"data.path={paths}", *TWO_STEPS], tmp_path)
    assert (summary(run)["status"], summary(run)["rows"]["read"]) == ("done", 48)


def test_a_data_set_of_the_hub_without_the_hub_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "HF_HOME", str(tmp_path / "hub"))
    done = qwlit_process(["train", "model=demo", "hardware=cpu", "data.path=hf:org/name"], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "hf:org/name" in done.stderr, done.stderr
