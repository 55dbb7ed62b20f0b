"""The command line in a process of its own: help, subcommands, and one-line errors for what is missing."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.runs.runs import DEMO, ENVIRONMENT, TINY, qwlit, qwlit_process
from tests.tiny import save_folder, tiny_causal_lm


def test_help_names_the_subcommands_without_importing_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['qwlit', '--help']; from qwlit.__main__ import main; main();"
        "heavy = {'torch', 'transformers', 'lightning', 'hydra', 'wandb', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "Exit codes" in done.stdout


def test_train_help_lists_every_group_and_setting(tmp_path):
    done = qwlit(["train", "--help"], tmp_path)
    assert done.returncode == 0
    for word in ("recipe", "full_sft", "optim.lr=1e-05", "hardware.micro_batch_tokens=auto", "experiment=demo"):
        assert word in done.stdout


def test_inspect_help_shows_its_own_words_and_the_settings_of_data(tmp_path):
    done = qwlit(["inspect", "--help"], tmp_path)
    assert done.returncode == 0
    for word in ("output=json", "sample=N", "data.loss_on=assistant", "data.too_long=auto", "num_supervised_tokens"):
        assert word in done.stdout
    assert "optim.lr" not in done.stdout


def test_cfg_job_prints_the_settings_and_trains_nothing(tmp_path):
    done = qwlit(["train", "experiment=demo", "--cfg", "job"], tmp_path)
    assert done.returncode == 0
    assert "global_batch_size: 32" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "no such subcommand. Did you mean 'train'"),
        (["inspect", *TINY, "output=jsn"], "output=jsn: choose one of text, json.*'json'"),
        (["inspect", *TINY, "sample=first"], "sample=first: give a whole number of at least 0"),
        (["inspect", *TINY, "sample=8000"], "sample=8000: there are 8000 samples, 0 to 7999"),
        (["inspect", *TINY, "data.loss_on=assistent"], "data.loss_on=assistent: .*Did you mean 'assistant'"),
        (["inspect", *TINY, "data.path=[]"], "data.path=.*the list is empty"),
        (["inspect", *TINY, "data.path=[{path:a,weigth:2}]"], "'weigth' is not a setting of a part"),
        (["inspect", *TINY, "data.path=[{path:a,weight:0}]"], "weight 0 of a must be a number above 0"),
        (["inspect", *TINY, "data.path=[{path:a,weight:1},b]"], "give all parts a weight, or no part"),
        (["inspect", *TINY, "data.val_path=[{path:a,weight:1}]"], "data.val_path takes no weights"),
        (["train", "--hlep"], "no such option. Did you mean '--help'"),
        (["train", "experiment=demo", "optim.lr=abc"], "optim.lr=abc"),
        (["train", "hardware=a100x4", "recipe=full_sft"], "hardware=a100x4 needs 4 CUDA devices.*experiment=demo"),
        (["train", "data.path=nowhere.jsonl", *TINY], "nowhere.jsonl"),
        (["train", "model.path=nowhere"], "nowhere"),
        (
            ["train", *TINY, "determinism=strict", "hardware.precision=bf16-mixed"],
            "determinism=strict trains in float32",
        ),
        (["train", *TINY, "model.attention=varlen"], "model.attention=varlen: varlen needs CUDA; set model.att"),
        (["train", *TINY, "determinism=strict", "hardware.compile=true"], "determinism=strict does not compile"),
        (["train", *TINY, "hardware.micro_batch_tokens=8"], "hardware.micro_batch_tokens=8: the longest sample"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line_and_code_2(words, said, tmp_path):

    done = qwlit(words, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_without_the_hub_the_default_model_ends_in_one_line_soon(tmp_path):
    began = time.monotonic()
    done = qwlit_process(["train", "hardware=cpu"], tmp_path)
    assert done.returncode == 2
    assert "Qwen/Qwen3-0.6B" in done.stderr and "experiment=demo" in done.stderr and done.stderr.count("\n") == 1
    assert time.monotonic() - began < 60


def test_the_environments_secrets_reach_no_file_of_the_run(tmp_path):
    environment = ENVIRONMENT | {"WANDB_API_KEY": "secret-of-mine-1", "HF_TOKEN": "secret-of-mine-2"}
    words = ["train", "experiment=demo", "train.max_steps=2", "data.exact_match=0", "run.name=a"]
    subprocess.run(
        [sys.executable, "-m", "qwlit", *words], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    files = [f for f in (tmp_path / "runs").rglob("*") if f.is_file()]
    assert files and not any(b"secret-of-mine" in f.read_bytes() for f in files)


def test_a_validation_sample_that_fits_no_micro_batch_is_refused_before_training(tmp_path):
    rows = [{"input_ids": list(range(length)), "loss_mask": [0] + [1] * (length - 1)} for length in (5, 6, 7, 40)]
    for name, some in (("train.jsonl", rows[:3]), ("val.jsonl", rows[3:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    paths = ["data.path=train.jsonl", "data.val_path=val.jsonl"]
    done = qwlit(["train", *TINY, *paths, "hardware.micro_batch_tokens=32"], tmp_path)
    assert done.returncode == 2 and "the longest sample has 40 tokens" in done.stderr


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = qwlit(["train", "experiment=demo", "run.root=file/runs"], tmp_path)
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1


def folder_with_a_fault(fault, folder):
    """A tiny model's folder with the demo's tokenizer, and one thing wrong."""
    save_folder(tiny_causal_lm(), folder)
    if fault != "no tokenizer":
        shutil.copytree(DEMO / "tokenizer", folder, dirs_exist_ok=True)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if fault == "another architecture":
        text = config.read_text().replace("Qwen3ForCausalLM", "LlamaForCausalLM").replace('"qwen3"', '"llama"')
        config.write_text(text)
    if fault == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    if fault == "no weights":
        weights.unlink()
    return folder


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("another architecture", "Llama"),
        ("no tokenizer", "tokenizer"),
        ("truncated weights", r"model\.safetensors"),
        ("no weights", "safetensors"),
        ("a vocabulary too small", "the tokenizer has .* tokens and the embedding 97 rows"),
    ],
)
def test_a_model_folder_with_a_fault_ends_in_one_line(fault, said, tmp_path):
    folder = folder_with_a_fault(fault, tmp_path / "model")
    rows = json.dumps({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}) + "\n"
    if fault in ("truncated weights", "no weights"):
        rows = json.dumps({"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    done = qwlit(["train", f"model.path={folder}", "data.path=rows.jsonl", "hardware=cpu"], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert not [p for p in tmp_path.glob("runs/*") if not p.name.startswith(".")], "nothing was begun"


def test_a_misspelt_word_of_the_verb_is_named_as_such(tmp_path):
    done = qwlit(["sweep", "sweep=lora", "trails=2", "backend=optuna"], tmp_path)
    assert done.returncode == 2
    assert "trails=2: there is no 'trails' here. Did you mean 'trials'?" in done.stderr
