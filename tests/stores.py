"""Rows on disk, what encodes them, and the stores built of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.encoding import RowEncoder
from qwlit.data.samples import Samples
from qwlit.data.store import SampleStore, build_store
from qwlit.data.templates import FAMILIES, Supervision
from qwlit.data.tokenizer import TextTokenizer

VOCAB = 700


def tokens(first: int, length: int = 6) -> dict[str, Any]:
    return {"input_ids": [first, *range(1, length)], "loss_mask": [0] + [1] * (length - 1)}


def messages(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines))
    return path


def row_encoder(tokenizer: TextTokenizer | None = None, **config: Any) -> RowEncoder:
    """Without a tokenizer it reads tokenized rows alone."""
    data = DataConfig(**config)
    if tokenizer is None:
        return RowEncoder(data, VOCAB, None, None, None)
    template = "qwen3" if data.template == "auto" else data.template
    chat = ChatEncoder(tokenizer, FAMILIES[template], Supervision(data.loss_on, data.thinking))
    return RowEncoder(data, VOCAB, tokenizer, chat, None)


def build(
    path: Path,
    tokenizer: TextTokenizer | None = None,
    *,
    cache_root: Path | None = None,
    progress: Any = None,
    say: Any = lambda line: None,
    **config: Any,
) -> SampleStore:
    encoder = row_encoder(tokenizer, **config)
    cache_root = cache_root or path.parent / "cache"
    return build_store(str(path), encoder, cache_root=cache_root, progress=progress, say=say)


def lengths(samples: Samples) -> list[int]:
    return samples.lengths(np.arange(len(samples))).tolist()


def num_supervised(samples: Samples) -> list[int]:
    return samples.num_supervised(np.arange(len(samples))).tolist()


def first_tokens(samples: Samples) -> list[int]:
    return [int(samples.read([index])[0][0]) for index in range(len(samples))]
