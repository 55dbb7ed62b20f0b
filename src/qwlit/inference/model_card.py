"""The README.md of an export: what the model is, how it was trained, and how to use it."""

import re
import shlex
from pathlib import Path
from typing import Any

from qwlit.config.run import RunConfig
from qwlit.core.files import read_json, read_json_lines, resolve_path

CARD = "README.md"
METRICS = ("val/loss", "val/accuracy", "val/perplexity")


def model_card(output: Path, config: RunConfig, proof: dict[str, Any], run: Path | None, is_adapter: bool) -> str:
    """Return the card as Markdown.

    Args:
        output: where the folder will be.
        proof: what PROOF.json says.
        run: the folder of the run; None if a model folder was exported.
    """
    base = config.model.path or config.model.hub_id
    licence = _licence(resolve_path(config.model.path)) if config.model.path else None
    head = ["---", *([f"license: {licence}"] if licence else []), "library_name: transformers", "---"]
    name = output.name if run is None else run.name
    lines = [*head, f"# {name}", "", *_facts(config, proof, run, base, licence), "", "## Use", ""]
    return "\n".join([*lines, *_use(output, base, is_adapter)]) + "\n"


def _licence(base: Path) -> str | None:
    """Return the licence that the base's own model card names."""
    card = base / CARD
    head = card.read_text(encoding="utf-8", errors="replace")[:4000] if card.is_file() else ""
    found = re.search(r"^license: *([\w.+-]+)", head, re.MULTILINE)
    return found[1] if found else None


def _facts(
    config: RunConfig, proof: dict[str, Any], run: Path | None, base: str | None, licence: str | None
) -> list[str]:
    origin = proof["of"]
    rows = {"base": base or "random weights"}
    if base:
        rows["licence of the base"] = licence or "not named in its folder"
    if config.model.adapter_path:
        rows["adapter"] = config.model.adapter_path
    if run is not None:
        manifest, adapter = read_json(run / "manifest.json"), config.adapter
        trained = "all weights" if adapter.kind == "none" else f"LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}"
        if adapter.quantization != "none":
            trained += " on a base in 4 bits; exported on the base as it is stored"
        metrics = [row for row in read_json_lines(run / "metrics.jsonl") if row.get("step") == origin["step"]]
        measured = {key: value for row in metrics for key, value in row.items() if key in METRICS and value is not None}
        rows |= {
            "recipe": f"{(manifest.get('choices') or {}).get('recipe')}: {trained}; learning rate {config.optim.lr:g},"
            f" {config.train.global_batch_size} samples a step",
            "checkpoint": f"{origin['checkpoint']} of {origin['run']}",
            "data": f"fingerprint {manifest.get('data')}",
            "metrics": ", ".join(f"{key} {value:.4f}" for key, value in measured.items()) or "none at this step",
            "determinism": f"{manifest.get('determinism')}, seed {manifest.get('seed')}, {manifest.get('attention')}"
            f" attention, {manifest.get('precision')}, {manifest.get('devices')} x {manifest.get('device')}",
        }
    says = {True: "proved", False: f"NOT proved: {'; '.join(proof.get('failed', []))}", None: "not made"}
    rows["proof"] = f"{says[proof['proved']]}, see PROOF.json"
    return ["| | |", "|---|---|", *(f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows.items())]


def _use(output: Path, base: str | None, is_adapter: bool) -> list[str]:
    place = shlex.quote(str(output))
    if is_adapter:
        return [
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(output)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(output)!r})",
            "# The base's own settings need not end an answer as trained.",
            f"ends = GenerationConfig.from_pretrained({str(output)!r})  # generate(…, generation_config=ends)",
            "```",
            "```bash",
            f"vllm serve {shlex.quote(str(base))} --enable-lora --lora-modules tuned={place}",
            f"qwlit generate model.path={place}",
            "```",
        ]
    commands = (f"{program} {place}" for program in ("transformers serve", "vllm serve"))
    return ["```bash", *commands, f"qwlit generate model.path={place}", "```"]
