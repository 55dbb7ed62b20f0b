"""QLoRA's base: 4 bits of NF4, close to what it was, one layer at a time."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from qwlit.core.errors import ConfigError
from qwlit.model.config import (
    DECODER_LINEARS,
    AdapterConfig,
    DropoutConfig,
    Execution,
    FreezeConfig,
    ModelConfig,
)
from qwlit.model.loss_model import build_loss_model, build_meta_model
from qwlit.model.quantize import check_blocks, num_elements
from tests.tiny import packed, random_samples, save_folder, tiny_causal_lm

WIDE = {"hidden_size": 64, "intermediate_size": 128}
BATCH = packed(random_samples([5, 9, 14]))


def built(folder, dtype=torch.float32, **adapter):
    return build_loss_model(
        ModelConfig(path=str(folder)),
        AdapterConfig(**({"kind": "lora", "rank": 2, "quantization": "nf4"} | adapter)),
        DropoutConfig(),
        FreezeConfig(),
        Execution("sdpa", "none", dtype, dtype),
        seed=0,
    )


@pytest.fixture(scope="module", params=[("qwen3", True), ("qwen2", False)])
def plain(request):
    return tiny_causal_lm(request.param[0], tied=request.param[1], spread=1.0, **WIDE)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    return save_folder(plain, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("double", [True, False])
def test_every_linear_of_the_decoder_is_stored_in_4_bits_near_what_it_was(folder, plain, double):
    model = built(folder, double_quantization=double).causal_lm
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    bases = {name: m for name, m in quantized.items() if name.endswith("base_layer")}
    assert len(bases) == 2 * len(DECODER_LINEARS)
    for name, module in bases.items():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, module.weight.dtype) == ("nf4", double, torch.uint8)
        original = plain.get_submodule(name.removesuffix(".base_layer")).weight.detach()
        error = (dequantize_4bit(module.weight, state) - original).norm() / original.norm()
        # NF4 of a normal distribution: about 0.09 (measured), and never exact.
        assert 0.01 < float(error) < 0.12, name


def test_rows_of_broken_blocks_are_refused(tmp_path):
    model = ModelConfig(path=str(save_folder(tiny_causal_lm(), tmp_path / "narrow")))
    adapter = AdapterConfig(kind="lora", quantization="nf4")
    with pytest.raises(ConfigError, match=r"blocks of 64 weights, but model\.layers\.0\.self_attn\.q_proj is 32 wide"):
        check_blocks(build_meta_model(model, adapter, DropoutConfig(), FreezeConfig()))


def test_biases_come_along_and_parameters_are_counted_as_before(folder, plain):
    model = built(folder)
    names = {name.replace(".base_layer", ""): p for name, p in model.causal_lm.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert num_elements(names[name]) == parameter.numel()
        if name.endswith("bias"):
            assert torch.equal(names[name], parameter)


def test_training_after_an_evaluation_is_training_before_it(folder):
    """bitsandbytes repacks the weights of an evaluated model on some CPUs, and could not train it any more."""
    fresh, evaluated = built(folder, torch.bfloat16), built(folder, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        evaluated.eval()(BATCH)
    gradients = []
    for model in (fresh, evaluated):
        with torch.autocast("cpu", torch.bfloat16):
            model.train()(BATCH).loss_sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_adapters_are_float32_and_the_rest_of_the_base_bf16(folder):
    model = built(folder, torch.bfloat16)
    for name, parameter in model.named_parameters():
        kind = torch.float32 if "lora_" in name else torch.uint8 if "proj" in name and "bias" not in name else None
        assert parameter.dtype == (kind or torch.bfloat16), name


def test_lengths_of_dora_are_those_of_the_quantized_rows(folder):
    model = built(folder, use_dora=True).causal_lm
    layer = model.model.layers[1].mlp.up_proj
    weight = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state)
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, weight.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_on_a_bf16_base_starts_as_no_change_at_all(folder, quantization):
    losses = []
    for use_dora in (True, False):
        model = built(folder, torch.bfloat16, quantization=quantization, use_dora=use_dora)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses.append(float(model(BATCH).loss_sum))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
