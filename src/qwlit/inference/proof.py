"""Prove an export: what plain transformers computes from the folder is what the model computed that it was made of."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qwlit.core.errors import ConfigError, one_line
from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import Conversation, Message
from qwlit.data.rows import RowError
from qwlit.inference import plain_proof
from qwlit.model.families.decoder import EMBEDDING, HEAD

PROOF = "PROOF.json"
BOUNDS = {True: 1e-5, False: 2e-2}
"""Largest difference of a logit, relative to the largest logit of all: in float32, and where weights or products are
rounded to 16 bits (chosen; tests/runs/test_export.py measures 4.5e-7 and 3.2e-3 at most)."""
QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "请用一句话介绍一下你自己。",
    "Write a function in Python that adds two numbers.",
    "把“早上好”翻译成英文。",
)
SAMPLES = 4
"""Prompts of samples.jsonl, which are validation prompts."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

Observed = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class FixedPrompt:
    """A fixed prompt, and the ids that the model of the run reads."""

    ids: list[int]
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    thinking: bool = False


@dataclass(frozen=True)
class Reference:
    """What the export must compute."""

    prompts: Sequence[FixedPrompt]
    end_ids: list[int]
    """The tokens that end an answer."""
    tokenizer: str
    """See `plain_proof.tokenizer_digest`."""
    observed: Observed
    """Of each prompt."""


@dataclass(frozen=True)
class Served:
    """How plain transformers loads a model."""

    model: Path | str
    adapter: Path | None = None
    device: str = "cpu"
    dtype: str = "float32"
    """Of the weights in memory and of the products; "auto": as stored."""


@dataclass
class Proof:
    """What was measured, and which checks failed."""

    bound: float
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def check(self, name: str, ok: bool, **numbers: Any) -> None:
        self.facts[name] = {"ok": ok, **numbers}
        if not ok:
            numbers_said = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in numbers.items())
            self.failed.append(f"{name.replace('_', ' ')}{f' ({numbers_said})' if numbers else ''}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def fixed_prompts(
    chat: ChatEncoder | None, tokenizer: Any, samples: Sequence[str], *, system: str | None, longest: int
) -> list[FixedPrompt]:
    """Return the built-in questions, in the chat template with and without thinking, and rendered validation prompts.

    Args:
        system: text of a system turn before each question.
        longest: tokens; longer prompts are left out.

    Raises:
        ConfigError: all are longer.
    """
    prompts: list[FixedPrompt] = []
    for thinking, question in product((False, True), QUESTIONS):
        if chat is None:
            break
        messages = [Message("user", question)]
        if system is not None:
            messages.insert(0, Message("system", system))
        try:
            pieces = chat.template.render_prompt(Conversation(tuple(messages)), thinking=thinking)
        except RowError:
            continue  # the template cannot express it
        (encoded,) = chat.encode_batch([pieces])
        turns = [{"role": message.role, "content": message.content} for message in messages]
        prompts.append(FixedPrompt(encoded.input_ids, messages=turns, thinking=thinking))
    plain = [*samples[:SAMPLES], *(QUESTIONS if not prompts else ())]
    prompts += [FixedPrompt(tokenizer(each, add_special_tokens=False).input_ids, text=each) for each in plain]
    fitting = [prompt for prompt in prompts if 0 < len(prompt.ids) <= longest - plain_proof.NEW_TOKENS]
    if not fitting:
        raise ConfigError(f"no prompt of the proof fits into the {longest:,} positions of the model; set prove=false")
    return fitting


def observe_plainly(
    served: Served, prompts: Sequence[FixedPrompt], end_ids: list[int], **checks: Any
) -> tuple[Observed, Any]:
    """Observe a folder in a process that has plain transformers only; also make the checks of an export.

    Raises:
        ConfigError: transformers cannot load the folder.
    """
    with TemporaryDirectory() as name:
        place = Path(name)
        job = {
            **{"model": str(served.model), "adapter": str(served.adapter) if served.adapter else None},
            **{"device": served.device, "dtype": served.dtype, "end_ids": end_ids, "export": None, **checks},
            **{"prompts": [vars(prompt) for prompt in prompts]},
            **{"observed": str(place / "observed.safetensors"), "found": str(place / "found.json")},
        }
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        run_plainly(place / "job.json", str(served.adapter or served.model))
        tensors = load_file(place / "observed.safetensors")
        observed = [
            {key: tensors[f"{i}.{key}"] for key in ("logits", "tokens", "margins")} for i in range(len(prompts))
        ]
        found = json.loads((place / "found.json").read_text()) if checks else None
        return observed, found


def run_plainly(job: Path, model: str) -> None:
    """Run a job of plain_proof in a fresh process; it raises what `observe_plainly` raises."""
    done = subprocess.run(
        # -P: the script's folder is not searched for modules.
        [sys.executable, "-P", plain_proof.__file__, str(job)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(f"transformers cannot use {model}: {one_line(last, 300)}")


def prove(
    folder: Path,
    served: Served,
    reference: Reference,
    *,
    digests: dict[str, str],
    dtype: torch.dtype,
    end: int | None,
    merged: tuple[str, str] | None,
) -> Proof:
    """Compare the export with `reference`, in a fresh process.

    Args:
        digests: of the exported tensors, from before they were written.
        dtype: of the exported tensors.
        end: the token that ends an answer.
        merged: base and adapter that peft merges for a comparison of all weights.
    """
    proof = Proof(BOUNDS[dtype == torch.float32 and served.dtype == "float32"])
    checks = {"export": str(folder), "stored_dtype": str(dtype).removeprefix("torch."), "end": end, "merged": merged}
    try:
        observed, found = observe_plainly(served, reference.prompts, reference.end_ids, **checks)
    except ConfigError as error:
        proof.check("loads", False, error=str(error))
        return proof
    _compare_logits(proof, reference.observed, observed)
    _compare_greedy(proof, reference.observed, observed)
    loaded = found["weights"]
    # A tied head is not in the files; transformers makes it of the embedding.
    tied = {HEAD: loaded[EMBEDDING]} if HEAD in loaded and HEAD not in digests and EMBEDDING in loaded else {}
    wrong = sorted(name for name in {*digests, *loaded} if (digests | tied).get(name) != loaded.get(name))
    proof.check("weights", not wrong, tensors=len(digests), wrong=wrong[:3])
    if not served.adapter:
        # transformers 5 takes the head of the files whatever config.json says; others do what it says.
        proof.check("head", found["tied"] != (HEAD in digests), tie_word_embeddings=found["tied"])
    if merged:
        largest = found["against_peft"]["largest"]
        proof.check("merge_as_peft", largest <= 1, largest_in_units_of_rounding=largest)
    proof.check("end_of_turn_ends", found["ends"], token=end)
    same = found["same_ids"] and found["tokenizer"] == reference.tokenizer
    proof.check("template_and_tokenizer", same, prompts=len(reference.prompts))
    proof.check("plain_transformers", not found["imports_qwlit"])
    pickled = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLED or _is_pickled(file))
    proof.check("no_pickle", not pickled, files=pickled)
    return proof


def _compare_logits(proof: Proof, reference: Observed, observed: Observed) -> None:
    pairs = [(one["logits"], other["logits"]) for one, other in zip(reference, observed, strict=True)]
    # torch's maximum keeps a NaN; Python's loses it.
    scale = float(torch.stack([one.abs().max() for one, _ in pairs]).max())
    largest = float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())
    divergences = [
        torch.nn.functional.kl_div(other.log_softmax(1), one.log_softmax(1), reduction="none", log_target=True).sum(1)
        for one, other in pairs
    ]
    relative = largest / scale if scale else largest
    proof.check(
        "logits",
        relative <= proof.bound,
        largest_difference=largest,
        relative_to_largest_logit=relative,
        largest_logit=scale,
        largest_kl=float(torch.cat(divergences).max()),
        mean_kl=float(torch.cat(divergences).mean()),
        positions=sum(len(one) for one, _ in pairs),
    )


def _compare_greedy(proof: Proof, reference: Observed, observed: Observed) -> None:
    """Greedy answers are equal up to a token that the bound on the logits leaves open.

    If each logit may differ by d, the likeliest token is certain only where it is more than 2 d ahead of the second.
    """
    open_margin = 2 * proof.bound * proof.facts["logits"]["largest_logit"]
    equal = compared = 0
    for one, other in zip(reference, observed, strict=True):
        tokens = list(zip(one["tokens"].tolist(), other["tokens"].tolist(), strict=False))
        first = next((i for i, (a, b) in enumerate(tokens) if a != b), len(tokens))
        compared += len(one["tokens"])
        equal += first
        if first < len(tokens) and one["margins"][first] <= open_margin:
            compared -= len(one["tokens"]) - first
    proof.check("greedy_answers", equal == compared, equal_tokens=equal, certain_tokens=compared)


def _is_pickled(file: Path) -> bool:
    """Whether the file is a pickle or a zip, which torch.save writes."""
    if file.suffix == ".safetensors" or not file.is_file():
        return False
    with file.open("rb") as handle:
        head = handle.read(2)
    return head == b"PK" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the export, by its name."""
    hashes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROOF):
        with file.open("rb") as handle:
            hashes[str(file.relative_to(folder))] = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashes
