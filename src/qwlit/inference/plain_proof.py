"""Observe a model with plain transformers: logits, greedy answers, end, template, weights.

Run as a script in a process of its own, which imports nothing of qwlit: `python plain_proof.py JOB.json`. `prove`
writes the job and reads the result. `observe` also measures a run's own model.

Shapes: K last positions of a prompt, V vocabulary.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

POSITIONS, NEW_TOKENS = 16, 24
"""Positions of a prompt whose logits are compared, and greedy tokens; more prove little more and take memory."""
NOISE = 1e-6
"""What float32 sums in another order may differ by, relative to the largest weight of a matrix (assumption)."""


def observe(model: Any, prompts: Iterable[Sequence[int]], end_ids: list[int]) -> Iterator[dict[str, Tensor]]:
    """Yield for each prompt the logits at its last positions (K, V), the greedy tokens, and how far each of these was
    ahead of the second likeliest token, in logits."""
    greedy = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        # Else transformers takes these from the folder, and warns that greedy answers ignore them.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=end_ids or None,
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # transformers fills in every setting that `greedy` leaves out, such as bad_words_ids, from the model's own.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        for prompt in prompts:
            yield _observe(model, prompt, greedy)
    finally:
        model.generation_config = own


def _observe(model: Any, prompt: Sequence[int], greedy: GenerationConfig) -> dict[str, Tensor]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -POSITIONS:].float().cpu()
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    top = torch.cat([step.float().cpu() for step in answer.logits]).topk(2).values  # (tokens, 2)
    return {
        "logits": logits,
        "tokens": answer.sequences[0, len(prompt) :].cpu(),
        "margins": (top[:, 0] - top[:, 1]).contiguous(),
    }


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    array: Any = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(array).hexdigest()


class _WriteThenEnd(LogitsProcessor):
    """Makes the model write one token that ends nothing, and then `end`."""

    def __init__(self, prompt_length: int, end: int, end_ids: list[int]) -> None:
        self._prompt_length, self._end, self._end_ids = prompt_length, end, end_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self._prompt_length:
            return scores.index_fill(1, torch.tensor(self._end_ids, device=scores.device), -torch.inf)
        only = torch.full_like(scores, -torch.inf)
        only[:, self._end] = 0
        return only


def _ends(model: Any, folder: str, prompt: list[int], end: int, end_ids: list[int]) -> bool:
    """Whether generation with the folder's own settings stops at the token `end`."""
    ids = torch.tensor([prompt], device=model.device)
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig.from_pretrained(folder),
        logits_processor=LogitsProcessorList([_WriteThenEnd(len(prompt), end, end_ids)]),
        max_new_tokens=4,
    )[0, len(prompt) :].tolist()
    return bool(tokens[1:] == [end])


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of what a tokenizer does to a text: its vocabulary, merges and rules for cutting it."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    text = json.dumps([parts[name] for name in ("normalizer", "pre_tokenizer", "model")], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _same_ids(tokenizer: Any, prompts: list[dict[str, Any]]) -> bool:
    """Whether the folder's tokenizer and template make the ids of the prompts."""
    for prompt in prompts:
        if prompt["messages"] is None:
            ids = tokenizer(prompt["text"], add_special_tokens=False).input_ids
        else:
            ids = tokenizer.apply_chat_template(
                prompt["messages"],
                add_generation_prompt=True,
                enable_thinking=prompt["thinking"],
                tokenize=True,
                return_dict=False,
            )
        if list(ids) != prompt["ids"]:
            return False
    return True


def _load(path: str, adapter: str | None, dtype: str, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.to(device).eval()


def _against_peft(model: Any, merged: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Compare the weights with peft's merge of base and adapter, in units of what rounding to `dtype` may change."""
    base, adapter = merged
    by_peft = _load(base, adapter, "float32", "cpu").merge_and_unload().state_dict()
    worst, where = 0.0, ""
    for name, tensor in model.state_dict().items():
        expected = by_peft[name].float()
        allowed = torch.finfo(dtype).eps * expected.abs() + NOISE * expected.abs().max()
        difference = float(((tensor.cpu().float() - expected).abs() / allowed.clamp_min(1e-30)).max())
        worst, where = max((worst, where), (difference, name))
    return {"largest": worst, "tensor": where}


def imports_qwlit() -> bool:
    """Whether this process has a module of qwlit."""
    return any(name.partition(".")[0] == "qwlit" for name in sys.modules)


def main(job: dict[str, Any]) -> None:
    model = _load(job["model"], job["adapter"], job["dtype"], job["device"])
    ids = [prompt["ids"] for prompt in job["prompts"]]
    observed = enumerate(observe(model, ids, job["end_ids"]))
    save_file({f"{i}.{key}": tensor for i, each in observed for key, tensor in each.items()}, job["observed"])
    if (folder := job["export"]) is None:
        return
    stored = getattr(torch, job["stored_dtype"])
    state = load_file(Path(folder) / "adapter_model.safetensors") if job["adapter"] else model.state_dict()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    found: dict[str, Any] = {
        # Loaded in float32, the weights still have the stored values.
        "weights": {name: digest(tensor.to(stored)) for name, tensor in state.items()},
        "ends": job["end"] is None or _ends(model, folder, ids[0], job["end"], job["end_ids"]),
        "same_ids": _same_ids(tokenizer, job["prompts"]),
        "tokenizer": tokenizer_digest(tokenizer),
        "tied": bool(model.config.tie_word_embeddings),
    }
    if job["merged"]:
        found["against_peft"] = _against_peft(model, job["merged"], stored)
    found["imports_qwlit"] = imports_qwlit()
    Path(job["found"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
