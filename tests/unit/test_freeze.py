"""Freezing: what is not trained, in which precision it is kept, and that it costs nothing."""

import pytest
import torch

from qwlit.core.errors import ConfigError
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.loss_model import LossModel
from tests.tiny import load_causal_lm, packed, random_samples, tiny_architecture


def frozen(family="qwen3", *, tied=True, dtype=torch.float32, **settings):
    config = ModelConfig(init="random", architecture=tiny_architecture(family, tied=tied))
    return load_causal_lm(config, seed=0, freeze=FreezeConfig(**settings), frozen_dtype=dtype)


def names(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_nothing_is_frozen_unless_named():
    assert names(frozen()) == set()


def test_patterns_layers_and_the_lower_share_add_up():
    assert names(frozen(parameters=("embedding",))) == {"model.embed_tokens.weight"}
    lower = names(frozen(lower_layers_ratio=0.5))
    assert lower and all(name.startswith("model.layers.0.") for name in lower)
    both = names(frozen(layers=(1, 1), parameters=("q_proj",)))
    assert "model.layers.0.self_attn.q_proj.weight" in both
    assert sum(name.startswith("model.layers.0.") for name in both) == 1
    assert sum(name.startswith("model.layers.1.") for name in both) == 11


def test_a_tied_head_freezes_with_the_embedding_and_an_untied_one_by_itself():
    tied = frozen(parameters=("embedding",))
    assert not tied.lm_head.weight.requires_grad
    untied = frozen(tied=False, parameters=("head",))
    assert names(untied) == {"lm_head.weight"}
    with pytest.raises(ConfigError, match="The head is tied to the embedding"):
        frozen(parameters=("head",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parameters": ("q_prj",)}, r"freeze.parameters: 'q_prj' matches no parameter. Did you mean 'q_proj'\?"),
        ({"layers": (1, 2)}, r"freeze.layers: layers \[1,2\] are not"),
        ({"lower_layers_ratio": 0.49}, "freeze.lower_layers_ratio=0.49 of 2 layers is none"),
        ({"parameters": ("*",)}, "freeze leaves nothing to train"),
    ],
)
def test_what_freezes_nothing_or_everything_is_an_error(settings, said):
    with pytest.raises(ConfigError, match=said):
        frozen(**settings)


def test_frozen_weights_are_kept_in_the_frozen_dtype_and_trained_ones_in_float32():
    model = frozen(dtype=torch.bfloat16, layers=(0, 0))
    assert all((p.dtype == torch.float32) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_head_gets_no_gradient_and_none_is_computed(tied, monkeypatch):
    from qwlit.model import head

    monkeypatch.setattr(head, "_add_product", lambda *_: pytest.fail("the head's gradient was computed"))
    model = LossModel(frozen(tied=tied, parameters=("embedding",) if tied else ("head",)), "sdpa").train()
    model(packed(random_samples([5, 9]))).loss_sum.backward()
    assert model.causal_lm.lm_head.weight.grad is None
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_below_the_lowest_trained_layer_nothing_is_kept_for_a_backward_pass():
    model = LossModel(frozen(parameters=("embedding",), layers=(0, 0)), "sdpa").train()
    seen = []
    model.causal_lm.model.layers[0].register_forward_hook(lambda m, i, out: seen.append(out.requires_grad))
    model(packed(random_samples([5, 9]))).loss_sum.backward()
    assert seen == [False]
