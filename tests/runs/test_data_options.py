"""Options of the data on the command line, each against the same data written by hand or a separate run."""

import json

from transformers import AutoTokenizer

from tests.runs.runs import DEMO, TINY, qwlit, train

SHORT = ["train.max_steps=2", "data.val_fraction=0.2", "train.global_batch_size=4"]


def inspected(folder, *words):
    """The tokens of every training sample."""
    done = qwlit(["inspect", *TINY, *words, "output=json"], folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["input_ids"] for line in done.stdout.splitlines()]


def refused(folder, *words):
    done = qwlit(["inspect", *TINY, *words], folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_file_with_other_names_is_inspected_as_the_same_file_renamed(place):
    (place / "own.csv").write_text("question,answer\n1 + 1?,2\n一加二？,三\n", encoding="utf-8")
    (place / "renamed.csv").write_text("instruction,output\n1 + 1?,2\n一加二？,三\n", encoding="utf-8")
    columns = "data.columns={instruction: question, output: answer}"
    assert inspected(place, "data.path=own.csv", columns) == inspected(place, "data.path=renamed.csv")
    assert "columns here: 'instruction', 'output'" in refused(place, "data.path=renamed.csv", columns)


def test_a_system_text_is_in_the_training_and_in_the_export_as_a_system_turn_of_each_row_would_be(place):
    chats = [json.loads(line)["messages"] for line in (place / "chat.jsonl").read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    system = "data.system=Add, 不要解释."
    explicit = [[{"role": "system", "content": "Add, 不要解释."}, *chat] for chat in chats]
    expected = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in explicit]
    assert inspected(place, "data.path=chat.jsonl", system) == expected
    assert inspected(place, "data.path=chat.jsonl") != expected, "without the text the stored tokens are others"
    run = train([*SHORT, "data.path=chat.jsonl", system, "run.name=a", "data.exact_match=2"], place)
    exported = AutoTokenizer.from_pretrained(run / "export")
    assert [exported.apply_chat_template(chat, return_dict=False) for chat in chats] == expected
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    assert all(sample["prompt"].startswith("<|im_start|>system\nAdd, 不要解释.<|im_end|>") for sample in samples)
