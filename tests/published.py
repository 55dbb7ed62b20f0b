"""Model folders as they are published: the real keys and values, with only the sizes made small.

`cases/published_configs.json` says which of its values were checked against public copies of the files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwlit.model.families import FAMILIES

CASES = Path(__file__).parent / "cases"
PUBLISHED = json.loads((CASES / "published_configs.json").read_text(encoding="utf-8"))
CONFIGS: dict[str, dict[str, Any]] = PUBLISHED["config.json"]
GENERATION: dict[str, dict[str, Any]] = PUBLISHED["generation_config.json"]
BASES = {"Qwen2-0.5B", "Qwen2.5-0.5B", "Qwen3-0.6B-Base"}
"""The models that no chat was trained into."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["full_attention", "full_attention"],
}


def small_config(name: str) -> dict[str, Any]:
    """Return the published values, the sizes made small; keys that the file leaves out stay out."""
    return {key: SMALL.get(key, value) for key, value in CONFIGS[name].items()}


def template_of(name: str) -> str:
    """Return the chat template of the model, a key of `real_tokenizer.JINJA`."""
    if name.startswith("Qwen3"):
        return "qwen3"
    if name.startswith("Qwen2-"):
        return "qwen2"
    return "qwen2_5_base" if name in BASES else "qwen2_5"


def generation_of(name: str) -> dict[str, Any]:
    """Return the generation configuration of the nearest model whose file is at hand."""
    kind = "instruct" if name not in BASES else "base"
    # That of Qwen3's base models is not at hand: Qwen2.5's says the same of the end and of sampling.
    return GENERATION.get(f"{'Qwen3' if name.startswith('Qwen3') else 'Qwen2.5'} {kind}", GENERATION["Qwen2.5 base"])


def published_folder(name: str, folder: Path, tokenizer_folder: Callable[[str], Path]) -> Path:
    """Make a folder as the hub has it: bf16 weights (random), a tied head left out, the family's tokenizer."""
    shutil.copytree(tokenizer_folder(template_of(name)), folder)
    values = small_config(name)
    write(folder / "config.json", values)
    write(folder / "generation_config.json", generation_of(name))
    config_class, model_class = FAMILIES[values["model_type"]].classes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class.from_dict(dict(values))).to(torch.bfloat16)
    state = model.state_dict()
    if values["tie_word_embeddings"]:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")
