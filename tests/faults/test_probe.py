"""The probe: it sees a model that fails in sampling, and leaves no trace in the training."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

import qwlit as package
from qwlit.core.errors import Interrupted
from qwlit.model.attention import register_attention
from qwlit.model.loss_model import LossModel
from qwlit.training.resilience.probe import ANSWER_TOKENS, STATISTICS, Probe, probe
from qwlit.training.tracking.progress import ProgressDisplay
from tests.faults.test_checkpoints import chat, words  # noqa: F401 - a fixture
from tests.runs.runs import assert_same_run, losses, qwlit_process, rows, train, weights
from tests.tiny import tiny_causal_lm

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [3, 1, 4, 1, 5, 9, 2, 6]]
OFF, EVERY_3 = ["guard=off"], ["guard.probe_every_steps=3"]


def module_of(causal_lm) -> SimpleNamespace:
    causal_lm.set_attn_implementation(register_attention())
    return SimpleNamespace(
        loss_model=LossModel(causal_lm, "sdpa").train(), device=torch.device("cpu"), is_sharded=False
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_probe_answers_as_transformers_does_and_measures_what_transformers_computes(family):
    reference = tiny_causal_lm(family)
    numbers = probe(module_of(tiny_causal_lm(family)), PROMPTS, nullcontext())
    is_wrong, max_logit, max_attention, *rest = numbers.tolist()
    entropies, tokens = rest[:3], torch.tensor(rest[3:]).view(ANSWER_TOKENS, 3).T.int().tolist()
    assert not is_wrong
    seen = {"logit": [], "scores": []}
    for prompt, answer, entropy in zip(PROMPTS, tokens, entropies, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
        assert entropy == pytest.approx(
            torch.distributions.Categorical(logits=logits).entropy().mean().item(), rel=1e-4
        )
        seen["logit"].append(logits.abs().max().item())
    assert max_logit == pytest.approx(max(seen["logit"]), rel=1e-4)
    assert max_attention == pytest.approx(largest_attention_logit(reference, tokens), rel=1e-4)


def largest_attention_logit(model, answers) -> float:
    """Of a plain model while it reads prompts with their answers, without the last token."""
    found = []
    attend = type(model.model.layers[0].self_attn)

    def take(module, args, kwargs, out):
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        query, key = (part(hidden).view(shape) for part in (module.q_proj, module.k_proj))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        query, key = (turn(states, cos, sin) for states in (query, key))
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * module.scaling
        found.append(scores.tril().masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).max().item())

    def turn(states, cos, sin):
        half = states.shape[-1] // 2
        turned = torch.cat([-states[..., half:], states[..., :half]], -1)
        return states * cos[:, None] + turned * sin[:, None]

    for part in model.modules():
        if isinstance(part, attend):
            part.register_forward_hook(take, with_kwargs=True)
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            model(torch.tensor([[*prompt, *answer[:-1]]]))
    return max(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_distribution_that_cannot_be_sampled_is_seen(value):
    causal_lm = tiny_causal_lm()
    causal_lm.model.norm.weight.data[3] = value
    assert probe(module_of(causal_lm), PROMPTS, nullcontext())[0] == 1


def test_the_probe_leaves_modes_and_generators_as_they_were():
    module = module_of(tiny_causal_lm())
    module.loss_model.causal_lm.model.layers[0].eval()
    modes = [part.training for part in module.loss_model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    probe(module, PROMPTS, nullcontext())
    assert [part.training for part in module.loss_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Judged:
    """A Probe with answers that the test writes."""

    def __init__(self, folder: Path) -> None:
        self.alarms: list[tuple[int, str]] = []
        guard = SimpleNamespace(alarm=lambda step, reason, cause: self.alarms.append((step, reason)))
        nothing = SimpleNamespace(append_sample=lambda *sample: None, record=lambda *record: None)
        self.probe = Probe(
            guard, nothing, telemetry=nothing, every_steps=1, total_steps=99, prompts=PROMPTS, end_ids={0}, decode=None
        )

    def judge(self, step, answers, entropy, *, wrong=False):
        tokens = [token for column in zip(*answers, strict=True) for token in column]
        numbers = [wrong, *[1.0] * len(STATISTICS), *[entropy] * len(PROMPTS), *tokens]
        self.probe._reader.push(step, torch.tensor(numbers, dtype=torch.float64))
        self.probe._judge()
        return [found for found, _ in self.alarms]


VARIED, REPEATED = [list(range(1, 13))] * 3, [[7] * 12] * 3


def test_a_wrong_distribution_is_an_alarm_at_once(tmp_path):
    assert Judged(tmp_path).judge(1, VARIED, 2.0, wrong=True) == [1]


def test_a_model_that_begins_to_repeat_itself_without_doubt_is_an_alarm_at_the_second_probe(tmp_path):
    judged = Judged(tmp_path)
    judged.judge(1, VARIED, 2.0)
    assert judged.judge(2, REPEATED, 0.01) == []
    assert judged.judge(3, REPEATED, 0.01) == [3]


@pytest.mark.parametrize(
    ("answers", "entropy"),
    [
        (REPEATED, 4.0),  # a random model, or one that knows only how often each token occurs
        (VARIED, 0.001),  # a model that has memorised the data
        ([[7, 7, 0, *[7] * 9]] * 3, 0.001),  # short answers; what follows their end is not part of them
        ([*REPEATED[:2], VARIED[0]], 0.001),
    ],
)
def test_a_healthy_model_is_no_alarm(answers, entropy, tmp_path):
    judged = Judged(tmp_path)
    judged.judge(1, VARIED, 2.0)
    assert [judged.judge(step, answers, entropy) for step in range(2, 9)][-1] == []


def test_a_run_that_repeats_itself_from_the_start_is_no_alarm(tmp_path):
    judged = Judged(tmp_path)
    assert [judged.judge(step, REPEATED, 0.01) for step in range(1, 9)][-1] == []


@pytest.mark.parametrize("layout", [[], ["hardware.devices=2"], ["hardware.devices=2", "hardware.strategy=fsdp"]])
def test_a_run_with_probe_and_telemetry_has_the_losses_and_weights_of_one_without(layout, chat, tmp_path):  # noqa: F811
    dropout = ["dropout.attention=0.1", "dropout.feed_forward=0.1"]
    without, with_it = (
        train([*words(name, chat), *dropout, *layout, *probe_words], tmp_path, qwlit_process)
        for name, probe_words in (("without", OFF), ("with", EVERY_3))
    )
    assert losses(without) == losses(with_it)
    assert not any(name.startswith(("model/", "optim/update")) for row in rows(without) for name in row)
    left, right = weights(without), weights(with_it)
    assert all(torch.equal(left[name], right[name]) for name in left)
    measured = [row for row in rows(with_it) if "model/max_logit" in row]
    assert [row["step"] for row in measured] == [3, 6] and set(measured[0]) == {"step", *STATISTICS}
    samples = rows(with_it, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [3, 3, 3, 6, 6, 6]
    assert all("assistant" in sample["prompt"] and sample["entropy"] > 0 for sample in samples)


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if batch.step + 1 == 6:
            raise KeyboardInterrupt


def test_a_resumed_run_has_each_number_and_each_answer_of_the_whole_run_once(chat, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    # The checkpoints lie between the records, so they must hold what was counted since the last record.
    more = [*EVERY_3, "logging.every_steps=3", "train.max_grad_norm=2"]
    package.train(*words("whole", chat), *more)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        package.train(*words("a", chat), *more, callbacks=[Interrupt()])
    resumed = package.train(*words("a", chat), *more)
    assert resumed.summary["resumed_from"] == 4
    whole = package.Run(tmp_path / "runs/whole")
    assert whole.samples() == resumed.samples() and len(whole.samples()) == 6
    assert_same_run(whole.path, resumed.path)
    shares = {row["step"]: row["optim/clipped_share"] for row in rows(resumed.path) if "optim/clipped_share" in row}
    assert shares[6] == pytest.approx(1 / 3)


def test_a_line_of_progress_has_a_number(capsys):
    display = ProgressDisplay(Console(), total_steps=300)
    display.show(200, {"model/max_logit": 9.0, "model/max_attention_logit": 3.0})
    assert capsys.readouterr().out == ""
    display.show(200, {"train/loss": 1.0})
    assert "loss 1.0000  eta" in capsys.readouterr().out
