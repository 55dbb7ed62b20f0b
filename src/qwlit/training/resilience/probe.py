"""The probe: answer a few fixed prompts now and then, and judge what the model says and how it says it.

A model can fail in sampling while its loss still looks healthy. The probe is greedy and draws no random numbers, so a
run with it has the same losses and weights as one without.

Shapes: P prompts, T positions, A tokens of an answer.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.model.compile import uncompiled
from qwlit.model.inspection import Inspection
from qwlit.model.loss_model import LossModel
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.module import CausalLMModule
from qwlit.training.resilience.guard import Guard
from qwlit.training.telemetry import Telemetry
from qwlit.training.tracking.run_folder import RunFolder

ANSWER_TOKENS = 12
PROMPT_TOKENS = 64
"""Of a longer prompt the last so many."""
SUM_TOLERANCE = 1e-3
"""The probabilities of a distribution may differ from 1 by this much in sum."""
REPEATED_TOKENS, MOST_DISTINCT, LOW_ENTROPY = 8, 2, 0.1
"""An answer of so many tokens or more repeats itself with so many distinct ones or fewer; a collapsed distribution has
a mean entropy below the last number, in nats."""
DEGENERATE_PROBES = 2
"""So many degenerate probes in a row are an alarm, if one before them was not degenerate."""
MAX_ATTENTION_LOGIT = "model/max_attention_logit"
STATISTICS = ("model/max_logit", MAX_ATTENTION_LOGIT)


class Probe(Callback):
    """Writes the answers to samples.jsonl and the model's numbers to metrics.jsonl, and raises alarms."""

    def __init__(
        self,
        guard: Guard,
        folder: RunFolder,
        *,
        telemetry: Telemetry,
        every_steps: int,
        total_steps: int,
        prompts: Sequence[Sequence[int]],
        end_ids: Collection[int],
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        """Create the callback.

        Args:
            prompts: token ids; every rank has the same.
            end_ids: the tokens that end an answer.
            decode: turns tokens into text; None: samples.jsonl gets the tokens.
        """
        self._guard = guard
        self._folder = folder
        self._telemetry = telemetry
        self._every_steps, self._total_steps = every_steps, total_steps
        self._prompts = [list(prompt[-PROMPT_TOKENS:]) for prompt in prompts]
        self._end_ids = frozenset(end_ids)
        self._decode = decode or str
        self._reader: AsyncReadback[int] = AsyncReadback()
        self._was_varied = False
        """Whether a probe was not degenerate."""
        self._degenerate_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        self._judge()
        return {"was_varied": self._was_varied, "degenerate_in_a_row": self._degenerate_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._was_varied = state_dict["was_varied"]
        self._degenerate_in_a_row = state_dict["degenerate_in_a_row"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: CausalLMModule, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        # The probe ran a step ago, so this does not wait.
        self._judge()
        step = batch.step + 1
        if step % self._every_steps == 0:
            numbers = probe(pl_module, self._prompts, trainer.precision_plugin.forward_context())
            self._reader.push(step, _agree(numbers) if trainer.world_size > 1 else numbers)
        self._judge(wait=step == self._total_steps)

    def on_train_end(self, trainer: Trainer, pl_module: CausalLMModule) -> None:
        self._judge()  # early stopping ends the run before its last step

    def _judge(self, *, wait: bool = True) -> None:
        for step, (is_wrong, *numbers) in self._reader.pop(wait=wait):
            statistics, rest = numbers[: len(STATISTICS)], numbers[len(STATISTICS) :]
            entropies, tokens = rest[: len(self._prompts)], [int(token) for token in rest[len(self._prompts) :]]
            answers = [self._until_end(tokens[row :: len(self._prompts)]) for row in range(len(self._prompts))]
            for prompt, answer, entropy in zip(self._prompts, answers, entropies, strict=True):
                self._folder.append_sample(step, self._decode(prompt), self._decode(answer), entropy)
            # Last, because a listener may raise an alarm.
            self._telemetry.record(step, {**dict(zip(STATISTICS, statistics, strict=True))})
            if is_wrong:
                self._guard.alarm(
                    step, "the distribution of the next token is not finite or does not sum to 1", "divergence"
                )
            if self._is_degenerate(answers, entropies):
                self._guard.alarm(step, f"the model repeats itself, as in {self._decode(answers[0])!r}", "divergence")

    def _until_end(self, answer: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(answer) if token in self._end_ids), len(answer))
        return answer[:end]

    def _is_degenerate(self, answers: list[list[int]], entropies: list[float]) -> bool:
        """Whether this is one degenerate probe too many. A random model repeats itself too, and is no alarm."""
        repeats = all(len(answer) >= REPEATED_TOKENS and len(set(answer)) <= MOST_DISTINCT for answer in answers)
        degenerate = repeats and max(entropies) < LOW_ENTROPY
        self._was_varied = self._was_varied or not degenerate
        self._degenerate_in_a_row = self._degenerate_in_a_row + 1 if degenerate and self._was_varied else 0
        return self._degenerate_in_a_row >= DEGENERATE_PROBES


@torch.no_grad()
def probe(module: CausalLMModule, prompts: list[list[int]], precision: AbstractContextManager[Any]) -> Tensor:
    """Answer the prompts greedily, without waiting for the device and without a trace in the module.

    Returns:
        (1 + 2 + P + A * P,) float64: 1.0 if a distribution is wrong, the STATISTICS, the mean entropy of each answer's
        distributions in nats, and the tokens, answer position by answer position.
    """
    model = module.loss_model
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with precision, uncompiled(model):
            return _answer(model, prompts, module.device)
    finally:
        for part in training:
            part.training = True
        if module.is_sharded:
            # As after a validation: FSDP2 keeps the root's weights whole until a backward pass.
            model.reshard()  # type: ignore[operator]


def _answer(model: LossModel, prompts: list[list[int]], device: torch.device) -> Tensor:
    rows = [torch.tensor([*prompt, *[0] * ANSWER_TOKENS]) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True).to(device, non_blocking=True)  # (P, T)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts]).to(device, non_blocking=True)
    row_numbers = torch.arange(len(prompts), device=device)
    is_wrong = torch.zeros((), dtype=torch.bool, device=device)
    entropies = torch.zeros(len(prompts), device=device)
    largest = torch.zeros((), device=device)
    tokens = []
    for answered in range(ANSWER_TOKENS):
        lengths = prompt_lengths + answered
        inspection = Inspection(lengths)
        model(_padded(ids, lengths), inspection)
        probabilities = inspection.logits.softmax(-1)  # (P, V)
        # An error of a kernel or a value that is not finite shows in the sum.
        is_wrong |= ~((probabilities.sum(-1) - 1).abs() < SUM_TOLERANCE).all()
        entropies += torch.special.entr(probabilities).sum(-1) / ANSWER_TOKENS
        largest = torch.maximum(largest, inspection.logits.abs().amax())
        tokens.append(inspection.logits.argmax(-1))
        ids[row_numbers, lengths] = tokens[-1]
    statistics = torch.stack([largest, inspection.max_attention_logit])
    return torch.cat([is_wrong[None].double(), statistics.double(), entropies.double(), torch.cat(tokens).double()])


def _padded(ids: Tensor, lengths: Tensor) -> MicroBatch:
    """Return right-padded sequences whose label positions are their last tokens."""
    num_rows, width = ids.shape
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(width, device=ids.device).expand(num_rows, width).contiguous(),
        label_positions=torch.arange(num_rows, device=ids.device) * width + lengths - 1,
        targets=torch.zeros_like(lengths),
        cu_seqlens=None,
        document_lengths=None,
        sample_lengths=lengths,
        sample_ids=(),
    )


def _agree(numbers: Tensor) -> Tensor:
    """Return rank 0's numbers on all ranks; a distribution that is wrong on one rank is wrong on all."""
    is_wrong = numbers[:1].clone()
    dist.all_reduce(is_wrong, op=dist.ReduceOp.MAX)
    dist.broadcast(numbers, src=0)
    return torch.cat([is_wrong, numbers[1:]])
