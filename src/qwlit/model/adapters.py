"""LoRA: small trainable matrices inside a frozen model (peft's layers, put in place without a wrapper)."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwlit.core.errors import ConfigError, nearest
from qwlit.model.config import AdapterConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = ("lm_head", "embed_tokens")


def apply_adapter(model: "PreTrainedModel", adapter: AdapterConfig, *, dropout: float, seed: int) -> None:
    """Put adapters beside the target layers, freeze everything else; nothing happens for kind none.

    The model stays what it was (no PeftModel around it), so `model.model`, `model.lm_head` and `generate` still work.
    Adapters are float32 whatever the frozen dtype, and start as no change at all: B is zero, A is drawn from `seed`.

    Raises:
        ConfigError: a target matches no linear layer, or is the embedding or the head.
    """
    if adapter.kind == "none":
        return
    _check_targets(model, adapter.target_modules)
    # bitsandbytes, which peft imports, complains about an optional CPU kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=dropout,
        target_modules=list(adapter.target_modules),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _check_targets(model: "PreTrainedModel", targets: tuple[str, ...]) -> None:
    if not targets:
        raise ConfigError("adapter.target_modules is empty; name the layers that get an adapter")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    leaves = sorted({name.rpartition(".")[2] for name in linears}.difference(EMBEDDINGS))
    for target in targets:
        matched = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not matched:
            hint = nearest(target, leaves) or f" Choose among {', '.join(leaves)}."
            raise ConfigError(f"adapter.target_modules: '{target}' matches no linear layer.{hint}")
        if any(name.rpartition(".")[2] in EMBEDDINGS for name in matched):
            raise ConfigError(
                f"adapter.target_modules: '{target}' cannot have an adapter, the loss reads its weight directly; "
                f"choose among {', '.join(leaves)}"
            )
