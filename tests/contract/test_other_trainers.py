"""Every option of another trainer is answered with what to type here, and docs/coming-from.md shows the same."""

import ast
import dataclasses
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from qwlit.commands.options import own_options
from qwlit.config.compose import as_tree, check, check_arguments, compose
from qwlit.config.groups import group_options
from qwlit.config.other_trainers import REPLACED_BY
from qwlit.config.other_trainers_options import (
    OTHERS,
    TRAINERS,
    command_answer,
    find_option,
    options_by_name,
    read_table,
)
from qwlit.config.run import setting_names
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path
from scripts.other_trainers_table import OVERRIDE, tables
from tests.tiny import save_folder, tiny_causal_lm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text("utf-8")
OPTIONS = list(itertools.chain(*read_table()["options"].values()))
NOT_YET = {"data.system", "data.columns", "data.max_samples", "dropout.neftune_alpha", "model.hub"} - setting_names()
LOGGERS_NOT_YET = {"tensorboard", "mlflow", "csv", "swanlab"} - set(group_options()["logger"])


def answer(*arguments: str) -> str:
    """Return the answer to the arguments, without what is the same in every answer."""
    with pytest.raises(ConfigError) as caught:
        check_arguments(list(arguments))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(". All options are in docs/coming-from.md")
    return text.removeprefix("not options of qwlit: ").removesuffix(". All options are in docs/coming-from.md")


ANSWERS = {
    "learning_rate=1e-4": "optim.lr=1e-4",
    "+learning_rate=1e-4": "optim.lr=1e-4",
    "--learning_rate=1e-4": "optim.lr=1e-4",
    "--learning-rate 1e-4": "optim.lr=1e-4",
    "lr=1e-4": "optim.lr=1e-4",
    "training_args.learning_rate=1e-4": "optim.lr=1e-4",
    "optim.learning_rate=1e-4": "optim.lr=1e-4",
    "--optim.lr 1e-4": "optim.lr=1e-4",
    "--recipe lora": "recipe=lora",
    "num_train_epochs=3": "train.max_epochs=3",
    "num_epochs=0.5": "train.max_epochs=0.5",
    "trainer.max_epochs=3": "train.max_epochs=3",
    "trainer.max_steps=9": "train.max_steps=9",
    "max_steps=-1": "leave it out",
    "lora_rank=8": "adapter.rank=8 (adapter.alpha is 32 unless set, in LLaMA-Factory twice the rank, 16)",
    "lora_r=8": "adapter.rank=8 (adapter.alpha is 32 unless set, in LLaMA-Factory twice the rank, 16)",
    "lora.r=8": "adapter.rank=8 (adapter.alpha is 32 unless set, in LLaMA-Factory twice the rank, 16)",
    "lora_alpha=16": "adapter.alpha=16",
    "lora_dropout=0.05": "dropout.lora=0.05",
    "lora_target=all": "adapter.target_modules=all",
    "target_modules=all-linear": "adapter.target_modules=all",
    "lora_target=q_proj,v_proj": "adapter.target_modules=[q_proj,v_proj]",
    "--target_modules q_proj v_proj": "adapter.target_modules=[q_proj,v_proj]",
    "lora_target_linear=true": "adapter.target_modules=all",
    "cutoff_len=2048": "data.max_seq_len=2048",
    "max_length=2048": "data.max_seq_len=2048",
    "sequence_len=2048": "data.max_seq_len=2048",
    "max_seq_length=2048": "data.max_seq_len=2048",
    "output_dir=out/x": "run.root=out run.name=x",
    "output_dir=./out/a b/": "run.root=out 'run.name=a b'",
    "run_name=x": "run.name=x",
    "report_to=wandb": "logger=wandb",
    "report_to=none": "logger=none",
    "deepspeed=ds_z3.json": "hardware.strategy=fsdp",
    "deepspeed=": "leave it out",
    "fsdp=full_shard": "hardware.strategy=fsdp",
    "packing=true": "data.packing=true",
    "neat_packing=true": "data.packing=true",
    "sample_packing=false": "data.packing=false",
    "save_steps=500": "checkpoint.every_steps=500",
    "eval_steps=500": "validation.every_steps=500",
    "eval_strategy=epoch": "validation.each_epoch=true",
    "save_total_limit=3": "checkpoint.keep_last=3",
    "logging_steps=5": "logging.every_steps=5",
    "bf16=true": "hardware.precision=bf16-mixed",
    "--bf16": "hardware.precision=bf16-mixed",
    "--fp16 True": "hardware.precision=16-mixed",
    "gradient_checkpointing=true": "hardware.activation_checkpointing=full",
    "--model_name_or_path Qwen/Qwen3-8B": "model.hub_id=Qwen/Qwen3-8B",
    "base_model=./tests": "model.path=./tests",
    "model_name_or_path=tests/unit": "model.path=tests/unit",
    "model=Qwen/Qwen3-8B": "model.hub_id=Qwen/Qwen3-8B",
    "model=./folder": "model.path=./folder",
    "dataset=tatsu-lab/alpaca": "data.path=hf:tatsu-lab/alpaca",
    "dataset=a.jsonl,b.jsonl": "data.path=[a.jsonl,b.jsonl]",
    "data=./rows.jsonl": "data.path=./rows.jsonl",
    "dataset=ORG/NAME#500": "data.path=hf:ORG/NAME data.max_samples=500",
    "val_size=0.1": "data.val_fraction=0.1",
    "max_samples=100": "data.max_samples=100",
    "default_system=hello": "data.system=hello",
    "default_system=it's $5": shlex.quote("data.system=it's $5"),
    "field_messages=turns": "'data.columns={messages: turns}'",
    "train_on_prompt=true": "data.loss_on=all",
    "train_on_inputs=false": "data.loss_on=assistant",
    "mask_history=true": "data.loss_on=last_assistant",
    "assistant_only_loss=true": "data.loss_on=assistant",
    "loss_scale=last_round": "data.loss_on=last_assistant",
    "truncation_strategy=delete": "data.too_long=drop",
    "neftune_noise_alpha=5": "dropout.neftune_alpha=5",
    "finetuning_type=lora": "recipe=lora",
    "adapter=qlora": "recipe=qlora",
    "stage=pt": "recipe=pretrain",
    "quantization_bit=4": "recipe=qlora (instead of recipe=lora)",
    "load_in_4bit=true": "recipe=qlora (instead of recipe=lora)",
    "load_in_4bit=false": "leave it out",
    "optim=adamw_torch": "optim=adamw",
    "optim=adamw_bnb_8bit": "optim=adamw_8bit",
    "optimizer=paged_adamw_32bit": "optim=paged_adamw",
    "lr_scheduler_type=cosine": "scheduler=cosine",
    "scheduler=constant_with_warmup": "scheduler=constant",
    "scheduler=cosine_with_restarts": "not in this version: scheduler=cosine has no restarts",
    "warmup_ratio=0.1": "scheduler.warmup_ratio=0.1",
    "adam_beta2=0.95": "optim.betas=[0.9,0.95]",
    "betas=[0.9,0.95]": "optim.betas=[0.9,0.95]",
    "keep_last=3": "checkpoint.keep_last=3",
    "max_grad_norm=0": "train.max_grad_norm=null",
    "weight_decay=0": "optim.weight_decay=0",
    "ddp_timeout=7200": "hardware.timeout_seconds=7200",
    "nproc_per_node=4": "hardware.devices=4",
    "gradient_accumulation_steps=8": "train.global_batch_size = hardware.micro_batch_size x 8 x devices",
    "push_to_hub=false": "leave it out",
    "--export_dir out": "after the training type export; its option output names the folder",
    "--export_size 2": "after the training type export; its option max_shard_size limits each file",
    "--stream true": "not needed: generate prints each token at once",
    "--adapter out/a": "not in this version: the recipes are full_sft, lora, qlora, freeze and pretrain; the folder of"
    " an adapter is model.adapter_path",
    "push_to_hub=true": "not in this version: upload runs/NAME/export with `hf upload`",
    "sequence_parallel_size=4": "not in this version: there is data parallelism only (hardware.strategy ddp or fsdp)",
    "modules_to_save=embed_tokens": "not in this version: an adapter is saved without whole matrices; recipe=full_sft"
    " or recipe=freeze trains embedding and head",
    "--do_train": "not needed: train always trains",
    "dataset_num_proc=8": "not needed: all cores tokenize",
    "bf16=True,": "hardware.precision=bf16-mixed",
    "flash_attn=fa2": "model.attention=auto (it takes the varlen kernel on CUDA)",
    "sdp_attention=true": "model.attention=sdpa",
    "device=cuda:1": "hardware.accelerator=cuda (choose the device with CUDA_VISIBLE_DEVICES=1)",
    "val_size=100": "data.val_fraction=0.05 (a share: divide 100 by the number of rows)",
    "warmup_steps=0.1": "scheduler.warmup_ratio=0.1",
    "scheduler.warmup=100": "scheduler.warmup_steps=100",
    "eval_steps=0.25": "give validation.every_steps a number of steps, 0.25 of all steps",
    "lr_scheduler_kwargs={min_lr_rate: 0.1}": "scheduler.min_lr_ratio=0.1",
    "lr_scheduler_kwargs={num_cycles: 2}": "not in this version: the schedules have scheduler.min_lr_ratio, and wsd"
    " scheduler.decay_ratio",
    "report_to=tensorboard,wandb": "logger.use=[tensorboard,wandb]",
    "logger=[tensorboard,wandb]": "logger.use=[tensorboard,wandb]",
    "logger=tensorboard,wandb": "logger.use=[tensorboard,wandb]",
    "logger.tensorboard=true": "logger=tensorboard",
    "pissa_init=true": "not in this version: adapters start as in the LoRA paper, with B = 0",
    "task_type=CAUSAL_LM": "leave it out",
    "roles_to_train=[assistant]": "data.loss_on=assistant",
    "mix_strategy=concat": "leave it out",
    'columns={"q":"query","a":"response"}': "'data.columns={prompt: q, completion: a}'",
    "dataset=identity": "data.path=FILE_OF_identity (put the file there that data/dataset_info.json names)",
    "hardware=2xA100": "hardware=a100x2",
    "adapter.dropout=0.1": "dropout.lora=0.1",
    # Everyday spellings, and values that other trainers' examples have.
    'dataset=["a.jsonl","b.jsonl"]': "data.path=[a.jsonl,b.jsonl]",
    "datasets=[{path: a.jsonl}]": "data.path=a.jsonl",
    "--dataset a/b#500 c/d#500": "data.path=[hf:a/b,hf:c/d] data.max_samples=500",
    "--dataset a/b#500 c/d": "data.path=[hf:a/b,hf:c/d] (data.max_samples is one number for all sets, so cut the files"
    " to these rows)",
    "target_modules=[all-linear]": "adapter.target_modules=all",
    "lora=true": "recipe=lora",
    "--resume": "not needed: the same command resumes an unfinished run; resume=never starts a new one",
    "gpu=0": "choose device 0 with the environment variable CUDA_VISIBLE_DEVICES",
    "devices=-1": "hardware.devices=auto",
    "strategy=deepspeed_stage_2": "hardware.strategy=fsdp",
    "zero_optimization={stage: 3}": "hardware.strategy=fsdp",
    "train_batch_size=auto": "leave it out",
    "train_batch_size=8": "train.global_batch_size=8",
    "ddp_timeout=180000000": "hardware.timeout_seconds=2592000 (the longest allowed)",
    "learning_rate = 1e-4": "optim.lr=1e-4",
    "model.name=Qwen/Qwen3-8B": "model.hub_id=Qwen/Qwen3-8B",
    "eos_token=<|im_end|>": "not needed: the model's template ends the answers",
    "same_network=true": "not needed: train starts its processes itself",
    "--no_bf16": "hardware.precision=32-true",
    "--no-packing": "data.packing=false",
    "datasets.0.path=a.jsonl": "data.path=a.jsonl",
    "datasets[0].path=a.jsonl": "data.path=a.jsonl",
    "deepspeed=ds_z0_config.json": "hardware.strategy=ddp (ZeRO-0 shares nothing)",
    "deepspeed=ds_z2_offload_config.json": "hardware.strategy=fsdp",
    "CUDA_VISIBLE_DEVICES=0": "write the variable before the command, in front of qwlit",
}


TOGETHER = {
    "stage=sft finetuning_type=lora quantization_bit=4 task_type=CAUSAL_LM": (
        "stage=sft finetuning_type=lora quantization_bit=4 → recipe=qlora (instead of recipe=lora);"
        " task_type=CAUSAL_LM → leave it out"
    ),
    "use_peft=true stage=sft": "use_peft=true stage=sft → recipe=lora",
    "lora_rank=8 lora_alpha=16": "lora_rank=8 → adapter.rank=8; lora_alpha=16 → adapter.alpha=16",
    "lora_rank=8 adapter.alpha=16": "lora_rank=8 → adapter.rank=8",
    "num_epochs: 3 max_length: 9": "num_epochs: 3 → train.max_epochs=3; max_length: 9 → data.max_seq_len=9",
    "packing=true neat_packing=true": "packing=true neat_packing=true → data.packing=true",
    "run_name=y output_dir=out/x": "run_name=y output_dir=out/x → run.name=y run.root=out",
    "eval_steps=9 eval_strategy=steps": "eval_steps=9 eval_strategy=steps → validation.every_steps=9",
    "eval_strategy=epoch eval_steps=9": "eval_strategy=epoch eval_steps=9 → validation.each_epoch=true",
    # transformers' TrainingArguments: max_steps "overrides num_train_epochs", warmup_steps "overrides warmup_ratio".
    "max_steps=9 num_train_epochs=3": "max_steps=9 num_train_epochs=3 → train.max_steps=9",
    "num_train_epochs=3 max_steps=9": "num_train_epochs=3 max_steps=9 → train.max_steps=9",
    "warmup_ratio=0.1 warmup_steps=9": "warmup_ratio=0.1 warmup_steps=9 → scheduler.warmup_steps=9",
    "warmup_ratio=0.1 warmup_steps=0": "warmup_ratio=0.1 warmup_steps=0 → scheduler.warmup_ratio=0.1",
    "min_lr=1e-5 learning_rate=1e-4": "min_lr=1e-5 → scheduler.min_lr_ratio=0.1; learning_rate=1e-4 → optim.lr=1e-4",
    "field_instruction=q field_output=a": (
        "field_instruction=q field_output=a → 'data.columns={instruction: q, output: a}'"
    ),
    "lr=1 learing_rate=2 xyz=3 --xzy": (
        "lr=1 → optim.lr=1; learing_rate=2 → not known (did you mean learning_rate, here optim.lr?);"
        " xyz=3 → not known; --xzy → not known"
    ),
}


@pytest.mark.parametrize("typed", TOGETHER)
def test_options_that_set_the_same_have_one_answer_and_unknown_ones_are_named(typed):
    assert answer(*typed.split(" ")) == TOGETHER[typed]


def test_the_subcommands_own_options_are_no_unknown_ones():
    known = {"output": ("text", "json"), "mfu": None}
    with pytest.raises(ConfigError, match=r"^not options of qwlit: lr=1 → optim.lr=1\. All"):
        own_options(["output=json", "--mfu", "0.4", "lr=1"], known)
    with pytest.raises(ConfigError, match="lr=1 → optim"):
        own_options(["lr=1", "sample=3"], known)


@pytest.mark.parametrize("subcommand", ["train", "plan", "inspect", "submit", "sweep", "python"])
def test_the_arguments_are_checked_once_whatever_reads_them(subcommand, monkeypatch):
    import qwlit
    from qwlit.__main__ import _run
    from qwlit.config import compose as module

    calls = []
    check_shell = module.check_shell
    monkeypatch.setattr(module, "check_shell", lambda arguments: calls.append(check_shell(arguments)))
    words = ["sweep=lora", "backend=optuna"] if subcommand == "sweep" else []
    for wrong, said in (("optim.lrr=1", "optim.lrr: no such setting"), ("lr=1", "lr=1 → optim.lr=1")):
        with pytest.raises(ConfigError, match=said):
            qwlit.plan(wrong) if subcommand == "python" else _run(subcommand, [*words, wrong])
        assert calls.pop() is None and not calls


@pytest.mark.parametrize("value", ["\\", '"', "'", "5\\", "[", "{", "{a: 'b", "a'b"])
def test_a_value_that_no_shell_could_read_has_an_answer_without_a_traceback(value):
    for name in options_by_name():
        if name not in setting_names() | group_options().keys():
            with pytest.raises(ConfigError):
                check_arguments([f"{name}={value}"])


def test_every_answer_with_an_override_starts_with_words_of_a_shell_and_has_its_remark_in_parentheses():
    for option in OPTIONS:
        for value in (*option.values, "x", "2"):
            answer = option.answer(value)
            assert answer.overrides or (answer.remark and not OVERRIDE.match(answer.remark)), answer
            assert not answer.overrides or shlex.split(str(answer).partition(" (")[0]), answer


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_an_optimizer_of_transformers_is_not_taken_for_a_misspelt_one_of_qwlit(name):
    if name in group_options()["optim"]:
        check_arguments([f"optim={name}"])
    else:
        assert re.match("optim=|not in this version: the optimizers are", answer(f"optim={name}").partition(" → ")[2])


@pytest.mark.parametrize("typed", ANSWERS)
def test_an_option_of_another_trainer_is_answered_with_what_to_type(typed):
    arguments = typed.split(" ") if typed.startswith("--") else [typed]
    assert answer(*arguments) == f"{typed} → {ANSWERS[typed]}"


def test_all_options_typed_at_once_are_answered_together():
    typed = ["optim.lr=1e-5", "learning_rate=1", "--bf16", "--lora_r", "4", "recipe=lora", "do_eval=true"]
    assert [part.partition(" → ")[0] for part in answer(*typed).split("; ")] == [
        "learning_rate=1",
        "--bf16",
        "--lora_r 4",
        "do_eval=true",
    ]


@pytest.mark.parametrize(
    ("typed", "size"),
    [([], "16 (on one device, N times that on N)"), (["hardware.devices=4", "hardware.num_nodes=2"], "128")],
)
def test_micro_batch_and_accumulation_give_the_batch_of_a_step(typed, size):
    theirs = ["per_device_train_batch_size=2", "gradient_accumulation_steps=8"]
    expected = f"{' '.join(theirs)} → hardware.micro_batch_size=2 train.global_batch_size={size}"
    assert answer(*theirs, *typed) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        [f"{name}=1" for name in sorted(setting_names())],
        [f"{group}={choice}" for group, choices in group_options().items() for choice in choices],
        # The subcommands' own options.
        [
            "output=json",
            "mfu=0.4",
            "sample=3",
            "runs=[a,b]",
            "baseline=a",
            "page=x.html",
            "seeds=[0,1]",
            "dry_run=true",
        ],
        ["sweep=lora", "backend=optuna", "action=best", "trials=3", "tasks=2", "jobs=2", "agents=1", "--cfg", "job"],
        ["data.columns.system=context", "data.val_path.beta=b.jsonl"],
        ["optmi.lr=1", "optim.lrr=1", "recipe=fullsft", "optim=3", "model=qwen9", "hydra.searchpath=[file:///x]"],
    ],
)
def test_what_is_qwlits_own_is_no_other_trainers(arguments):
    check_arguments(arguments)


def test_both_betas_give_one_setting():
    theirs = ["adam_beta2=0.95", "--adam_beta1", "0.8"]
    assert answer(*theirs) == "adam_beta2=0.95 --adam_beta1 0.8 → optim.betas=[0.8,0.95]"


def test_every_name_has_one_answer():
    counts: dict[str, int] = {}
    for option in OPTIONS:
        for name in set(itertools.chain(*option.names.values())):
            counts[name] = counts.get(name, 0) + 1
            assert option.answer("x") and option.answer("true")
    assert {name: count for name, count in counts.items() if count > 1} == {}
    assert len(counts) >= 500 and all(options_by_name()[name] for name in counts)


def overrides_in(text: str) -> list[tuple[str, str]]:
    return [tuple(found.strip("'").split("=", 1)) for found in OVERRIDE.findall(text)]


def test_every_answer_names_settings_and_values_that_exist():
    tree = as_tree(compose([]).config)
    written = [part for option in OPTIONS for part in (option.ours, *option.values.values(), option.instead)]
    patterns = [text.partition(" (")[0] for option in OPTIONS for text in option.patterns.values()]
    written += [*read_table()["commands"].values(), *patterns]
    for key, value in {pair for text in written for pair in overrides_in(text)}:
        if key in group_options():
            assert value in {*group_options()[key], *LOGGERS_NOT_YET}, (key, value)
            continue
        assert key in setting_names() | NOT_YET, key
        section, _, name = key.partition(".")
        if name and key not in NOT_YET and re.fullmatch(r"[\w.-]+", value) and value not in ("N", "all"):
            check(tree | {section: tree[section] | {name: yaml.safe_load(value)}})


def test_every_setting_that_takes_the_same_value_exists():
    names = {name for option in OPTIONS for name in re.split(r" or | and ", option.ours.partition("=")[0]) if name}
    assert names <= setting_names() | set(group_options()) | NOT_YET


def test_the_names_are_those_of_transformers_and_peft():
    arguments = {field.name for field in dataclasses.fields(TrainingArguments)}
    shared = {name for entry in OPTIONS for name in set.intersection(*(set(entry.names[t]) for t in ("trl", "swift")))}
    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    written_elsewhere = {"model_revision", "attn_implementation", "router_aux_loss_coef", "enable_thinking"}
    others = {"packing", "max_length", "padding_free", "packing_strategy", "dataset_num_proc", "bnb_4bit_quant_type"}
    assert shared - arguments - lora - written_elsewhere - others == set()
    assert len(shared & arguments) > 60


def test_every_optimizer_and_schedule_of_transformers_is_answered():
    for key, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        option = find_option(key)
        assert option
        for name in names:
            found = str(option.answer(name.value))
            group = key.removeprefix("lr_").removesuffix("_type")
            assert (
                found.startswith("not in this version")
                or found.split(maxsplit=1)[0].split("=")[1] in group_options()[group]
            )


@pytest.mark.parametrize("name", ["experiment/mine.yaml"])
def test_another_trainers_name_in_a_file_of_ones_own_is_answered(name, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / name).write_text("# @package _global_\ntrain: {num_train_epochs: 3}\n")
    with pytest.raises(ConfigError, match=r"train.num_train_epochs: no such setting; instead: train.max_epochs=3"):
        compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("infer", "type generate"),
        ("sft", "type train recipe=full_sft"),
        ("trian", "Did you mean 'train'"),
        ("--lora_dropout=0", "--lora_dropout=0 → dropout.lora=0; learning_rate=1 → optim.lr=1"),
        ("torchrun", "type train, which starts a process for each of hardware.devices by itself"),
        ("llamafactory-cli", "type train, and behind it the options or the settings file"),
        ("none.yaml", "none.yaml: no such file"),
        ("train.sh", "train.sh: a script is not read"),
    ],
)
def test_a_subcommand_of_another_trainer_is_answered(name, said, monkeypatch, capsys):
    from qwlit import __main__

    monkeypatch.setattr(sys, "argv", ["qwlit", name, "learning_rate=1"])
    monkeypatch.setattr(__main__, "end_process", lambda code: code)
    assert __main__.main() == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "same_as"),
    [
        ("llamafactory-cli chat x.yaml", "chat"),
        ("trl dpo", "dpo"),
        ("swift sft --model x", "sft"),
        ("axolotl preprocess x.yaml", "preprocess"),
        ("llamafactory-cli train x.yaml", "lmf"),
        ("chat lora", "infer"),
    ],
)
def test_a_subcommand_behind_another_trainers_name_has_its_own_answer(words, same_as):
    assert command_answer(words.split()) == command_answer([same_as])


def test_a_name_in_dataset_info_is_answered_with_its_file_and_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    columns = {"prompt": "question", "query": "input", "response": "answer", "system": "role"}
    names = {
        "mine": {"file_name": "qa.json", "columns": columns},
        "same": {"file_name": "b.json", "columns": columns},
        "chats": {"file_name": "c.json", "formatting": "sharegpt", "columns": {"messages": "turns"}},
        "openai": {"file_name": "o.json", "columns": {"messages": "messages"}, "tags": {"role_tag": "role"}},
        "hub": {"hf_hub_url": "a/b", "subset": "en", "split": "part"},
        "script": {"script_url": "x"},
    }
    (tmp_path / "rows" / "dataset_info.json").write_text(json.dumps(names))
    mapped = "'data.columns={instruction: question, output: answer, system: role}'"
    for name, expected in {
        "mine": f"data.path=rows/qa.json {mapped}",
        "mine,same": f"data.path=[rows/qa.json,rows/b.json] {mapped}",
        "chats": "data.path=rows/c.json 'data.columns={conversations: turns}'",
        "openai": "data.path=rows/o.json",
        "hub": "data.path=hf:a/b/en:part",
        "script": "data.path=FILE_OF_script (put the file there that rows/dataset_info.json names)",
        "mine,chats": "data.path=[rows/qa.json,rows/c.json] (data.columns is the same for all sets, so rename the"
        " columns in the files)",
    }.items():
        assert answer("dataset_dir=rows", f"dataset={name}").partition("; ")[2] == f"dataset={name} → {expected}"
    both = answer("dataset_dir=rows", "dataset=mine", "eval_dataset=same")
    assert both.endswith(f"→ data.path=rows/qa.json data.val_path=rows/b.json {mapped}")
    (tmp_path / "rows" / "dataset_info.json").write_text("[1]")
    assert "FILE_OF_mine" in answer("dataset_dir=rows", "dataset=mine")


def test_no_subcommand_of_another_trainer_hides_one_of_qwlit():
    from qwlit.__main__ import SUBCOMMANDS

    assert not read_table()["commands"].keys() & SUBCOMMANDS.keys()
    assert len(read_table()["commands"]) >= 30


def test_the_tables_in_the_document_are_the_ones_printed():
    assert PAGE.endswith(tables())
    assert all(trainer in PAGE for trainer in TRAINERS.values())


FILES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
(SCRIPT,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [
    shlex.split(found.replace("\\\n", " ")) for found in re.findall(r"^```\nqwlit train (.*?)^```", PAGE, re.M | re.S)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with the model and the data that the document's migrations name."""
    save_folder(
        tiny_causal_lm(vocab_size=520, hidden_size=64, intermediate_size=64), tmp_path / "models" / "Qwen3-0.6B"
    )
    shutil.copytree(resolve_path("qwlit:demo/tokenizer"), tmp_path / "models" / "Qwen3-0.6B", dirs_exist_ok=True)
    (tmp_path / "data").mkdir()
    row = '{"instruction": "%d", "input": "", "output": "two"}'
    (tmp_path / "data" / "alpaca.json").write_text(f"[{','.join(row % number for number in range(40))}]")
    turns = '{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "two"}]}\n'
    (tmp_path / "data" / "chat.jsonl").write_text("".join(turns % number for number in range(40)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_of(number: int, place: Path) -> str:
    """Return what qwlit answers to the document's file, or to the options that its script sets."""
    if number < len(FILES):
        (place / "theirs.yaml").write_text(FILES[number])
        return answer("config=theirs.yaml")
    calls = [node for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.Call)]
    keywords = [k for call in calls for k in call.keywords if not isinstance(k.value, ast.Call) and k.arg != "split"]
    written = [(k.arg, ast.get_source_segment(SCRIPT, k.value)) for k in keywords]
    return answer(*(f"{name}={value.replace(' ', '').replace(chr(34), '')}" for name, value in written))


@pytest.mark.parametrize("number", range(3), ids=["LLaMA-Factory", "axolotl", "TRL"])
def test_a_migration_in_the_document_is_what_qwlit_answers_and_can_be_planned(number, place):
    import qwlit

    command = COMMANDS[number]
    answers = said_of(number, place)
    if number < len(FILES):
        assert shlex.split(answers.partition("type: qwlit train ")[2].partition("; ")[0]) == command
    else:
        words = [word for part in answers.split("; ") for word in shlex.split(part.partition(" → ")[2])]
        # TRL's LoraConfig is no option.
        assert {word for word in words if "=" in word} | {"recipe=lora"} == set(command)
    plan = qwlit.plan(*command, "hardware=rtx4090", "preflight.allow=[]")
    assert plan.data is not None and plan.schedule is not None
    assert not [finding for finding in plan.findings if finding.severity == "error"]


def test_another_trainers_file_is_recognised_wherever_it_is_named(place):
    (place / "theirs.yaml").write_text("learning_rate: 1e-4\nbf16: true\ndo_train: true\npush_to_hub: false\n")
    expected = (
        "theirs.yaml is a settings file of another trainer; type: qwlit train optim.lr=1e-4"
        " hardware.precision=bf16-mixed; not needed: do_train, push_to_hub"
    )
    forms = (["theirs.yaml"], ["config=theirs.yaml"], ["--config", "theirs.yaml"], ["--config=theirs.yaml"])
    for arguments in (*forms, ["data.path=a.jsonl", "theirs.yaml"]):
        assert answer(*arguments) == expected
    (place / "axolotl.yaml").write_text("datasets:\n- {path: a.jsonl, type: alpaca}\n- {path: b.jsonl, type: alpaca}\n")
    assert "data.path=[a.jsonl,b.jsonl]" in answer("axolotl.yaml")
    (place / "chat.yaml").write_text(
        "datasets:\n- path: ORG/NAME\n  type: chat_template\n  field_messages: conversations\n"
        "  message_property_mappings: {role: from, content: value}\n  roles_to_train: [assistant]\n"
        "plugins: [axolotl.integrations.liger.LigerPlugin]\nspecial_tokens: {pad_token: x}\nstrict: false\n"
    )
    assert answer("chat.yaml").partition("; ")[2] == (
        "type: qwlit train data.path=hf:ORG/NAME data.loss_on=assistant; not needed: datasets.type,"
        " datasets.field_messages, datasets.message_property_mappings, plugins, special_tokens, strict"
    )
    (place / "litgpt.yaml").write_text(
        "out_dir: out/x\noptimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2e-4}}\n"
        "train: {global_batch_size: 8, micro_batch_size: 1, max_seq_length: null}\n"
    )
    litgpt = answer("config=litgpt.yaml")
    for override in ("run.root=out run.name=x", "optim.lr=2e-4", "train.global_batch_size=8", "micro_batch_size=1"):
        assert override in litgpt
    (place / "many.json").write_text(json.dumps(dict.fromkeys(options_by_name(), 7) | {"learing_rate": 1, "xyz": 2}))
    said = answer("many.json")
    for name, option in options_by_name().items():
        keys = option.answer("7").overrides
        assert name in said or all(f" {key}=" in said or REPLACED_BY.get(key, "") in said for key in keys), name
    assert said.endswith("; not known: learing_rate (did you mean learning_rate, here optim.lr?), xyz")


def test_qwlits_own_file_is_no_other_trainers(tmp_path):
    (tmp_path / "own.yaml").write_text("seed: 1\noptim: {lr: 1}\n")
    check_arguments([f"config={tmp_path}/own.yaml"])
    with pytest.raises(ConfigError, match=r"own.yaml: write config=.*own.yaml"):
        check_arguments([f"{tmp_path}/own.yaml"])
    # An experiment of one's own, a file of the subcommand sweep, and data.
    (tmp_path / "mine.yaml").write_text(
        "defaults: [_self_]\ntrain: {max_steps: 9}\nlogger: {use: [csv]}\nmodel: {init: random}\ndata: {path: x}\n"
    )
    (tmp_path / "search.yaml").write_text("method: grid\nparameters: {seed: {values: [1, 2]}}\n")
    (tmp_path / "rows.json").write_text('{"learning_rate": "%s"}' % ("x" * 2**20))
    check_arguments([f"config={tmp_path}/{name}" for name in ("mine.yaml", "search.yaml", "rows.json")])
    (tmp_path / "broken.yaml").write_text("a: [")
    check_arguments(["config=none.yaml", f"config={tmp_path}/broken.yaml"])
    for name, reason in [("broken.yaml", "line 1 is not YAML: "), ("none.yaml", "no such file")]:
        for arguments in ([f"{tmp_path}/{name}"], ["--config", f"{tmp_path}/{name}"]):
            with pytest.raises(ConfigError, match=f"{name}: {reason}"):
                check_arguments(arguments)
    with pytest.raises(ConfigError, match=r"train.py: a script is not read; type its options as key=value"):
        check_arguments(["train.py"])
    assert OTHERS not in TRAINERS


def test_options_without_a_subcommand_are_told_so():
    from qwlit.__main__ import _run

    with pytest.raises(ConfigError, match="a subcommand is missing; type qwlit train seed=1 …"):
        _run("seed=1", ["recipe=lora"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hub_token=hf_secret"], "hub_token=… → set the environment variable HF_TOKEN"),
        (["lr=1", "--foo_api_key", "hf_secret"], "foo_api_key=… → not known"),
        (["-lr", "1e-4"], "-lr 1e-4 → optim.lr=1e-4"),
        (["learning_rate: 1e-4"], "learning_rate: 1e-4 → optim.lr=1e-4"),
        (["LEARNING_RATE=1e-4"], "LEARNING_RATE=1e-4 → optim.lr=1e-4"),
        (["--weight_decay", "-1", "seed=1"], "--weight_decay -1 → optim.weight_decay=-1"),
    ],
)
def test_other_spellings_are_read_and_no_secret_is_shown(words, said):
    with pytest.raises(ConfigError) as caught:
        check_arguments(words)
    assert said in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("words", [["--output", "json"], ["--output=json"]])
def test_a_subcommands_own_option_is_typed_without_dashes(words):
    with pytest.raises(ConfigError, match=r"write output=.*, without dashes"):
        own_options(words, {"output": ("text", "json")})
