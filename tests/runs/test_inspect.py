"""`inspect`: what the data are to the model, for a person and for a machine."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from tests.runs.runs import DEMO, ENVIRONMENT, TINY, qwlit, warm_command

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nthere"}]},
    {"messages": [{"role": "user", "content": "嗨"}]},
    {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "reasoning_content": "easy", "content": "2"},
            {"role": "user", "content": "<think>sure?</think>"},
            {"role": "assistant", "reasoning_content": "yes", "content": "是的。"},
        ]
    },
    {"text": "从前有座山。 " * 30},
]


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS] + ["{broken"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def inspect(folder, *words):
    return qwlit(["inspect", *TINY, "data.path=rows.jsonl", "data.max_seq_len=64", *words], folder)


def test_json_is_one_line_a_sample_with_its_mask_and_nothing_else(folder):
    done = inspect(folder, "output=json")
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["sample"] for s in samples] == list(range(len(samples)))
    for sample in samples:
        assert set(sample) == {"sample", "input_ids", "loss_mask", "num_supervised_tokens"}
        assert len(sample["input_ids"]) == len(sample["loss_mask"]) <= 64
        assert sample["loss_mask"][0] == 0
        assert sum(sample["loss_mask"]) == sample["num_supervised_tokens"] > 0
    assert len(samples) > 3
    assert "5 rows = 3 accepted + 0 too long + 2 quarantined" in done.stderr
    assert json.loads(inspect(folder, "output=json", "sample=1").stdout) == samples[1]


def test_a_person_sees_the_account_the_reasons_the_mask_the_lengths_and_the_packing(folder):
    done = inspect(folder)
    assert done.returncode == 0, done.stderr
    for shown in (
        "5 rows = 3 accepted + 0 too long + 2 quarantined; 0 truncated, 1 split, 0 duplicates",
        "no assistant message: there is no answer to train on  rows.jsonl:2",
        "rows.jsonl:5",
        "[[Hello↵\nthere<|im_end|>]]",
        "[[<think>↵\nyes↵\n</think>↵\n↵\n是的。<|im_end|>]]",
        "<think>sure?</think>",
        "1 rows have reasoning in earlier turns",
        "tokens per sample",
        "step 1: ",
        "template qwen3, loss on assistant, thinking mask_empty",
    ):
        assert shown in done.stdout
    assert not (folder / "runs" / "demo-full_sft-rows").exists()


def test_a_default_system_text_that_is_not_the_familys_is_shown(folder):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    given = "{%- if messages[0].role != 'system' %}{%- set messages = [{'role': 'system', 'content': 'Be [kind].'}] + "
    tokenizer.chat_template = given + "messages %}{%- endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "tokenizer")
    done = inspect(folder, "model.tokenizer=tokenizer")
    assert done.returncode == 0, done.stderr
    said = "template qwen3 with the tokenizer's own system text 'Be [kind].', loss on assistant, thinking mask_empty"
    assert said in done.stdout
    assert "<|im_start|>system\nBe [kind].<|im_end|>" in done.stdout


def test_keys_that_are_not_read_and_rows_that_mean_something_else_are_shown(folder):
    rows = [ROWS[0] | more for more in ({"id": 1}, {"label": False}, {"id": 2})]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = inspect(folder)
    assert done.returncode == 0, done.stderr
    assert "2 rows have a row key that is not read: 'id'" in done.stdout
    assert "'label' is false: the answer is marked as unwanted" in done.stdout


def test_one_sample_is_shown_token_by_token(folder):
    done = inspect(folder, "sample=0")
    assert done.returncode == 0
    assert "yes         '<|im_end|>'" in done.stdout
    assert "quarantined" not in done.stdout


def test_what_train_would_refuse_is_shown_first_and_then_refused_alike(folder):
    with (folder / "rows.jsonl").open("a") as handle:
        handle.write("\n1\n2\n3")
    done = inspect(folder)
    assert done.returncode == 2
    assert "8 rows = 3 accepted + 0 too long + 5 quarantined" in done.stdout
    assert done.stderr.count("\n") == 1
    said = done.stderr.removeprefix("qwlit inspect")
    assert said.startswith(": 5 of 8 rows cannot be used: rows.jsonl:6 and 2 more: ")
    trained = qwlit(["train", *TINY, "data.path=rows.jsonl", "data.max_seq_len=64"], folder)
    assert trained.returncode == 2
    assert trained.stderr.removeprefix("qwlit train") == said


@pytest.mark.parametrize("subcommand", ["inspect", "plan"])
def test_a_reader_that_leaves_early_makes_no_traceback(subcommand, folder):
    (folder / "many.jsonl").write_text("\n".join([json.dumps(ROWS[0])] * 20_000))
    words = warm_command([subcommand, *TINY, "data.path=many.jsonl", "output=json"])
    process = subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    if subcommand == "inspect":
        assert json.loads(process.stdout.readline())["sample"] == 0
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 0


def test_inspecting_json_lines_imports_no_table_library(folder):
    code = (
        "import sys; from qwlit.__main__ import main; sys.argv = ['qwlit', 'inspect', *sys.argv[1:]]; main();"
        "assert 'datasets' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    words = [sys.executable, "-c", code, *TINY, "data.path=rows.jsonl"]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
