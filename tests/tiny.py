"""Tiny random Qwen2 and Qwen3 models, folders of them, and micro-batches from plain lists."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qwlit.core.batch import MicroBatch
from qwlit.model.config import Architecture, FreezeConfig, ModelConfig
from qwlit.model.families import FAMILIES
from qwlit.model.load import empty_causal_lm, fill_causal_lm
from qwlit.model.presets import to_hf_config

# Tiny tensors gain nothing from threads, and on a busy machine waiting for one another is what takes the time.
torch.set_num_threads(1)

Sample = tuple[list[int], list[int]]
"""Token ids and loss mask, as long as each other."""

TINY = Architecture(
    model_type="qwen3",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
)


def tiny_architecture(family: str = "qwen3", *, tied: bool = True) -> Architecture:
    """Return a two-layer shape; Qwen2's head width follows from the hidden size, as published."""
    head_dim = 16 if family == "qwen3" else None
    return replace(TINY, model_type=family, tie_word_embeddings=tied, head_dim=head_dim)


def tiny_causal_lm(
    family: str = "qwen3", *, tied: bool = True, seed: int = 0, spread: float = 5.0, **shape: int
) -> PreTrainedModel:
    """Make a random model with plain transformers attention; `spread` scales the initial weights, so that attention,
    biases and norms matter and a mistake shows."""
    _, model_class = FAMILIES[family].classes()
    config = to_hf_config(replace(tiny_architecture(family, tied=tied), **shape))
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.02)
            parameter.data *= 1.0 if "norm" in name else spread
    return model


def load_causal_lm(
    config: ModelConfig,
    *,
    seed: int = 0,
    freeze: FreezeConfig | None = FreezeConfig(),  # noqa: B008 - it is frozen
    frozen_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build the model and fill in its weights."""
    model = empty_causal_lm(config, freeze=freeze, frozen_dtype=frozen_dtype)
    fill_causal_lm(model, config, seed=seed)
    return model


def save_folder(model: PreTrainedModel, folder: Path) -> Path:
    """Save `model` as a Hugging Face folder (without a tokenizer)."""
    model.save_pretrained(folder)
    return folder


def random_samples(lengths: list[int], *, vocab_size: int = 97, seed: int = 0) -> list[Sample]:
    """Make samples whose first third is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [(ids, [int(position > len(ids) // 3) for position in range(len(ids))]) for ids in draw]


def packed(samples: list[Sample]) -> MicroBatch:
    """Lay samples end to end."""
    lengths = [len(ids) for ids, _ in samples]
    starts = [sum(lengths[:number]) for number in range(len(samples))]
    rows, targets = _supervised(samples, starts)
    return MicroBatch(
        input_ids=torch.tensor([[token for ids, _ in samples for token in ids]]),
        position_ids=torch.tensor([[position for length in lengths for position in range(length)]]),
        label_positions=rows,
        targets=targets,
        cu_seqlens=torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        document_lengths=tuple(lengths),
        sample_lengths=torch.tensor(lengths),
        sample_ids=tuple(range(len(samples))),
    )


def padded(samples: list[Sample], pad_id: int = 0) -> MicroBatch:
    """Lay samples into right-padded rows."""
    width = max(len(ids) for ids, _ in samples)
    rows, targets = _supervised(samples, [number * width for number in range(len(samples))])
    return MicroBatch(
        input_ids=torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in samples]),
        position_ids=torch.arange(width).expand(len(samples), width).contiguous(),
        label_positions=rows,
        targets=targets,
        cu_seqlens=None,
        document_lengths=None,
        sample_lengths=torch.tensor([len(ids) for ids, _ in samples]),
        sample_ids=tuple(range(len(samples))),
    )


def _supervised(samples: list[Sample], starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flat positions whose next token is supervised, and those tokens."""
    found = [
        (start + position - 1, ids[position])
        for start, (ids, mask) in zip(starts, samples, strict=True)
        for position in range(1, len(ids))
        if mask[position]
    ]
    table = torch.tensor(found, dtype=torch.int64).view(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()
