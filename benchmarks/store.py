"""Tokenizing many short conversations, starting again, and what a reader of them keeps in memory.

    python -m benchmarks.store [samples=5000000] [folder=/tmp/qwlit-store]

Needs the dev extra (Qwen's vocabulary). Rows are made on the fly in `folder`, which wants 3 GB for 5 million, and
deleted at the end. Linux only.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from qwlit.data.chat import ChatEncoder
from qwlit.data.config import DataConfig
from qwlit.data.encoding import RowEncoder
from qwlit.data.order import Order
from qwlit.data.samples import Samples
from qwlit.data.splits import split_store
from qwlit.data.step_plan import Limits, StepPlan
from qwlit.data.store import build_store
from qwlit.data.store_writer import BuildProgress
from qwlit.data.templates import FAMILIES, Supervision
from qwlit.data.tokenizer import TextTokenizer
from tests.real_tokenizer import build_real_tokenizer, real_backend

RESULTS = Path(__file__).parent / "results"
WORDS = [
    "the",
    "model",
    "learns",
    "from",
    "data",
    "模型",
    "学习",
    "数据",
    "一个",
    "问题",
    "答案",
    "what",
    "42",
    "3.14",
    "你好",
]
GLOBAL_BATCH_SIZE = 256
STEPS_READ = 400


def write_rows(path: Path, num_rows: int) -> None:
    """Write short conversations, no two the same: about 10 words asked and 10 answered, English and Chinese."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(num_rows):
            asked, answered = (" ".join(rng.choices(WORDS, k=10)) for _ in range(2))
            messages = [{"role": "user", "content": f"{number}: {asked}"}, {"role": "assistant", "content": answered}]
            handle.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def encoder(folder: Path) -> RowEncoder:
    from transformers import AutoTokenizer

    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    return RowEncoder(DataConfig(), 151_936, tokenizer, ChatEncoder(tokenizer, FAMILIES["qwen3"], Supervision()), None)


def build(folder: Path) -> dict[str, Any]:
    """Build the store, or find it."""
    encode = encoder(folder)
    last: list[BuildProgress] = []
    started = time.perf_counter()
    store = build_store(str(folder / "rows.jsonl"), encode, cache_root=folder / "cache", progress=last.append)
    seconds = time.perf_counter() - started
    rate = last[-1].tokens_per_second / last[-1].cores if last else None
    return {"seconds": seconds, "samples": len(store), "tokens": last[-1].tokens if last else None, "rate": rate}


def private_bytes() -> int:
    """Return the memory that is this process's alone and no file's: RssAnon of proc(5)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def read(folder: Path, chosen: bool) -> dict[str, Any]:
    """Read as a training does: planned steps, over the end of an epoch, every sample's tokens touched."""
    encode = encoder(folder)
    before = private_bytes()
    store = build_store(str(folder / "rows.jsonl"), encode, cache_root=folder / "cache")
    samples: Samples = split_store(store, 0.05)[0] if chosen else store
    order = Order.plain(0, len(samples))
    plan = StepPlan(samples, order, GLOBAL_BATCH_SIZE, 1, Limits(max_samples=16), True)
    first = max(0, plan.steps_of_epochs(1) - STEPS_READ // 2)
    started, most, tokens = time.perf_counter(), 0, 0
    for step in range(first, first + STEPS_READ):
        ids = plan.samples(step)
        plan.layout(ids)
        tokens += sum(int(samples.read([int(i)])[0].sum() > 0) for i in ids)
        most = max(most, private_bytes() - before)
    seconds = time.perf_counter() - started
    return {"bytes_per_sample": most / len(samples), "milliseconds_per_step": 1000 * seconds / STEPS_READ}


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(num_rows: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    build_real_tokenizer("qwen3", folder / "tokenizer", real_backend())
    write_rows(folder / "rows.jsonl", num_rows)
    megabytes = (folder / "rows.jsonl").stat().st_size / 2**20
    # Here and not apart: a pool's worker may not start workers of its own.
    built, again = build(folder), apart(build, folder)
    plain, chosen = apart(read, folder, False), apart(read, folder, True)
    figures = {
        "rows": num_rows,
        "megabytes": round(megabytes),
        "tokens": built["tokens"],
        "build_seconds": round(built["seconds"], 1),
        "tokens_per_second_per_core": round(built["rate"]),
        "second_start_seconds": round(again["seconds"], 3),
        "private_bytes_per_sample": round(plain["bytes_per_sample"], 1),
        "private_bytes_per_sample_with_val_fraction": round(chosen["bytes_per_sample"], 1),
        "milliseconds_per_step_of_256": round(plain["milliseconds_per_step"], 2),
        **describe("tokenizers", "numpy"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "store.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Tokenizing and reading short conversations",
        "",
        "`python -m benchmarks.store`",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [
        f"| {name.replace('_', ' ')} | {value:,} |" if isinstance(value, int | float) else f"| {name} | {value} |"
        for name, value in figures.items()
    ]
    (RESULTS / "store.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    place = Path(words.get("folder", "")) if "folder" in words else Path(tempfile.mkdtemp(prefix="qwlit-store-"))
    try:
        main(int(words.get("samples", 5_000_000)), place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
