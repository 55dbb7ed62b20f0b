"""The same work for every trainer: one model, one list of samples, one order of them."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwlit.config.compose import compose
from qwlit.data.order import Order
from qwlit.model.config import DECODER_LINEARS, Architecture
from qwlit.model.families import FAMILIES
from qwlit.model.presets import to_hf_config

SEED, MAX_LENGTH = 0, 2048
COMPARED = 10
"""So many losses are compared between trainers."""


@dataclass(frozen=True)
class Case:
    """One row of the table. AdamW, constant rate, clipping at 1, no dropout; float32 on CPU, bf16 autocast on CUDA."""

    name: str
    vocab_size: int
    supervised: float
    """Share of a sample's tokens that are supervised: its end, as an answer is."""
    adapter: bool = False
    """LoRA on every linear layer of the decoder instead of full fine-tuning."""
    steps: int = 11
    global_batch_size: int = 16
    micro_batch_size: int = 4
    mean_length: float = 300.0
    lr: float = 1e-3
    device: str = "cpu"
    model: str | None = None
    """The preset whose shape the model has; None: a small Qwen3."""
    warmup: int = 1
    """So many steps are not timed: the first ones load, compile and warm up."""

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def num_samples(self) -> int:
        return self.steps * self.global_batch_size

    def architecture(self) -> Architecture:
        if self.model:
            published = compose([f"model={self.model}"]).config.model.architecture
            assert published is not None
            return published
        return Architecture(
            model_type="qwen3",
            vocab_size=self.vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
        )


CASES = [
    Case("152k", 151_936, 0.4),
    Case("152k, all supervised", 151_936, 1.0),
    Case("152k, LoRA", 151_936, 0.4, adapter=True),
    Case("8k", 8_192, 0.4),
    Case("8k, all supervised", 8_192, 1.0),
    Case("8k, LoRA", 8_192, 0.4, adapter=True),
]
# On CUDA compiled layers meet new shapes, and are compiled once more, in the first few steps.
ON_CUDA = {"device": "cuda", "model": "qwen3_0_6b", "steps": 40, "warmup": 10, "mean_length": 512.0}
ON_CUDA |= {"global_batch_size": 64, "micro_batch_size": 16}
CUDA_CASES = [
    Case("0.6B", 151_936, 0.4, lr=1e-4, **ON_CUDA),  # type: ignore[arg-type]
    Case("0.6B, LoRA", 151_936, 0.4, adapter=True, lr=1e-4, **ON_CUDA),  # type: ignore[arg-type]
]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": list(DECODER_LINEARS)}


class Record:
    """Losses, the clock, the peak of the device's memory, and how the arm computes."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        """Before clipping; none where an arm does not say them."""
        self.ends: list[float] = []
        self.device_peak: int | None = None
        """The most that torch had allocated on the GPU by the end of the last step, bytes."""
        self.how: dict[str, object] = {}
        """Precision, attention, and other settings of the arm."""

    def step(self, loss: float | None = None) -> None:
        done = len(self.ends) + 1
        if self._case.on_cuda and done in (self._case.warmup, self._case.steps):
            import torch

            torch.cuda.synchronize()  # the host runs ahead; only these two ends are timed
            self.device_peak = torch.cuda.max_memory_allocated()
        self.ends.append(time.perf_counter())
        if loss is not None:
            self.losses.append(loss)


def draw_lengths(random: np.random.Generator, mean: float, count: int) -> NDArray[np.int64]:
    """Log-normal: most short, some long; sigma 0.6 as in public chat sets (assumption)."""
    sigma = 0.6
    return np.clip(random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), 16, MAX_LENGTH).astype(np.int64)


def prepare(case: Case, folder: Path) -> None:
    """Write model, samples and case into `folder`."""
    import torch

    torch.manual_seed(SEED)
    _, model_class = FAMILIES["qwen3"].classes()
    model_class(to_hf_config(case.architecture())).save_pretrained(folder / "model")
    write_samples(case, folder)
    (folder / "case.json").write_text(json.dumps(asdict(case)))


def write_samples(case: Case, folder: Path) -> None:
    """Write `samples.jsonl` into `folder`.

    Tokens follow Zipf's law, so that there is something to learn and ten losses show whether all learn alike. The most
    frequent of the supervised tokens are the rarest of the others: who trains on the others too has other losses.
    """
    random = np.random.default_rng(SEED)
    frequencies = 1 / np.arange(10, case.vocab_size + 10)
    frequencies /= frequencies.sum()
    with (folder / "samples.jsonl").open("w") as handle:
        for length in draw_lengths(random, case.mean_length, case.num_samples):
            drawn = random.choice(case.vocab_size, length, p=frequencies)
            unlearnt = round((1 - case.supervised) * length)
            drawn[:unlearnt] = case.vocab_size - 1 - drawn[:unlearnt]
            ids = drawn.tolist()
            handle.write(json.dumps({"input_ids": ids, "labels": [-100] * unlearnt + ids[unlearnt:]}) + "\n")


def read_case(folder: Path) -> Case:
    return Case(**json.loads((folder / "case.json").read_text()))


def samples_in_order(folder: Path) -> list[dict[str, list[int]]]:
    """Return the samples as the steps take them, `global_batch_size` at a time."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [rows[index] for index in Order.plain(SEED, len(rows)).at(np.arange(len(rows)))]


def tokens_of_steps(folder: Path) -> list[int]:
    case, samples = read_case(folder), samples_in_order(folder)
    lengths = [len(sample["input_ids"]) for sample in samples]
    size = case.global_batch_size
    return [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]
