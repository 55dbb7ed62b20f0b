"""Every rule has settings that trip it and settings that do not; recipes as they are trip none."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwlit.config.compose import compose
from qwlit.core.devices import Devices
from qwlit.core.errors import ConfigError
from qwlit.model.config import AdapterConfig
from qwlit.optim.schedules import Schedule
from qwlit.planning.facts import facts_of
from qwlit.planning.memory.estimate import MemoryEstimate
from qwlit.planning.preflight.rules import RULES, DataFacts, PreflightFacts, TokenizerFacts, refuse, run_rules
from qwlit.planning.preflight.table import table
from qwlit.planning.setup import resolve_setup
from qwlit.training import machine

ROOT = Path(__file__).parents[2]
GOOD_DATA = DataFacts(supervised_share=0.4, cut_share=0.0, longest=2000, has_validation=True)
TOKENIZER = TokenizerFacts(pad_id=151_643, eos_id=151_645, num_tokens=151_669)


def facts(words: list[str], *, steps: int = 1000, data: DataFacts = GOOD_DATA, **changes: Any) -> PreflightFacts:
    """Return what the rules see of a run of so many steps over good data, unless told otherwise."""
    setup = resolve_setup(compose(words), trust_profile=True)
    schedule = Schedule(setup.config.scheduler, steps)
    if memory := changes.get("memory"):
        changes = {"bytes_by_phase": {"training": memory.total}} | changes
    return replace(facts_of(setup), **{"schedule": schedule, "data": data, "tokenizer": TOKENIZER} | changes)


def names(found: PreflightFacts) -> set[str]:
    return {finding.name for finding in run_rules(found)}


A100 = "hardware=a100x4"
FULL = MemoryEstimate("then", {"weights": 30.0, "activations": 20.0}, 40.0)
# Rule → settings that trip it, settings beside them that do not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full_lr": ({"words": ["optim.lr=1.1e-4"]}, {"words": ["optim.lr=1.1e-4", "model.init=random"]}),
    "full_lr_large": (
        {"words": ["model=qwen2_7b", "optim.lr=6e-5"]},
        {"words": ["model=qwen3_4b", "optim.lr=6e-5"]},
    ),
    "lr_range": ({"words": ["recipe=lora", "optim.lr=6e-4"]}, {"words": ["recipe=lora", "optim.lr=5e-4"]}),
    "warmup": ({"words": ["scheduler.warmup_ratio=0.3"]}, {"words": ["scheduler.warmup_ratio=0.05"]}),
    "warmup_capped": ({"words": ["recipe=lora"]}, {"words": ["recipe=lora"], "steps": 2500}),
    "small_batch": ({"words": ["train.global_batch_size=15"]}, {"words": ["train.global_batch_size=16"]}),
    "no_clip": ({"words": ["train.max_grad_norm=null"]}, {"words": ["train.max_grad_norm=0.5"]}),
    "few_steps": ({"words": [], "steps": 49}, {"words": [], "steps": 50}),
    "longer_than_context": (
        {"words": ["model=qwen2_7b"], "data": replace(GOOD_DATA, longest=32_769)},
        {"words": ["model=qwen2_7b"], "data": replace(GOOD_DATA, longest=32_768)},
    ),
    "no_validation": ({"words": [], "data": replace(GOOD_DATA, has_validation=False)}, {"words": []}),
    "no_checkpoints": (
        {"words": ["checkpoint.each_epoch=false"]},
        {"words": ["checkpoint.each_epoch=false", "checkpoint.every_steps=100"]},
    ),
    "slow_save": ({"words": ["model=qwen2_7b"]}, {"words": ["model=qwen2_7b", "slurm.signal_seconds=200"]}),
    "patience": (
        {"words": ["validation.early_stopping_patience=2"]},
        {"words": ["validation.early_stopping_patience=5"]},
    ),
    "profile_beyond": ({"words": ["profile.steps=[990,1001]"]}, {"words": ["profile.steps=[990,1000]"]}),
    "greedy_thinking": ({"words": ["data.thinking=keep"]}, {"words": ["data.thinking=drop"]}),
    "weight_decay": ({"words": ["optim.weight_decay=0.3"]}, {"words": ["recipe=lora", "optim.weight_decay=0"]}),
    "lora_dropout": ({"words": ["recipe=lora", "dropout.lora=0.1"]}, {"words": ["recipe=lora", "dropout.lora=0.05"]}),
    "lora_scale": (
        {"words": ["recipe=lora", "adapter.rank=8"]},
        {"words": ["recipe=lora", "adapter.rank=8", "adapter.alpha=32"]},
    ),
    "high_dropout": ({"words": ["dropout.feed_forward=0.3"]}, {"words": ["dropout.feed_forward=0.2"]}),
    "adapter_on_random": ({"words": ["recipe=lora", "model.init=random"]}, {"words": ["recipe=lora"]}),
    "little_supervised": ({"words": [], "data": replace(GOOD_DATA, supervised_share=0.04)}, {"words": []}),
    "tokens_cut": ({"words": [], "data": replace(GOOD_DATA, cut_share=0.02)}, {"words": []}),
    "pad_is_eos": ({"words": [], "tokenizer": replace(TOKENIZER, pad_id=TOKENIZER.eos_id)}, {"words": []}),
    "vocabulary": ({"words": [], "tokenizer": replace(TOKENIZER, num_tokens=32_000)}, {"words": []}),
    "fp16": ({"words": [A100, "hardware.precision=16-mixed"]}, {"words": [A100]}),
    "no_bf16": ({"words": [A100], "has_bf16": False}, {"words": [A100]}),
    "eager_attention": (
        {"words": ["model.attention=eager"], "data": replace(GOOD_DATA, longest=5000)},
        {"words": ["model.attention=eager"]},
    ),
    "memory": ({"words": [], "memory": FULL}, {"words": [], "memory": replace(FULL, device=50.0)}),
    "state_memory": ({"words": [], "memory": replace(FULL, device=29.0)}, {"words": [], "memory": FULL}),
    "host_memory": (
        {"words": [A100], "memory": replace(FULL, host=50.0, host_limit=40.0)},
        {"words": [A100], "memory": replace(FULL, host=40.0, host_limit=40.0)},
    ),
    "sharded_8bit": (
        {"words": [A100, "hardware.strategy=fsdp", "optim=adamw_8bit"]},
        {"words": [A100, "hardware.strategy=fsdp", "optim=paged_adamw"]},
    ),
    "not_compiled": ({"words": [A100, "model.attention=sdpa"]}, {"words": [A100]}),
    "paged_on_cpu": ({"words": ["optim=paged_adamw"]}, {"words": [A100, "optim=paged_adamw"]}),
}


def seen(words: list[str], *, has_bf16: bool = True, **rest: Any) -> PreflightFacts:
    found = facts(words, **rest)
    return found if has_bf16 else replace(found, machine=replace(found.machine, has_bf16=False))


def test_every_rule_has_a_case():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_tripped_by_what_it_is_about_and_by_nothing_else(name):
    trips, passes = CASES[name]
    (finding,) = [finding for finding in run_rules(seen(**trips)) if finding.name == name]
    assert finding.severity == RULES[name].severity and finding.message and finding.remedy
    assert name not in names(seen(**passes))


@pytest.mark.parametrize("recipe", ["full_sft", "lora", "qlora", "freeze"])
@pytest.mark.parametrize("model", ["qwen3_0_6b", "qwen2_5_7b"])
@pytest.mark.parametrize("hardware", ["a100_80x4", "h100"])
def test_no_rule_finds_fault_with_a_recipe_as_it_is(recipe, model, hardware):
    # 4000 steps hold the recipes' warm-up whole.
    found = names(facts([f"recipe={recipe}", f"model={model}", f"hardware={hardware}"], steps=4000))
    about_the_machine = {"memory", "state_memory", "slow_save"} if recipe in ("full_sft", "freeze") else set()
    assert found <= about_the_machine


def test_a_run_that_fits_only_until_it_answers_prompts_is_warned_about():
    found = facts(
        ["recipe=lora"], memory=replace(FULL, device=60.0), bytes_by_phase={"training": 50.0, "answering": 61.0}
    )
    assert [f.message for f in run_rules(found) if f.name == "memory"] == [
        "answering needs 0.0 GiB on each device of 0.0 GiB"
    ]


def test_pretraining_is_of_random_weights_and_refused_of_published_ones():
    found = names(facts(["recipe=pretrain", "model.init=random", "hardware=h100"], steps=20_000))
    assert found <= {"no_checkpoints"}
    with pytest.raises(
        ConfigError, match=r"optim.lr=0.0003 is too high for full fine-tuning.*preflight.allow=\[full_lr\]"
    ):
        refuse(run_rules(facts(["recipe=pretrain"], steps=20_000)))


@pytest.mark.parametrize("rule", ["lr:0.01", "lr_multiplier:100"])
def test_a_groups_rate_is_judged_as_the_runs_is(rule):
    (finding, *_) = run_rules(facts([f"optim.groups=[{{match:attention,{rule}}}]"]))
    assert finding.name == "full_lr" and finding.message.startswith("a group's learning rate of ")


def test_intervals_longer_than_the_run_are_none():
    never = [f"{section}.{key}" for section in ("validation", "checkpoint") for key in ("each_epoch=false",)]
    longer = [*never, "validation.every_steps=1000", "checkpoint.every_steps=2000"]
    assert names(facts(longer)) >= {"no_validation", "no_checkpoints"}
    within = [*never, "validation.every_steps=999", "checkpoint.every_steps=500"]
    assert not names(facts(within)) & {"no_validation", "no_checkpoints"}


@pytest.fixture(scope="module")
def message() -> Callable[..., str]:
    """A function that returns a rule's message about the settings that `words` give. The model is always the same."""
    some = facts([])

    def of(name: str, words: list[str], *, steps: int = 1000, **changes: Any) -> str:
        composed = compose(words)
        schedule = Schedule(composed.config.scheduler, steps)
        settings = {"config": composed.config, "typed": composed.typed, "schedule": schedule}
        return "; ".join(RULES[name].check(replace(some, **settings | changes)) or ())

    return of


@pytest.mark.parametrize(
    ("name", "words", "steps", "said"),
    [
        ("slow_save", ["slurm.signal_seconds=10"], 1000, r"a checkpoint of 7 GB takes about 14 s.*signal_seconds=29"),
        ("slow_save", ["slurm.signal_seconds=20"], 1000, "^$"),
        (
            "no_checkpoints",
            ["recipe=full_sft"],
            12_000,
            "the run saves only every 4,000 steps, .* set checkpoint.every_steps=500",
        ),
        ("no_checkpoints", ["checkpoint.every_steps=3000"], 12_000, "^$"),
        ("few_steps", ["train.max_steps=20"], 20, "train.max_steps=20: the run has only 20 steps; raise it"),
        ("few_steps", ["train.max_epochs=2"], 9, "train.max_epochs=2: .* only 9 steps; raise it, or add data"),
        ("few_steps", ["train.max_epochs=1", "train.max_steps=100"], 9, "train.max_epochs=1: .* only 9 steps; raise"),
        (
            "few_steps",
            [],
            9,
            "in 3 epochs over the data there are only 9 steps of 16 samples; add data, or set",
        ),
        ("few_steps", ["recipe=pretrain"], 9, "in 1 epoch over the data there are"),
        ("few_steps", ["experiment=demo"], 9, "the run has only 9 steps; set train.max_steps"),
        (
            "warmup_capped",
            ["recipe=lora"],
            100,
            "the default warm-up of 500 steps is shortened to 20, 20% of the run's 100 steps; set",
        ),
        (
            "warmup_capped",
            ["experiment=demo", "train.max_steps=60"],
            60,
            "train.max_steps=60: the default warm-up of 50",
        ),
        ("no_validation", ["validation.each_epoch=false"], 100, "validation.each_epoch=false: the run never validates"),
        (
            "no_validation",
            ["validation.each_epoch=false", "validation.every_steps=50", "train.max_steps=40"],
            40,
            "train.max_steps=40: validation.every_steps=50 is not reached before the end; lower it",
        ),
    ],
)
def test_a_finding_speaks_of_what_was_typed(name, words, steps, said, message):
    assert re.match(said, message(name, words, steps=steps))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no validation set; set data.val_fraction=0.05"),
        (["data.path=x.jsonl"], "data.path=x.jsonl: there is no"),
        (["data.path=[a.jsonl,b.jsonl]"], r"data.path=\[a.jsonl,b.jsonl\]: there is no"),
        (["data.path=x.jsonl", "validation.every_steps=5"], "validation.every_steps=5: there is no validation set"),
    ],
)
def test_a_missing_validation_set_is_said_of_what_was_typed(words, said, message):
    assert re.match(said, message("no_validation", words, data=replace(GOOD_DATA, has_validation=False)))


@pytest.mark.parametrize("words", [["adapter.rank=16"], ["adapter.rank=8", "adapter.use_rslora=true"]])
def test_a_rank_that_leaves_the_scale_of_the_recipe_or_of_rslora_is_no_finding(words):
    for recipe in ("lora", "qlora"):
        adapter = compose([f"recipe={recipe}"]).config.adapter
        assert adapter.alpha / adapter.rank == AdapterConfig().alpha / AdapterConfig().rank
    assert "lora_scale" not in names(facts(["recipe=lora", *words]))


def test_a_rank_with_the_recipes_alpha_says_the_alpha_that_keeps_the_scale(message):
    assert message("lora_scale", ["recipe=lora", "adapter.rank=8"]) == (
        "adapter.alpha stays 32 for adapter.rank=8: adapters are scaled by 4 instead of 2; set adapter.alpha=16, or"
        " adapter.alpha=32 if that is meant"
    )


def test_sgds_rates_are_its_own():
    assert "full_lr" not in names(facts(["optim=sgd", "optim.lr=0.01"]))


def test_what_is_allowed_only_warns():
    found = run_rules(facts(["optim.lr=3e-4", "preflight.allow=[full_lr]"]))
    assert [finding.severity for finding in found if finding.name == "full_lr"] == ["warning"]
    refuse(found)


def test_a_name_that_is_no_rules_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"there is no rule 'full_lrr'\. Did you mean 'full_lr'\?"):
        resolve_setup(compose(["preflight.allow=[full_lrr]"]))


def test_what_is_not_known_is_not_judged(monkeypatch):
    monkeypatch.setattr(machine, "detect_devices", lambda: Devices(0, "CPU", False, 16.0))
    unknown = facts_of(resolve_setup(compose(["scheduler.warmup_ratio=0.5"])))
    assert (unknown.schedule, unknown.data, unknown.tokenizer) == (None, None, None)
    assert not names(unknown) & {"warmup", "few_steps", "little_supervised", "pad_is_eos"}


def test_the_table_in_the_documents_is_the_rules():
    assert (ROOT / "docs" / "preflight.md").read_text("utf-8") == table()
