"""LoRA, rsLoRA and DoRA adapters in a frozen model: peft's layers, without peft's wrapper model."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from qwlit.core.errors import ConfigError
from qwlit.core.patterns import is_kind, matches, names_in_layers, select
from qwlit.core.quiet import quieten_bitsandbytes
from qwlit.core.sharding import local
from qwlit.model.config import AdapterConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = ("lm_head", "embed_tokens")


def apply_adapter(model: "PreTrainedModel", adapter: AdapterConfig, *, dropout: float, seed: int) -> None:
    """Add adapters to the target layers and freeze everything else. Do nothing with adapter.kind=none.

    The model keeps its class (no PeftModel around it), so `model.model`, `model.lm_head` and `generate` still work.
    Adapters are float32 with any frozen dtype. At first they do not change the output: B is zero. `seed` seeds A.

    Raises:
        ConfigError: a target matches no linear layer, or is the embedding or the head; or the model lacks the layers.
    """
    if adapter.kind == "none":
        return
    targets = _targets(model, adapter)
    quieten_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # On the meta device peft would draw A and then drop it, seconds for a large model.
        inject_adapter_in_model(config, model, low_cpu_mem_usage=next(model.parameters()).is_meta)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def init_dora_magnitude(model: "PreTrainedModel") -> None:
    """Set DoRA's magnitudes to the norms of the weights' rows, so that at first they do not change the model's output.

    peft computes the magnitudes when it adds the adapter. That is too early if the weights are not loaded yet, and it
    rounds them to the dtype of the base.
    """
    layers = [module for module in model.modules() if getattr(module, "lora_magnitude_vector", None)]
    if not layers:
        return
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad():
        for layer in layers:
            rows = local(dequantize_module_weight(layer.base_layer)).float()
            for magnitude in layer.lora_magnitude_vector.values():
                local(magnitude.weight).copy_(rows.norm(dim=1))


def _targets(model: "PreTrainedModel", adapter: AdapterConfig) -> list[str]:
    """Return peft's target_modules: plain names as they are, other patterns as full names of the layers that match."""
    if not adapter.target_modules:
        raise ConfigError("adapter.target_modules is empty; name the layers that get an adapter")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    leaves = sorted({name.rpartition(".")[2] for name in linears}.difference(EMBEDDINGS))
    field, chosen = "adapter.target_modules", set()
    if adapter.layers is not None:
        names_in_layers(linears, adapter.layers, field="adapter.layers")
    # Patterns match parameter names, not names of layers.
    names = [f"{name}.weight" for name in linears]
    without = [name for name in names if is_kind("embedding", name) or is_kind("head", name)]
    allowed = [name for name in names if name not in without]
    for pattern in adapter.target_modules:
        if adapter.layers is None and any(matches(pattern, name) for name in without):
            raise ConfigError(
                f"{field}: '{pattern}' cannot have an adapter, the loss reads its weight directly; "
                f"choose among {', '.join(leaves)}"
            )
        found = select(allowed, pattern, field=field, layers=adapter.layers, things="linear layer")
        chosen |= {name.removesuffix(".weight") for name in found}
    plain = adapter.layers is None and all(pattern in leaves for pattern in adapter.target_modules)
    return list(adapter.target_modules) if plain else sorted(chosen)
