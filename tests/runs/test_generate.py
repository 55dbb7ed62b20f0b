"""`generate`: the answers are those of plain transformers on the export; what goes wrong is said in a line."""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwlit.inference.answer import answers
from tests.runs.runs import qwlit

GREEDY = ["generation.temperature=0", "generation.repetition_penalty=1"]
SHORT = ["generation.max_new_tokens=4"]
RANDOM = ["generation.temperature=50", "generation.top_k=0", "generation.top_p=1"]
"""Almost any token: no end and no </think> within a few tokens."""
SAMPLED = ["generation.temperature=0.9", "seed=5"]


def answers_of(words, trained) -> list[dict]:
    done = qwlit(["generate", *words, "prompts=asked.jsonl", "output=made/answers.jsonl"], trained)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (trained / "made/answers.jsonl").read_text(encoding="utf-8").splitlines()]


def plain_answers(folder, records, **settings) -> list[str]:
    """The answers of plain transformers, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for record in records:
        ids = tokenizer.apply_chat_template(
            record["messages"], add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        config = GenerationConfig(max_new_tokens=24, eos_token_id=model.generation_config.eos_token_id, **settings)
        out = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :]
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    return texts


def test_greedy_answers_of_a_batch_are_those_of_plain_transformers_one_by_one(trained):
    records = answers_of(["run=full", *GREEDY, "generation.max_new_tokens=24"], trained)
    assert len(records) == 8 and all(record["expected"] for record in records)
    export = trained / "runs/full/export"
    assert [r["answer"] for r in records] == plain_answers(export, records, do_sample=False, repetition_penalty=1.0)
    alone = answers_of(["run=full", *GREEDY, "generation.max_new_tokens=24", "generation.batch_size=1"], trained)
    assert alone == records
    folder = answers_of([f"model.path={export}", *GREEDY, "generation.max_new_tokens=24"], trained)
    assert folder == records


def test_sampled_answers_are_those_of_plain_transformers_with_the_same_seed(trained):
    words = ["run=full", *SAMPLED, "generation.max_new_tokens=24", "generation.batch_size=1"]
    records = answers_of(words, trained)
    torch.manual_seed(5)
    plain = plain_answers(
        *(trained / "runs/full/export", records),
        **{"do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    )
    assert [record["answer"] for record in records] == plain
    assert answers_of(words, trained) == records


def test_the_adapter_of_a_run_answers_as_its_export_does(trained):
    words = [*GREEDY, "generation.max_new_tokens=12"]
    records = answers_of(["run=lora", *words], trained)
    assert records == answers_of([f"model.path={trained / 'runs/lora/export'}", *words], trained)
    assert records != answers_of(["run=full", *words], trained)


def test_a_conversation_in_the_terminal_has_several_turns(trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("把78 km写成英文。\nand in Chinese?\n/new\nhello\n"))
    done = qwlit(["generate", "run=full", "generation.max_new_tokens=4"], trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") >= 4 and "step-000016" in done.stdout and "/new" in done.stdout


def test_ctrl_c_stops_the_answer_and_not_the_conversation(trained, monkeypatch):
    asked = []

    def answered(model, prompts, settings, **streamer):
        asked.append([message.content for message in prompts[0].conversation.messages])
        if len(asked) == 1:
            raise KeyboardInterrupt
        return answers(model, prompts, settings, **streamer)

    monkeypatch.setattr("qwlit.inference.talk.answers", answered)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a long story\nhello\n"))
    done = qwlit(["generate", "run=full", *SHORT], trained)
    assert done.returncode == 0 and "stopped; question and answer are left out" in done.stdout
    assert asked == [["a long story"], ["hello"]]


def test_a_checkpoint_is_chosen_by_its_path_and_a_damaged_best_is_passed_over(trained):
    done = qwlit(["chat", "run=runs/full/checkpoints/step-000008", "prompt=a", *SHORT], trained)
    assert done.returncode == 0 and "step-000008" in done.stdout
    file = trained / "runs/full/checkpoints/step-000016/model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = qwlit(["generate", "run=full", "prompt=a", *SHORT], trained)
    finally:
        file.write_bytes(whole)
    assert done.returncode == 0 and "step-000016 is damaged" in done.stdout and "full, step-000008" in done.stdout


def test_logits_that_are_not_finite_are_named_instead_of_a_failed_sampling(trained):
    export = trained / "broken"
    export.mkdir()
    for file in (trained / "runs/full/export").iterdir():
        (export / file.name).write_bytes(file.read_bytes())
    weights = load_file(export / "model.safetensors")
    for name in ("up_proj", "down_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1e30
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})
    done = qwlit(["generate", f"model.path={export}", "prompt=a"], trained)
    assert done.returncode == 3 and "not finite" in done.stderr and done.stderr.count("\n") == 1


def changed_export(trained, name, changes):
    """A copy of the export with other values in its JSON files."""
    folder = trained / name
    shutil.copytree(trained / "runs/full/export", folder)
    for file, values in changes.items():
        path = folder / file
        if isinstance(values, str):
            path.write_text(values)
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_what_the_folder_says_of_sampling_beside_the_settings_changes_no_answer(trained):
    forbidding = {"suppress_tokens": list(range(40)), "bad_words_ids": [[50]], "min_p": 0.9, "min_new_tokens": 20}
    folder = changed_export(trained, "forbidding", {"generation_config.json": forbidding})
    words = [*SAMPLED, "generation.max_new_tokens=8"]
    assert answers_of([f"model.path={folder}", *words], trained) == answers_of(["run=full", *words], trained)


def test_where_the_template_opens_the_thinking_the_answer_begins_after_it(trained):
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    folder = changed_export(trained, "always", {"chat_template.jinja": turns + asks})
    records = answers_of([f"model.path={folder}", *RANDOM, *SHORT], trained)
    assert all(record["answer"] == "" and record["thinking"] for record in records)
    stopped = answers_of(
        [f"model.path={folder}", *RANDOM, *SHORT, f"generation.stop={records[0]['thinking'][:1]}"], trained
    )
    assert stopped[0]["ended"] and "thinking" not in stopped[0]
    done = qwlit(["generate", f"model.path={folder}", "prompt=a", "generation=thinking", *SHORT], trained)
    assert "no switch for thinking" in done.stdout


def test_an_answer_ends_where_the_positions_of_the_model_do(trained):
    folder = changed_export(trained, "narrow", {"config.json": {"max_position_embeddings": 40}})
    done = qwlit(["generate", f"model.path={folder}", "prompt=a b c d e f", *RANDOM], trained)
    assert done.returncode == 0 and "max_position_embeddings" in done.stdout, done.stdout


def test_an_adapter_answers_on_its_own_base_alone(trained):
    moved = trained / "moved"
    shutil.copytree(trained / "runs/full/export", moved)
    words = ["generate", "run=lora", f"model.path={moved}", "prompt=a", *SHORT]
    assert qwlit(words, trained).returncode == 0
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    done = qwlit(words, trained)
    assert done.returncode == 2 and "is not the one that" in done.stderr and "was trained on" in done.stderr


def test_where_the_base_of_a_run_was_moved_its_new_place_can_be_named(trained):
    settings, base = trained / "runs/lora/config.yaml", trained / "runs/full/export"
    before = settings.read_text()
    settings.write_text(before.replace(f"path: {base}", "path: gone"))
    words = ["generate", "run=lora", "prompt=hello", *SHORT]
    done = qwlit(words, trained)
    named = qwlit([*words, f"model.path={base}"], trained)
    settings.write_text(before)
    assert done.returncode == 2 and "its base model is not at gone; name its new place" in done.stderr
    assert named.returncode == 0, named.stderr


def test_columns_of_a_file_of_prompts_are_renamed(trained):
    (trained / "other.jsonl").write_text(json.dumps({"q": "hello", "a": "x"}) + "\n")
    columns = ["data.columns.prompt=q", "data.columns.completion=a"]
    done = qwlit(["generate", "run=full", "prompts=other.jsonl", "output=o.jsonl", *columns, *SHORT], trained)
    assert done.returncode == 0 and '"expected": "x"' in (trained / "o.jsonl").read_text(), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=a"], "name a model: run=NAME"),
        (["run=nobody", "prompt=a"], "run=nobody: neither"),
        (["run=full", "prompt=a", "prompts=b", "output=c"], "give one of them"),
        (["run=full", "prompts=asked.jsonl"], "output=FILE.jsonl"),
        (["run=full", "prompt=a", "generation=thinkin"], "Did you mean 'thinking'?"),
        (["run=full", "prompt=a", "generation.temperature=-1"], "generation.temperature"),
        (["run=full", "prompt=a", "temperature=1"], "generation.temperature"),
        (["run=full", "prompts=nothing.jsonl", "output=c.jsonl"], "nothing.jsonl' does not exist"),
        (["run=full", "prompts=asked.jsonl", "output=./asked.jsonl"], "is the file of the prompts"),
        (["run=full", "prompt=a\udcff"], "is not UTF-8"),
        (["run=full", "prompts=asked.jsonl", "output=asked.jsonl/x.jsonl"], "asked.jsonl: "),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(trained, words, said):
    done = qwlit(["generate", *words], trained)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
