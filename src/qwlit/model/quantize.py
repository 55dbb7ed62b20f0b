"""Quantize frozen linear layers to 4 bits (NF4 of bitsandbytes), each one as soon as its weight is loaded."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from qwlit.core.errors import ConfigError
from qwlit.core.quiet import quieten_bitsandbytes
from qwlit.model.config import AdapterConfig
from qwlit.model.families import family_of
from qwlit.model.families.decoder import DECODER_LINEARS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Number of weights that share a scale, as in the QLoRA paper. On CPU, bitsandbytes 0.50 reads blocks that cross rows
# wrongly (rows of 32: quantizing and dequantizing gave a relative error of 0.2-0.4 instead of 0.09).
BLOCK = 64


def check_blocks(model: "PreTrainedModel") -> None:
    """Refuse a model whose weight rows are not a whole number of blocks.

    Raises:
        ConfigError: it names the layer and its width.
    """
    for name, module in family_of(model).layers(model).named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear) and "lora_" not in name and module.in_features % BLOCK:
            raise ConfigError(
                f"adapter.quantization=nf4 stores blocks of {BLOCK} weights, but {name.removesuffix('.base_layer')} is"
                f" {module.in_features} wide; use a model whose widths are multiples, or adapter.quantization=none"
            )


class Quantizer:
    """Quantizes each linear layer of the decoder as soon as its weight is written.

    So the whole unquantized model is never in memory at once. Pass it to `fill_causal_lm` as `on_weight_written`.
    """

    def __init__(self, model: "PreTrainedModel", adapter: AdapterConfig, compute_dtype: torch.dtype) -> None:
        self._model = model
        self._double = adapter.double_quantization
        self._compute_dtype = compute_dtype

    def __call__(self, name: str) -> None:
        """Quantize the layer that the weight `name` belongs to, if it is one of the decoder's linear layers."""
        layer, _, kind = name.rpartition(".")
        parent, _, leaf = layer.rpartition(".")
        if kind != "weight" or leaf not in DECODER_LINEARS:
            return
        linear = self._model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        setattr(self._model.get_submodule(parent), leaf, self._quantized(linear))

    def _quantized(self, linear: nn.Linear) -> nn.Module:
        quieten_bitsandbytes()
        from bitsandbytes.nn import Linear4bit, Params4bit

        quantized: nn.Module = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=self._compute_dtype,
            compress_statistics=self._double,
            quant_type="nf4",
            device="meta",
        )
        quantized.weight = Params4bit(
            linear.weight.data,
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=self._double,
            quant_type="nf4",
            module=quantized,
        ).to(linear.weight.device)
        # The same tensor, not a copy, because its values may be loaded after the weight.
        quantized.bias = linear.bias
        # On CPUs with AVX512-BF16 bitsandbytes repacks the weight at the first evaluation, and later training fails.
        quantized.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return quantized


def num_elements(parameter: nn.Parameter) -> int:
    """Return how many elements a parameter has; a byte of a 4-bit parameter holds two elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
