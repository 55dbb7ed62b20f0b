"""`export`: write a trained model as a folder for other tools, and prove it in a fresh process."""

import re
from typing import Any

from qwlit.commands.generate import find_model, show_notes
from qwlit.commands.options import own_options
from qwlit.core.console import console
from qwlit.core.errors import ConfigError
from qwlit.core.files import read_json, resolve_path

OPTIONS = {
    "run": None,
    "output": None,
    "adapter": ("merge", "keep"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "max_shard_size": None,
    "prove": ("true", "false"),
}


def main(arguments: list[str]) -> None:
    own, overrides = own_options(arguments, OPTIONS)
    size = own["max_shard_size"]
    if size is not None and not re.fullmatch(r"[1-9]\d*[KMG]B", size):
        raise ConfigError(f"max_shard_size={size}: give a size such as 500MB or 5GB")
    composed, folder, checkpoint = find_model(own["run"], overrides)
    import torch

    from qwlit.inference.export import MAX_SHARD_SIZE
    from qwlit.inference.proof import PROOF
    from qwlit.run.export import Options, export_folder, export_run

    options = Options(
        output=resolve_path(own["output"]) if own["output"] else None,
        merges=own["adapter"] == "merge",
        dtype=None if own["dtype"] == "auto" else getattr(torch, str(own["dtype"])),
        max_shard_size=size or MAX_SHARD_SIZE,
        proves=own["prove"] == "true",
    )
    screen = console()
    with screen.status("exporting" + (" and proving" if options.proves else "")):
        made = export_run(composed, folder, checkpoint, options) if folder else export_folder(composed, options)
    proof = read_json(made / PROOF)
    show_notes(proof["of"].get("notes", []), screen)
    screen.print(str(made), markup=False, highlight=False, soft_wrap=True)
    if options.proves:
        _print_proof(proof)
        screen.print("  README.md there shows how to load it, PROOF.json what was checked", highlight=False)


def _print_proof(proof: dict[str, Any]) -> None:
    logits, greedy = proof["checks"]["logits"], proof["checks"]["greedy_answers"]
    console().print(
        f"  proved with plain transformers {proof['versions']['transformers']}: logits differ by"
        f" {logits['relative_to_largest_logit']:.1e} of the largest (bound {proof['bound']:g}),"
        f" KL {logits['largest_kl']:.1e} nats, {greedy['equal_tokens']} greedy tokens equal"
    )
