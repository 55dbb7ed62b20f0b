"""The bundled demo corpus: what the script makes, solvable, and honest about what validation measures."""

import importlib.util
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import parse_conversation
from qwlit.data.recognise import resolve_template
from qwlit.data.templates import Supervision
from qwlit.data.tokenizer import TextTokenizer

pytest.importorskip("babel")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src/qwlit/resources/demo"
SPLITS = ("train", "val")
CONTROL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]


@pytest.fixture(scope="module")
def make_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "scripts/make_demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(make_demo: ModuleType) -> dict[str, list[Any]]:
    return {split: make_demo.make_corpus(split) for split in SPLITS}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (DEMO / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "tokenizer", local_files_only=True)


def is_plain(row: dict[str, Any]) -> bool:
    roles = [message["role"] for message in row["messages"]]
    return roles == ["user", "assistant"] and "reasoning_content" not in row["messages"][1] and "tools" not in row


def render(tokenizer: Any, row: dict[str, Any]) -> str:
    return tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)


def test_the_committed_files_are_what_the_script_makes(make_demo: ModuleType, corpus: dict[str, list[Any]]) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for package in ("babel", "tokenizers"):
        if version(package) != pinned.get(package):
            pytest.skip(f"the files were made with {package} {pinned.get(package)}")
    for name, text in make_demo.make_files(corpus).items():
        assert (DEMO / name).read_text(encoding="utf-8") == text, name


def test_train_and_validation_share_no_value(corpus: dict[str, list[Any]]) -> None:
    train, val = ({(s.value.kind, s.value.key) for s in corpus[split]} for split in SPLITS)
    assert len(val) > 200
    assert not train & val


def test_every_row_writes_its_own_value(corpus: dict[str, list[Any]]) -> None:
    for sample in corpus["train"] + corpus["val"]:
        messages, forms = sample.row["messages"], sample.value.forms.values()
        asked = next(message["content"] for message in messages if message["role"] == "user")
        assert any(form in asked for form in forms)
        assert messages[-1]["content"] in forms


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_messages_that_end_with_an_answer(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    for row in rows[split]:
        messages = row["messages"]
        assert all(isinstance(message["content"], str) for message in messages)
        roles = " ".join(message["role"] for message in messages)
        assert re.fullmatch(r"(system )?user assistant( user assistant| tool assistant)?", roles), roles
        assert messages[-1]["content"].strip()
        for call in (call for message in messages for call in message.get("tool_calls", [])):
            assert call["function"]["name"] in [tool["function"]["name"] for tool in row["tools"]]
            assert isinstance(call["function"]["arguments"], dict)


def test_no_prompt_has_two_answers(rows: dict[str, list[dict[str, Any]]]) -> None:
    answers: dict[str, str] = {}
    for row in rows["train"] + rows["val"]:
        *prompt, answer = row["messages"]
        key = json.dumps([prompt, row.get("tools")])
        assert answers.setdefault(key, answer["content"]) == answer["content"]


def test_validation_starts_plain_and_has_every_kind(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert sum(map(is_plain, rows["val"][:250])) >= 210
    messages = [row["messages"] for row in rows["val"]]
    assert sum("tools" in row for row in rows["val"]) >= 4
    assert sum("reasoning_content" in m[-1] for m in messages) >= 4
    assert sum(m[0]["role"] == "system" for m in messages) >= 4
    assert sum([message["role"] for message in m].count("user") > 1 for m in messages) >= 4


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_prompts_are_chinese(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    verbs = re.compile("写|表示|改")
    chinese = sum(bool(verbs.search(row["messages"][0]["content"])) for row in rows[split])
    assert 0.45 < chinese / len(rows[split]) < 0.55


def test_rows_are_short(tokenizer: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    lengths = [(is_plain(row), len(tokenizer(render(tokenizer, row)).input_ids)) for row in rows["val"]]
    assert max(length for plain, length in lengths if plain) <= 120
    assert max(length for _, length in lengths) < 400
    assert (DEMO / "train.jsonl").stat().st_size < 2.5e6


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_encoded_as_the_tokenizers_own_template_writes_it(
    tokenizer: Any, rows: dict[str, list[dict[str, Any]]], split: str
) -> None:
    text_tokenizer = TextTokenizer(tokenizer)
    encoder = ChatEncoder(text_tokenizer, resolve_template(tokenizer, "auto"), Supervision())
    some = rows[split][::10]
    conversations = [parse_conversation(row["messages"], row.get("tools")) for row in some]
    for row, sample in zip(some, encoder.encode_batch(map(encoder.render, conversations)), strict=True):
        assert sample.input_ids == tokenizer(render(tokenizer, row)).input_ids
        assert 1 in sample.loss_mask


def test_the_tokenizer_loads_offline_and_round_trips(tokenizer: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(DEMO / "tokenizer/tokenizer.json"))
    for row in rows["val"]:
        text = render(tokenizer, row)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert ids == plain.encode(text).ids


def test_control_tokens_follow_the_vocabulary_as_in_qwen3(tokenizer: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS)
    assert ids == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert [tokenizer.decode(i, skip_special_tokens=True) for i in ids] == [""] * 3 + CONTROL_TOKENS[3:]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == (
        "<|im_end|>",
        "<|endoftext|>",
        32768,
    )
