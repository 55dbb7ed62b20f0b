"""Every knob, on tiny Qwen2 and Qwen3: the loss falls, what is frozen stays, a resumed run gives the same bits."""

import math

import pytest
import torch

from tests.knobs.training import LR, SAVED, STEPS, Knobs, Trained, trained

PLACES = ("attention", "feed_forward", "residual", "embedding")
LORA = {"kind": "lora"}
KNOBS = {
    **{
        name: Knobs(optim={"name": name}) for name in ("adamw", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
    },
    "sgd": Knobs(optim={"name": "sgd", "lr": 0.3, "momentum": 0.9}),
    "amsgrad": Knobs(optim={"amsgrad": True}),
    "layer_lr_decay": Knobs(optim={"layer_lr_decay": 0.7}),
    **{
        name: Knobs(scheduler={"name": name, "min_lr_ratio": 0.1})
        for name in ("cosine", "linear", "exponential", "constant", "wsd")
    },
    **{
        f"dropout-{place}": Knobs(dropout={place: 0.1})
        for place in ("attention", "feed_forward", "residual", "embedding")
    },
    "dropout-layers": Knobs(dropout={"attention": 0.2, "residual": 0.2, "layers": (1, 1)}),
    "dropout-lora": Knobs(dropout={"lora": 0.1}, adapter=LORA),
    "dropout-checkpointed": Knobs(dropout={"attention": 0.1, "feed_forward": 0.1}, memory="full"),
    "neftune": Knobs(dropout={"neftune_alpha": 0.1}, adapter=LORA, memory="full"),
    "freeze-embedding": Knobs(freeze={"parameters": ("embedding",)}),
    "freeze-lower-half": Knobs(freeze={"parameters": ("embedding",), "lower_layers_ratio": 0.5}),
    "freeze-layers": Knobs(freeze={"parameters": ("norm",), "layers": (1, 1)}),
    "lora": Knobs(adapter=LORA),
    "lora-muon": Knobs(optim={"name": "muon"}, adapter=LORA),
    "lora-plus": Knobs(optim={"lora_plus_ratio": 4.0}, adapter=LORA),
    "rslora": Knobs(adapter=LORA | {"use_rslora": True}),
    "dora": Knobs(adapter=LORA | {"use_dora": True}),
    "lora-attention-of-one-layer": Knobs(adapter=LORA | {"target_modules": ("attention",), "layers": (1, 1)}),
    "qlora": Knobs(adapter=LORA | {"quantization": "nf4"}),
    "qlora-single": Knobs(adapter=LORA | {"quantization": "nf4", "double_quantization": False}),
    "qdora": Knobs(adapter=LORA | {"quantization": "nf4", "use_dora": True}),
    "qlora-8bit": Knobs(optim={"name": "paged_adamw_8bit"}, adapter=LORA | {"quantization": "nf4"}),
}


# What these do does not depend on the family: they act on numbers, whatever the parameters are called.
ON_ONE_FAMILY = ("cosine", "linear", "exponential", "constant", "wsd", "sgd", "amsgrad", "paged_adamw", "adamw_8bit")
ON_ONE_FAMILY += (
    "dropout-residual",
    "dropout-embedding",
    "neftune",
    "rslora",
    "lora-plus",
    "qlora-single",
    "qlora-8bit",
)
CASES = [
    (name, family) for name in KNOBS for family in ("qwen2", "qwen3") if family == "qwen3" or name not in ON_ONE_FAMILY
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def knobs(case):
    return KNOBS[case[0]]


@pytest.fixture(scope="module")
def family(case):
    return case[1]


@pytest.fixture(scope="module")
def checkpoint(family, knobs, tmp_path_factory):
    return tmp_path_factory.mktemp("knobs") / "checkpoints" / f"step-{SAVED:06d}"


@pytest.fixture(scope="module")
def run(family, knobs, checkpoint) -> Trained:
    return trained(family, knobs, save=checkpoint)


def test_the_loss_falls(run):
    assert sum(run.losses[-3:]) < sum(run.losses[:3]) - 0.01


def test_what_is_trained_moves_and_what_is_frozen_does_not_by_a_bit(run):
    for name, parameter in run.model.causal_lm.named_parameters():
        # The loss does not depend on Qwen2's key biases: they shift all scores of a query alike.
        if not name.endswith("k_proj.bias"):
            assert torch.equal(run.before[name], run.after[name]) != parameter.requires_grad, name


def test_frozen_parameters_have_no_gradient(run):
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_a_run_resumed_from_its_checkpoint_gives_the_same_bits(run, family, knobs, checkpoint):
    again = trained(family, knobs, resume=checkpoint)
    assert again.losses == run.losses[SAVED:]
    assert again.rates == run.rates[SAVED:]
    assert all(torch.equal(again.after[name], weight) for name, weight in run.after.items())


def test_a_checkpoint_holds_what_is_trained_and_no_more(run, checkpoint):
    from safetensors import safe_open

    with safe_open(str(checkpoint / "model.safetensors"), framework="pt") as file:
        saved = set(file.keys())
    assert saved == {name for name, p in run.model.causal_lm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [
        # Steps 0, 2 (the warm-up's last), 7 and 11 of 12, with 3 of warm-up and a floor of 0.1.
        ("cosine", (1 / 3, 1, 0.55 + 0.45 * math.cos(math.pi * 4 / 9), 0.55 + 0.45 * math.cos(math.pi * 8 / 9))),
        ("linear", (1 / 3, 1, 0.1 + 0.9 * 5 / 9, 0.1 + 0.9 * 1 / 9)),
        ("exponential", (1 / 3, 1, 0.1 ** (4 / 9), 0.1 ** (8 / 9))),
        ("constant", (1 / 3, 1, 1, 1)),
        ("wsd", (1 / 3, 1, 1, 0.1 + 0.9 * 1 / 2)),
    ],
)
def test_groups_have_the_rates_that_one_computes_by_hand(scheduler, factors):
    rules = ({"match": "norm", "lr": 5e-4}, {"match": "mlp", "lr_multiplier": 0.5})
    run = trained("qwen3", Knobs(optim={"groups": rules}, scheduler={"name": scheduler, "min_lr_ratio": 0.1}))
    assert len(run.rates) == STEPS
    for step, factor in zip((0, 2, 7, 11), factors, strict=True):
        expected = {"decay": LR * factor, "norm": 5e-4 * factor, "mlp": 0.5 * LR * factor}
        assert run.rates[step] == pytest.approx(expected), step


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_dropout_of_zero_is_no_dropout_to_the_bit(family):
    plain = trained(family, Knobs())
    zero = trained(family, Knobs(dropout=dict.fromkeys(PLACES, 0.0)))
    assert zero.losses == plain.losses
    for place in PLACES:
        assert trained(family, Knobs(dropout={place: 0.1})).losses[0] != plain.losses[0]


def test_dropout_under_checkpointing_is_dropout_without():
    dropout = dict.fromkeys(PLACES, 0.1)
    plain = trained("qwen3", Knobs(dropout=dropout))
    for memory in ("selective", "full", "offload"):
        run = trained("qwen3", Knobs(dropout=dropout, memory=memory))
        assert run.losses == plain.losses
        assert all(torch.equal(run.after[name], weight) for name, weight in plain.after.items())
