"""Every number of the tuning guide is in conf/, under the name that one types."""

import pytest

from qwlit.config.compose import compose
from qwlit.config.groups import conf_dir, group_options
from qwlit.model.config import DECODER_LINEARS

# Stage: lr, warm-up, decay, weight decay, not decayed, dropout of attention and feed-forward.
STAGES = {
    "pretrain": (3e-4, {"warmup_steps": 2000}, "cosine", 0.1, ("bias", "norm"), (0.1, 0.1)),
    "full_sft": (1e-5, {"warmup_ratio": 0.1}, "linear", 0.01, ("bias", "norm"), (0.05, 0.05)),
    "lora": (2e-4, {"warmup_steps": 500}, "cosine", 0.001, (), (0.0, 0.0)),
}
STAGES |= {"qlora": STAGES["lora"], "freeze": STAGES["full_sft"]}


def test_the_recipes_are_the_stages_with_qlora_and_freeze():
    assert set(group_options()["recipe"]) == STAGES.keys()
    for recipe in STAGES:
        assert len((conf_dir() / "recipe" / f"{recipe}.yaml").read_text().splitlines()) <= 20


@pytest.mark.parametrize("recipe", STAGES)
def test_a_recipe_has_its_stages_numbers(recipe):
    lr, warmup, decay, weight_decay, no_decay, dropout = STAGES[recipe]
    config = compose([f"recipe={recipe}"]).config
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adamw", lr, weight_decay)
    assert config.optim.no_decay == no_decay
    set_warmup = {"warmup_steps": config.scheduler.warmup_steps, "warmup_ratio": config.scheduler.warmup_ratio}
    assert {name: value for name, value in set_warmup.items() if value is not None} == warmup
    assert config.scheduler.name == decay
    assert (config.dropout.attention, config.dropout.feed_forward) == dropout
    assert (config.dropout.residual, config.dropout.embedding, config.dropout.lora) == (0, 0, 0)
    assert (config.optim.betas, config.optim.eps, config.optim.amsgrad) == ((0.9, 0.999), 1e-8, False)
    assert config.train.max_grad_norm == 1.0
    assert config.train.global_batch_size >= 16
    assert 3 <= config.validation.early_stopping_patience <= 5
    assert config.validation.each_epoch and config.checkpoint.each_epoch


def test_what_else_the_recipes_say():
    assert compose(["recipe=lora"]).config.adapter.kind == "lora"
    assert compose(["recipe=lora"]).config.adapter.target_modules == DECODER_LINEARS
    assert compose(["recipe=lora"]).config.adapter.quantization == "none"
    qlora = compose(["recipe=qlora"]).config.adapter
    assert (qlora.kind, qlora.quantization, qlora.double_quantization) == ("lora", "nf4", True)
    freeze = compose(["recipe=freeze"]).config.freeze
    assert (freeze.parameters, freeze.lower_layers_ratio) == (("embedding",), 0.5)
    for recipe in ("pretrain", "full_sft", "lora", "qlora"):
        assert compose([f"recipe={recipe}"]).config.freeze.parameters == ()
    assert all(value in (0, None) for value in vars(compose(["dropout=none"]).config.dropout).values())


def test_the_schedules_offered():
    assert set(group_options()["scheduler"]) >= {"cosine", "linear", "exponential", "constant"}
    for name in group_options()["scheduler"]:
        assert compose([f"scheduler={name}"]).config.scheduler.name == name


@pytest.mark.parametrize(
    ("experiment", "lr", "batch"),
    # The guide's batch is a micro-batch; eight of them make a step.
    [("conservative", 1e-5, 2), ("balanced", 3e-4, 4), ("aggressive", 5e-4, 8), ("recommended", 2e-4, 4)],
)
def test_the_four_settings_compared_differ_in_rate_and_batch_alone(experiment, lr, batch):
    config = compose([f"experiment={experiment}"]).config
    assert (config.optim.lr, config.train.global_batch_size) == (lr, 8 * batch)
    same = compose(["recipe=lora", f"optim.lr={lr}", f"train.global_batch_size={8 * batch}"]).config
    for section in ("optim", "train", "scheduler", "dropout", "adapter", "freeze"):
        assert getattr(config, section) == getattr(same, section)


def test_the_model_of_the_guide():
    shape = compose(["model=qwen3_0_6b"]).config.model.architecture
    assert (shape.num_hidden_layers, shape.num_attention_heads, shape.num_key_value_heads) == (28, 16, 8)
    assert (shape.head_dim, shape.hidden_size, shape.intermediate_size) == (128, 1024, 3072)
    assert (shape.max_position_embeddings, shape.vocab_size, shape.tie_word_embeddings) == (32_768, 151_936, True)


@pytest.mark.parametrize("hardware", [name for name in group_options()["hardware"] if "00" in name or "4090" in name])
def test_gpu_profiles_save_memory_as_the_guide_says(hardware):
    machine = compose([f"hardware={hardware}"]).config.hardware
    assert (machine.precision, machine.pin_memory, machine.num_workers) == ("bf16-mixed", True, 4)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(name, name) for name in ("adamw", "muon", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")],
)
def test_an_optimizer_changes_what_it_is_and_leaves_the_recipes_numbers(optimizer, name):
    config = compose(["recipe=lora", f"optim={optimizer}"]).config.optim
    assert (config.name, config.lr, config.weight_decay) == (name, 2e-4, 0.001)
