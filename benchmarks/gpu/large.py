"""Qwen3 of 0.6B to 8B on one device: tokens a second, MFU and memory of the command line, as a user types it.

Nothing is set that the recipe or `auto` decides, but for the lack of dropout in all rows except the first. MFU counts
model FLOPs: no recomputation, and of the head the supervised tokens only. Weights are random, so the first loss must be
that of a uniform guess, ln 151,936 = 11.93, and no later one may be above it.
"""

import math
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.gpu.data import common_words
from benchmarks.gpu.tables import COMPARED, INVALID, Cells, Scale, Tables, said_how
from benchmarks.gpu.train_once import Trained, train_once

# Model, words.
CASES = {
    "0.6B, full, the recipe's dropout": ("qwen3_0_6b", ["recipe=full_sft"]),
    "1.7B, full": ("qwen3_1_7b", ["recipe=full_sft", "dropout=none"]),
    "4B, LoRA": ("qwen3_4b", ["recipe=lora", "dropout=none"]),
    "8B, QLoRA": ("qwen3_8b", ["recipe=qlora", "dropout=none"]),
}
TABLE = "Training of random weights, mean length 512, 40 % supervised"
UNIFORM = 0.05
"""How far a loss may be above that of a uniform guess, and the first one below: random logits spread a little
(assumption)."""


def measure(tables: Tables, scale: Scale) -> None:
    cases = {"toy, QLoRA": ("demo", ["recipe=qlora", "dropout=none"])} if scale.toy else CASES
    for name, (model, words) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            tables.measure(TABLE, {"model": name}, partial(one, Path(folder), scale, model, words))


def one(folder: Path, scale: Scale, model: str, words: list[str]) -> Cells:
    """Train a model and return its row."""
    steps, warmup, batch, length = (3, 1, 4, 40.0) if scale.toy else (14, 4, 64, 512.0)
    common = common_words(folder, scale, model, num_samples=steps * batch, mean_length=length)
    words = [*common, *words, f"train.max_steps={steps}", f"train.global_batch_size={batch}", "optim.lr=1e-4"]
    trained = train_once(folder, "run", words, warmup=warmup)
    return {
        "tokens/s": trained.tokens_per_second,
        "MFU": trained.mfu,
        "seconds a step": trained.seconds / trained.steps,
        "peak GiB": trained.peak_gib,
        "planned GiB": trained.planned_gib,
        "how": said_how(trained.how),
        COMPARED: judged(trained, vocabulary=520 if scale.toy else 151_936),
    }


def judged(trained: Trained, *, vocabulary: int) -> str:
    """Say whether the losses can be those of a training that begins at random weights."""
    first, last, guess = trained.losses[0], trained.losses[-1], math.log(vocabulary)
    said = f"losses from {first:.2f} to {last:.2f}, a uniform guess has {guess:.2f}"
    possible = first > guess * (1 - UNIFORM) and all(loss < guess * (1 + UNIFORM) for loss in trained.losses)
    return said if possible else f"{INVALID}: {said}"
