"""Rows on disk and the stores built of them."""

import json
from pathlib import Path
from typing import Any

from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.store import SampleStore, build_store

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


def build(path: Path, encoder: ChatEncoder | None = None, progress: Any = None, **config: Any) -> SampleStore:
    return build_store(
        str(path),
        DataConfig(**config),
        encoder=encoder,
        vocab_size=VOCAB,
        cache_root=path.parent / "cache",
        progress=progress,
    )
