"""Measure a trained model on samples: loss, perplexity, bits per byte, accuracy; for all, by file and by script.

Shapes: S samples, N label positions of a micro-batch.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qwlit.core.errors import GuardStop
from qwlit.data.batches import validation_loader
from qwlit.data.samples import Samples
from qwlit.data.step_plan import Limits
from qwlit.inference.trained_model import NONFINITE_REMEDY, TrainedModel

SCRIPTS = {
    "Han": r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]",
    "Kana": r"[\u3040-\u30ff]",
    "Hangul": r"[\uac00-\ud7af\u1100-\u11ff]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Arabic": r"[\u0600-\u06ff]",
    "Latin": r"[A-Za-z\u00c0-\u024f]",
}
"""Unicode's names of scripts, and their characters. The language of a text is more than its script, but a script can be
found without a model."""
MAX_TOKENS = {"cuda": 16_384, "cpu": 4_096}
"""Tokens of a forward pass where the settings have no limit (assumption: they fit beside any model that fits)."""


@dataclass(frozen=True)
class SampleScores:
    """What the model makes of each sample, (S,) each."""

    loss_sums: NDArray[np.float64]
    """Nats, over the supervised tokens."""
    num_tokens: NDArray[np.int64]
    """Supervised tokens."""
    num_correct: NDArray[np.int64]
    """Supervised tokens that were the likeliest."""
    num_bytes: NDArray[np.int64]
    """UTF-8 bytes of the supervised text, without control tokens."""
    files: list[str]
    """The file that each sample is from."""
    scripts: list[str]
    """The script of most letters of each sample's supervised text; "other" without letters."""

    def groups(self) -> dict[str, dict[str, "Result"]]:
        """Return the result of all samples, and by file and by script where there are several."""
        every = {"all": {"all": self.result(range(len(self.files)))}}
        for name, keys in (("file", self.files), ("script", self.scripts)):
            members: dict[str, list[int]] = defaultdict(list)
            for index, key in enumerate(keys):
                members[key].append(index)
            if len(members) > 1:
                every[name] = {key: self.result(ids) for key, ids in sorted(members.items())}
        return every

    def result(self, ids: Sequence[int]) -> "Result":
        index = np.asarray(ids, dtype=np.int64)
        loss_sum, tokens = float(self.loss_sums[index].sum()), int(self.num_tokens[index].sum())
        loss, num_bytes = loss_sum / tokens, int(self.num_bytes[index].sum())
        return Result(
            samples=len(index),
            tokens=tokens,
            loss=loss,
            # exp overflows from 710 on.
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            accuracy=int(self.num_correct[index].sum()) / tokens,
            bits_per_byte=loss_sum / math.log(2) / num_bytes if num_bytes else None,
        )


@dataclass(frozen=True)
class Result:
    """Means over the supervised tokens of some samples."""

    samples: int
    tokens: int
    loss: float
    """Nats per supervised token."""
    perplexity: float
    """exp(loss)."""
    accuracy: float
    """Share of supervised tokens that were the likeliest."""
    bits_per_byte: float | None
    """Loss in bits per byte of the supervised text: it compares models with different tokenizers. None without text."""


def score_samples(model: TrainedModel, samples: Samples, show: Callable[..., None]) -> SampleScores:
    """Run the model over all samples.

    Args:
        show: called with the samples done, all samples and a text, see `core.console.showing_progress`.

    Raises:
        GuardStop: a loss is not finite.
    """
    device = model.causal_lm.device
    limits = Limits(*model.config.hardware.micro_batch_limits)
    if limits == Limits():
        longest = int(samples.lengths(np.arange(len(samples))).max())
        limits = Limits(max_tokens=max(longest, MAX_TOKENS[device.type]))
    packing = model.config.data.packing
    loader = validation_loader(samples, rank=0, world_size=1, limits=limits, packing=packing, pad_id=model.pad_id)
    sums, correct = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
    done = 0
    with torch.inference_mode(), model.precision():
        for micro in loader:
            losses, is_correct = model.loss_model.token_losses(micro.to(device))
            ids = np.asarray(micro.sample_ids)
            # The label positions of a micro-batch are in the order of its samples.
            of_sample = np.repeat(ids, samples.num_supervised(ids))
            np.add.at(sums, of_sample, losses.double().cpu().numpy())
            np.add.at(correct, of_sample, is_correct.cpu().numpy())
            done += len(ids)
            show(done, len(samples), f"{done:,} of {len(samples):,} samples", finished=done == len(samples))
    if not np.isfinite(sums).all():
        worst = samples.origin(int(np.argmin(np.isfinite(sums))))
        raise GuardStop(f"{model.origin}: the loss of {worst} is not finite. {NONFINITE_REMEDY}")
    texts = [_supervised_text(model, samples, index) for index in range(len(samples))]
    return SampleScores(
        loss_sums=sums,
        num_tokens=samples.num_supervised(np.arange(len(samples))).astype(np.int64),
        num_correct=correct,
        num_bytes=np.array([len(text.encode()) for text in texts]),
        files=[samples.origin(index).rpartition(":")[0] for index in range(len(samples))],
        scripts=[script_of(text) for text in texts],
    )


def _supervised_text(model: TrainedModel, samples: Samples, index: int) -> str:
    tokens, mask = samples.read([index])
    return str(model.tokenizer.decode(tokens[mask == 1].tolist(), skip_special_tokens=True))


def script_of(text: str) -> str:
    """Return the script of most letters; Japanese has kana in almost every sentence, so some of them decide."""
    counts = Counter({name: len(re.findall(letters, text)) for name, letters in SCRIPTS.items()})
    if counts["Kana"] and counts["Kana"] * 10 >= counts["Han"]:
        counts["Kana"] += counts["Han"]
    name, count = counts.most_common(1)[0]
    return name if count else "other"
