"""A decoder with norms before its blocks and a gated feed-forward block, with Hugging Face's module names.

Shapes: B sequences, T positions, N label positions, D hidden.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear layers of a decoder layer."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""Names of the two weights that tied models share."""


@dataclass(frozen=True)
class ModelFamily:
    """An architecture: its classes in transformers, and accessors for the modules of a model."""

    model_type: str
    """The value of `model_type` in config.json."""
    class_prefix: str
    """transformers' classes are this name plus Config, and this name plus ForCausalLM."""
    query_norm: str | None = None
    """Name, in the attention block, of the norm on each query head; None if there is none."""
    key_norm: str | None = None
    """Name, in the attention block, of the norm on each key head; None if there is none."""

    @property
    def class_name(self) -> str:
        """Name of the causal LM in `architectures` of config.json."""
        return f"{self.class_prefix}ForCausalLM"

    def classes(self) -> tuple[Any, Any]:
        """Return transformers' (configuration class, causal LM class)."""
        import transformers

        return getattr(transformers, f"{self.class_prefix}Config"), getattr(transformers, self.class_name)

    def layers(self, model: "PreTrainedModel") -> Any:
        """Return the decoder layers, in order."""
        return model.model.layers

    def embedding(self, model: "PreTrainedModel") -> Any:
        return model.model.embed_tokens

    def final_norm(self, model: "PreTrainedModel") -> Any:
        return model.model.norm

    def head(self, model: "PreTrainedModel") -> Any:
        """Return the head. Its weight (V, D) is the embedding's where both are tied."""
        return model.lm_head

    def is_tied(self, model: "PreTrainedModel") -> bool:
        """Whether head and embedding are one weight."""
        return self.head(model).weight is self.embedding(model).weight

    def rebuild_rotary(self, model: "PreTrainedModel") -> None:
        """Compute the rotary embedding's buffers: no file has them, and on the meta device they have no values."""
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

    def attention(self, layer: "nn.Module") -> Any:
        """Return a layer's attention block."""
        return layer.self_attn

    def feed_forward(self, layer: "nn.Module") -> Any:
        """Return a layer's feed-forward block."""
        return layer.mlp

    def attention_norm(self, layer: "nn.Module") -> Any:
        """Return the norm before the attention block."""
        return layer.input_layernorm

    def feed_forward_norm(self, layer: "nn.Module") -> Any:
        """Return the norm before the feed-forward block."""
        return layer.post_attention_layernorm

    def feed_forward_output(self, layer: "nn.Module") -> Any:
        """Return the feed-forward block's last linear layer; dropout acts on its input."""
        return self.feed_forward(layer).down_proj

    def query_inputs(self, layer: "nn.Module") -> list[Any]:
        """Return the linear layers that read the attention block's input."""
        block = self.attention(layer)
        return [block.q_proj, block.k_proj, block.v_proj]

    def attention_output(self, layer: "nn.Module") -> Any:
        """Return the attention block's last linear layer."""
        return self.attention(layer).o_proj

    def feed_forward_inputs(self, layer: "nn.Module") -> list[Any]:
        """Return the linear layers that read the feed-forward block's input."""
        block = self.feed_forward(layer)
        return [block.gate_proj, block.up_proj]

    def forward_label_positions(
        self, layer: "nn.Module", hidden_states: "Tensor", label_positions: "Tensor", **kwargs: Any
    ) -> "Tensor":
        """Compute a layer's output (N, D) at the label positions only.

        Attention needs keys and values of every token; the feed-forward block computes the label positions only.

        Args:
            hidden_states: (B, T, D).
            label_positions: (N,), positions in the flattened B * T.
        """
        attended, _ = self.attention(layer)(hidden_states=self.attention_norm(layer)(hidden_states), **kwargs)
        kept = (hidden_states + attended).flatten(0, 1).index_select(0, label_positions)
        output: Tensor = kept + self.feed_forward(layer)(self.feed_forward_norm(layer)(kept))
        return output
