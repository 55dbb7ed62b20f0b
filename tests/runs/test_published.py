"""Published folders of every family, in the spelling of transformers 4 and 5: in, through every subcommand, and out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwlit.config.groups import group_options
from tests.published import CONFIGS, published_folder, small_config, write
from tests.runs.runs import qwlit, qwlit_process, summary, weights

CHATS = [
    [{"role": "user", "content": f"{n} + {n}?"}, {"role": "assistant", "content": f"That is {2 * n}. 就是 {2 * n}。"}]
    for n in range(40)
]
FAST = ["hardware=cpu", "optim.lr=1e-3", "preflight.allow=[full_lr]", "logging.every_steps=1", "dropout=none"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS), encoding="utf-8")
    return file


@pytest.fixture(scope="module", params=CONFIGS)
def published(request, tmp_path_factory, real_tokenizer_folder) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("published") / "model"
    return request.param, published_folder(request.param, folder, real_tokenizer_folder)


@pytest.fixture(scope="module")
def trained(published, chats, tmp_path_factory) -> tuple[str, Path, Path]:
    """The model's name, its folder, and the run of two steps on it."""
    name, folder = published
    place = tmp_path_factory.mktemp("trained")
    asked = [f"model.path={folder}", f"data.path={chats}", "data.val_fraction=0.2", "run.name=a", "train.max_steps=2"]
    done = qwlit(["train", *FAST, *asked], place)
    assert done.returncode == 0, done.stderr
    return name, folder, place / "runs" / "a"


def derived(words: list[str], folder: Path) -> dict[str, Any]:
    done = qwlit(["plan", "output=json", "hardware=cpu", *words], folder)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    return {key: value for key, value in plan.items() if key not in ("name", "findings")}


def test_inspect_shows_every_sample(published, chats, tmp_path):
    _, folder = published
    done = qwlit(["inspect", "output=json", f"model.path={folder}", f"data.path={chats}"], tmp_path)
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [sample["input_ids"] for sample in samples] == [
        tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS
    ]


def test_plan_counts_the_parameters_of_the_folder(published, chats, tmp_path):
    _, folder = published
    plan = derived([f"model.path={folder}", f"data.path={chats}"], tmp_path)
    state = load_file(folder / "model.safetensors")
    assert plan["parameters"]["total"] == sum(tensor.numel() for tensor in state.values())


PRESETS = {
    "Qwen2.5-0.5B-Instruct": "qwen2_5_0_5b",
    "Qwen2.5-1.5B-Instruct": "qwen2_5_1_5b",
    "Qwen2.5-1.5B-Instruct, saved again by transformers 5": "qwen2_5_1_5b",
    "Qwen2.5-7B-Instruct": "qwen2_5_7b",
    "Qwen3-0.6B": "qwen3_0_6b",
    "Qwen3-32B": "qwen3_32b",
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", ["full_sft", "lora"])
def test_preset_and_published_configuration_agree_in_every_number_of_the_plan(name, recipe, tmp_path):
    assert PRESETS[name] in group_options()["model"]
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "config.json", CONFIGS[name])
    rows = "".join(
        json.dumps({"input_ids": [i, i + 1, i + 2], "labels": [-100, i + 1, i + 2]}) + "\n" for i in range(64)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    asked = [f"recipe={recipe}", "data.path=rows.jsonl"]
    with_folder = derived([*asked, f"model.path={tmp_path / 'model'}"], tmp_path)
    assert with_folder == derived([*asked, f"model={PRESETS[name]}"], tmp_path)


def test_the_export_is_the_trained_model_once_in_the_dtype_it_came_in(trained):
    name, folder, run = trained
    tied = CONFIGS[name]["tie_word_embeddings"]
    state = load_file(run / "export" / "model.safetensors")
    assert ("lm_head.weight" in state) != tied
    best = weights(run, "best")
    assert state.keys() == best.keys() == load_file(folder / "model.safetensors").keys()
    assert all(torch.equal(state[key], best[key].bfloat16()) for key in state)
    size = (run / "export" / "model.safetensors").stat().st_size
    assert (run / "export" / "model.safetensors").stat().st_mode == (run / "export" / "config.json").stat().st_mode
    assert size == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.01)


def test_config_json_keeps_what_training_did_not_change_and_reads_in_both_spellings(trained):
    _, folder, run = trained
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, run / "export"))
    assert after["eos_token_id"] == 151645
    assert (after["rope_theta"], after["torch_dtype"]) == (1_000_000, "bfloat16")
    assert all(after[key] == value for key, value in before.items() if key != "eos_token_id")
    assert set(after) - set(before) <= {"rope_theta", "torch_dtype"}


def test_the_trained_model_stops_at_the_end_of_a_turn(trained):
    _, folder, run = trained
    generation = json.loads((run / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643]
    before = json.loads((folder / "generation_config.json").read_text())
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    kept = {key: value for key, value in before.items() if key != "eos_token_id"}
    assert generation | kept | sampled == generation
    assert AutoTokenizer.from_pretrained(run / "export").eos_token == "<|im_end|>"


def test_the_tokenizers_own_files_are_copied(trained):
    _, folder, run = trained
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (run / "export" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((run / "export" / "tokenizer_config.json").read_text()) == json.loads(
        (folder / "tokenizer_config.json").read_text()
    ) | {"eos_token": "<|im_end|>"}


def test_transformers_reloads_what_train_leaves(trained):
    _, _, run = trained
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 1_000_000
    for key, tensor in weights(run, "best").items():
        assert torch.equal(model.state_dict()[key], tensor.bfloat16())


def test_train_starts_from_what_train_leaves(trained, chats, tmp_path):
    _, _, run = trained
    asked = [f"model.path={run / 'export'}", f"data.path={chats}", "run.name=b", "train.max_steps=1"]
    done = qwlit(["train", *FAST, *asked], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B"])
def test_every_other_subcommand_takes_a_published_folder(name, chats, real_tokenizer_folder, tmp_path):
    folder = published_folder(name, tmp_path / "model", real_tokenizer_folder)
    asked = [f"model.path={folder}", f"data.path={chats}", "data.val_fraction=0.2", "hardware=cpu", "dropout=none"]
    calls = [
        ["submit", "dry_run=true", *asked, "run.name=s"],
        ["sweep", "sweep=full_sft", "backend=optuna", "trials=1", *asked, "train.max_steps=1"],
        ["report", "runs=[runs/*]"],
    ]
    for words in calls:
        done = qwlit_process(words, tmp_path)
        assert done.returncode == 0, (words, done.stdout + done.stderr)


def test_a_chosen_template_is_the_exported_one(chats, real_tokenizer_folder, tmp_path):
    folder = published_folder("Qwen2.5-0.5B", tmp_path / "model", real_tokenizer_folder)
    (folder / "chat_template.jinja").unlink()
    asked = [f"model.path={folder}", f"data.path={chats}", "data.template=qwen3", "run.name=a", "train.max_steps=1"]
    done = qwlit(["train", *FAST, *asked], tmp_path)
    assert done.returncode == 0, done.stderr
    export = tmp_path / "runs" / "a" / "export"
    exported, official = (AutoTokenizer.from_pretrained(f) for f in (export, real_tokenizer_folder("qwen3")))
    for chat in CHATS[:3]:
        assert exported.apply_chat_template(chat, tokenize=False) == official.apply_chat_template(chat, tokenize=False)
    assert not (export / "chat_template.jinja").exists(), "a published folder has it in tokenizer_config.json"


@pytest.mark.parametrize("declared", [{}, {"torch_dtype": "auto"}, {"torch_dtype": "torch.bfloat16"}])
def test_weights_without_a_declared_dtype_are_exported_as_they_came(declared, chats, real_tokenizer_folder, tmp_path):
    folder = published_folder("Qwen2.5-0.5B-Instruct", tmp_path / "model", real_tokenizer_folder)
    values = {key: value for key, value in small_config("Qwen2.5-0.5B-Instruct").items() if key != "torch_dtype"}
    write(folder / "config.json", values | declared)
    write(folder / "generation_config.json", {"temperature": 0.7, "do_sample": False, "eos_token_id": [151645]})
    asked = [f"model.path={folder}", f"data.path={chats}", "run.name=a", "train.max_steps=1"]
    done = qwlit(["train", *FAST, *asked], tmp_path)
    assert done.returncode == 0, done.stderr
    export = tmp_path / "runs" / "a" / "export"
    assert {tensor.dtype for tensor in load_file(export / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((export / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((export / "generation_config.json").read_text())["temperature"] == 0.7
    assert summary(tmp_path / "runs" / "a")["status"] == "done"
