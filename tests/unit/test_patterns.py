"""Patterns: which names a kind, a part of a name or a glob means."""

import pytest

from qwlit.core.errors import ConfigError
from qwlit.core.patterns import KINDS, is_kind, names_in_layers, select
from tests.tiny import tiny_causal_lm

QWEN2 = [name for name, _ in tiny_causal_lm("qwen2", tied=False).named_parameters()]
QWEN3 = [name for name, _ in tiny_causal_lm("qwen3").named_parameters()]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("model.layers.0.self_attn.q_proj.weight", {"attention"}),
        ("model.layers.0.self_attn.q_proj.bias", {"attention", "bias"}),
        ("model.layers.0.self_attn.q_norm.weight", {"attention", "norm"}),
        ("model.layers.0.input_layernorm.weight", {"norm"}),
        ("model.layers.0.mlp.up_proj.weight", {"mlp"}),
        ("model.norm.weight", {"norm"}),
        ("model.embed_tokens.weight", {"embedding"}),
        ("lm_head.weight", {"head"}),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", {"attention"}),
    ],
)
def test_kinds_of_qwen_parameters(name, kinds):
    assert {kind for kind in KINDS if is_kind(kind, name)} == kinds


@pytest.mark.parametrize(
    ("pattern", "layers", "count"),
    [
        ("norm", None, 2 * 2 + 1),
        ("model.norm", None, 1),
        ("bias", None, 2 * 3),
        ("q_proj", None, 2 * 2),
        ("q_proj.bias", None, 2),
        ("layers.1", None, 12),
        ("attention", (1, 1), 7),
        ("model.layers.*.mlp.*", None, 6),
        ("*", (0, 1), 24),
        ("head", None, 1),
        ("embedding", None, 1),
    ],
)
def test_a_pattern_means_so_many_of_a_two_layer_qwen2(pattern, layers, count):
    assert len(select(QWEN2, pattern, field="f", layers=layers)) == count


@pytest.mark.parametrize(
    ("pattern", "layers", "said"),
    [
        ("q_prjo", None, r"f: 'q_prjo' matches no parameter. Did you mean 'q_proj'\?"),
        ("bias", None, "f: 'bias' matches no parameter"),
        ("head", None, "The head is tied to the embedding; use 'embedding'"),
        ("embedding", (0, 1), "'embedding' matches no parameter in layers 0 to 1"),
        ("mlp", (1, 2), r"f: layers \[1,2\] are not a range of the model's layers, 0 to 1"),
        ("mlp", (1, 0), r"layers \[1,0\] are not"),
        ("bias", None, "Known: attention, down_proj, embed_tokens, embedding"),
    ],
)
def test_a_pattern_that_matches_nothing_of_a_tied_qwen3_is_an_error(pattern, layers, said):
    with pytest.raises(ConfigError, match=said):
        select(QWEN3, pattern, field="f", layers=layers)


def test_a_range_of_layers_has_both_its_ends():
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(12)]
    assert names_in_layers(names, (1, 10), field="f") == names[1:11]
