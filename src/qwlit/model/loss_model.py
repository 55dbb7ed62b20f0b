"""Backbone, head and loss as one module, which DDP or FSDP2 wraps as the root.

Shapes: B sequences, T positions, N label positions, D hidden.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from qwlit.core.batch import MicroBatch
from qwlit.model.activation_checkpointing import apply_activation_checkpointing
from qwlit.model.adapters import apply_adapter, init_dora_magnitude
from qwlit.model.compile import compile_layers
from qwlit.model.config import AdapterConfig, AttentionKernel, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.cpu import embed, return_freed_memory
from qwlit.model.dropout import add_neftune_noise, apply_dropout
from qwlit.model.families import family_of
from qwlit.model.freeze import apply_freeze
from qwlit.model.head import LMHead, token_cross_entropy
from qwlit.model.inspection import Inspection
from qwlit.model.last_layer import restrict_last_ffn_to_labels
from qwlit.model.load import empty_causal_lm, fill_causal_lm, model_shape
from qwlit.model.presets import meta_causal_lm
from qwlit.model.quantize import Quantizer
from qwlit.model.saved_adapter import check_initial_adapter, load_initial_adapter
from qwlit.model.shard import unshard_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LossOutput(NamedTuple):
    """Sums over a micro-batch's supervised tokens, on its device."""

    loss_sum: Tensor
    """float32 scalar, nats."""
    num_correct: Tensor
    """int64 scalar: targets that were the most likely token; counted in eval mode only, 0 in training."""


class LossModel(nn.Module):
    """A causal LM that takes a micro-batch and returns its summed loss.

    Only `forward` may use the weights of backbone and head: FSDP2 gathers them for `forward` only.
    """

    def __init__(self, causal_lm: "PreTrainedModel", attention: AttentionKernel, *, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        restrict_last_ffn_to_labels(causal_lm)
        self.causal_lm = causal_lm
        self.family = family_of(causal_lm)
        causal_lm.set_output_embeddings(LMHead.of(self.family.head(causal_lm)))
        self.attention = attention
        self.neftune_alpha = neftune_alpha

    def forward(self, micro: MicroBatch, inspection: Inspection | None = None) -> LossOutput:
        """Compute the summed loss at the label positions. Never waits for the device.

        Args:
            inspection: filled in the pass, for few label positions of padded sequences.
        """
        supervised, head = self._label_states(micro, inspection), self.family.head(self.causal_lm)
        if inspection is not None:
            inspection.logits = head(supervised.to(head.weight.dtype)).float()
        unshard_head(head)
        return LossOutput(*head.loss(supervised, micro.targets, count_correct=not self.training))

    def token_losses(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return loss and correctness of each label position, see `token_cross_entropy`. Not for sharded models."""
        return token_cross_entropy(
            self._label_states(micro, None), self.family.head(self.causal_lm).weight, micro.targets
        )

    def _label_states(self, micro: MicroBatch, inspection: Inspection | None) -> Tensor:
        """Return the last hidden states at the label positions, (N, D)."""
        kernel = self._kernel(micro)
        embedded = embed(self.causal_lm, micro.input_ids)  # (B, T, D)
        if self.neftune_alpha and self.training:
            embedded = add_neftune_noise(embedded, micro, self.neftune_alpha)
        states: Tensor = self.causal_lm.model(
            inputs_embeds=embedded,
            position_ids=micro.position_ids,
            use_cache=False,
            attention_kernel=kernel,
            cu_seqlens=micro.cu_seqlens,
            max_seqlen=micro.max_seqlen,
            # A tuple would make the compiler recompile a layer for each packing, and varlen does not need it.
            document_lengths=None if kernel == "varlen" else micro.document_lengths,
            label_positions=micro.label_positions,
            inspection=inspection,
        ).last_hidden_state
        return states

    def _kernel(self, micro: MicroBatch) -> AttentionKernel:
        """Return the kernel for this micro-batch: sdpa instead of varlen on CPU, which has no varlen kernel."""
        return "sdpa" if self.attention == "varlen" and not micro.input_ids.is_cuda else self.attention


def build_loss_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    dropout: DropoutConfig,
    freeze: FreezeConfig | None,
    execution: Execution,
    *,
    seed: int,
    leave_empty: bool = False,
) -> LossModel:
    """Build the model with weights, adapters and dropout, in training mode, on the CPU.

    Args:
        freeze: None: no weight of the model is trained, and all of them are frozen ones.
        seed: of random weights and of adapters.
        leave_empty: leave the weights to `fill_causal_lm` and the adapters to `init_adapter`.

    Raises:
        ConfigError: see `empty_causal_lm`, `fill_causal_lm`, `apply_adapter` and `apply_dropout`.
    """
    trained = freeze if adapter.kind == "none" else None
    causal_lm = empty_causal_lm(model, freeze=trained, frozen_dtype=execution.frozen_dtype)
    return_freed_memory(causal_lm)
    if not leave_empty:
        # The quantizer converts each linear layer to 4 bits as soon as its weight is written.
        quantizer = Quantizer(causal_lm, adapter, execution.compute_dtype) if adapter.quantization == "nf4" else None
        fill_causal_lm(causal_lm, model, seed=seed, on_weight_written=quantizer)
    _add_adapter_and_dropout(causal_lm, adapter, dropout, seed)
    if not leave_empty:
        init_adapter(causal_lm, model)
    apply_activation_checkpointing(causal_lm, execution.activation_checkpointing)
    if execution.compiled:
        compile_layers(causal_lm)
    return LossModel(causal_lm, execution.attention, neftune_alpha=dropout.neftune_alpha).train()


def init_adapter(causal_lm: "PreTrainedModel", model: ModelConfig) -> None:
    """Initialise the adapters after the base weights are loaded; if model.adapter_path is set, load or merge that one.

    Raises:
        ConfigError: the files of model.adapter_path are damaged.
    """
    init_dora_magnitude(causal_lm)
    load_initial_adapter(causal_lm, model)


def build_meta_model(
    model: ModelConfig, adapter: AdapterConfig, dropout: DropoutConfig, freeze: FreezeConfig
) -> "PreTrainedModel":
    """Return the model without weights, on the meta device: names, shapes, and which parameters are trained.

    Raises:
        ConfigError: a pattern matches nothing, or the model lacks the layers that a setting names.
    """
    causal_lm = meta_causal_lm(model_shape(model))
    apply_freeze(causal_lm, freeze)
    with torch.device("meta"):
        _add_adapter_and_dropout(causal_lm, adapter, dropout, seed=0)
    check_initial_adapter(causal_lm, model, adapter)
    return causal_lm


def _add_adapter_and_dropout(
    causal_lm: "PreTrainedModel", adapter: AdapterConfig, dropout: DropoutConfig, seed: int
) -> None:
    apply_adapter(causal_lm, adapter, dropout=dropout.lora, seed=seed)
    apply_dropout(causal_lm, dropout)
