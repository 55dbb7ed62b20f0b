"""Export a run, or a base with its adapter, and prove the folder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qwlit.config.compose import Composed
from qwlit.core.disk import naming_path
from qwlit.core.errors import ConfigError, NotEqual
from qwlit.core.files import (
    read_json,
    read_json_lines,
    replacing_folder,
    resolve_path,
    write_json_atomic,
    write_text_atomic,
)
from qwlit.data.tokenizer import TextTokenizer
from qwlit.inference.export import (
    MAX_SHARD_SIZE,
    ExportSources,
    weights_of,
    write_adapter,
    write_model,
)
from qwlit.inference.export_settings import EndToken, as_list
from qwlit.inference.merge import base_weights, merged_weights
from qwlit.inference.model_card import CARD, model_card
from qwlit.inference.plain_proof import digest, observe, tokenizer_digest
from qwlit.inference.proof import (
    PROOF,
    Proof,
    Reference,
    Served,
    hash_files,
    observe_plainly,
    prove,
)
from qwlit.inference.trained_model import TrainedModel, chat_encoder, load_run
from qwlit.model.attention import generation_attention
from qwlit.model.config import ModelConfig
from qwlit.model.load import load_tokenizer
from qwlit.model.saved_adapter import read_saved_adapter
from qwlit.model.weight_files import stored_dtype
from qwlit.planning.setup import Setup, resolve_setup
from qwlit.run.exported import end_of_adapter, end_token, export_sources, proof_prompts
from qwlit.training.checkpointing.manifest import step_of
from qwlit.training.tracking.manifest import PACKAGES, installed_version
from qwlit.training.tracking.run_folder import RunFolder, jsonable


@dataclass(frozen=True)
class Options:
    """The options of `export`."""

    output: Path | None = None
    merges: bool = True
    """Adapters become part of the weights; else a run's adapter stays one."""
    dtype: torch.dtype | None = None
    """Of a whole model's weights; None: the base model's."""
    max_shard_size: str = MAX_SHARD_SIZE
    proves: bool = True


@dataclass(frozen=True)
class _Content:
    """What fills the folder."""

    write: Callable[..., None]
    """Called with the folder, and with `on_written`."""
    dtype: torch.dtype
    """Of the tensors."""
    is_adapter: bool = False
    merged: tuple[str, str] | None = None
    """Folders of the base and the adapter that were merged; None if there are none."""


@dataclass(frozen=True)
class _Subject:
    """What is exported, and what it computes."""

    setup: Setup
    origin: dict[str, Any]
    """Run, checkpoint and step, or model and adapter."""
    sources: ExportSources
    end: EndToken | None
    reference: Reference | None
    """None: nothing is proved."""
    run: Path | None = None

    def served(self, model: Path | str, adapter: Path | None = None) -> Served:
        """Return how plain transformers loads a model: on the same device, with products in the same precision."""
        machine = self.setup.machine
        return Served(model, adapter, machine.accelerator, _dtype_in_memory(self.setup))


def _dtype_in_memory(setup: Setup) -> str:
    return "float32" if setup.machine.compute_dtype == torch.float32 else "auto"


def export_run(composed: Composed, folder: RunFolder, checkpoint: Path | None, options: Options) -> Path:
    """Export the weights that `load_run` chooses; return the folder.

    QLoRA's adapter is merged into, and proved on, the base as it is stored, never its 4-bit values.

    Raises:
        ConfigError: no checkpoint is good, the base is not where the run found it, or the output is something else or
            is being written by another process.
        NotEqual: the proof failed; the folder is there, with PROOF.json.
    """
    config = composed.config
    has_adapter = config.adapter.kind != "none"
    _check_options(has_adapter, options)
    merges = has_adapter and options.merges
    output = options.output or folder.path / ("export-merged" if merges else "export")
    check_output(output, config.model)
    adapter = replace(config.adapter, quantization="none")
    model = load_run(replace(composed, config=replace(config, adapter=adapter)), folder, checkpoint)
    subject = _of_run(model, folder, options)
    lm = model.causal_lm
    write = partial(write_model, sources=subject.sources, end=subject.end, max_shard_size=options.max_shard_size)
    dtype = options.dtype or lm.config.dtype or torch.float32
    if not has_adapter:
        content = _Content(partial(write, lm.config, weights_of(lm), dtype=dtype), dtype)
        return _finish(output, subject, content)
    write_own = partial(write_adapter, lm, sources=subject.sources, end=subject.end)
    if not merges:
        return _finish(output, subject, _Content(write_own, torch.float32, is_adapter=True))
    with TemporaryDirectory() as temporary:
        write_own(Path(temporary))
        lm_config, base = lm.config, subject.sources.model
        # The model leaves the memory before the merged one is written.
        del model, lm, write_own
        weights = merged_weights(
            base_weights(config.model, subject.setup.model, seed=config.seed), read_saved_adapter(temporary)
        )
        merged = (str(base), temporary) if base else None
        content = _Content(partial(write, lm_config, weights, dtype=dtype), dtype, merged=merged)
        return _finish(output, subject, content)


def _check_options(has_adapter: bool, options: Options) -> None:
    if not has_adapter and not options.merges:
        raise ConfigError("adapter=keep: the run trained all weights and has no adapter; leave adapter out")
    if not options.merges and options.dtype:
        raise ConfigError("dtype: an adapter stays float32; leave dtype out, or set adapter=merge")


def _of_run(model: TrainedModel, folder: RunFolder, options: Options) -> _Subject:
    config, manifest = model.config, read_json(folder.path / "manifest.json")
    # The manifest of an older version does not say how answers end.
    said = manifest.get("answers_end", model.chat.template.end_of_turn if model.chat else None)
    used = model.checkpoint
    assert used is not None
    reference = None
    if options.proves:
        prompts = proof_prompts(
            model.setup, model.chat, model.tokenizer, read_json_lines(folder.path / "samples.jsonl")
        )
        with generation_attention(model.causal_lm), model.precision():
            observed = list(observe(model.causal_lm, [prompt.ids for prompt in prompts], model.end_ids))
        reference = Reference(prompts, model.end_ids, tokenizer_digest(model.tokenizer), observed)
    return _Subject(
        model.setup,
        {"run": str(folder.path), "checkpoint": used.name, "step": step_of(used)}
        | ({"notes": list(model.notes)} if model.notes else {}),
        export_sources(config.model, has_tokenizer=True),
        end_token(config, said, model.chat, model.text, model.tokenizer),
        reference,
        folder.path,
    )


def export_folder(composed: Composed, options: Options) -> Path:
    """Export the model that `model.path` names, with `model.adapter_path` merged into it; return the folder.

    The proof compares with what plain transformers and peft compute from base and adapter.

    Raises:
        ConfigError, NotEqual: see `export_run`.
    """
    if not options.merges:
        raise ConfigError("adapter=keep: model.adapter_path is the adapter already; leave adapter out")
    if options.output is None:
        raise ConfigError("output is not set; name the folder to write, output=FOLDER")
    config = composed.config
    check_output(options.output, config.model)
    config = replace(config, adapter=replace(config.adapter, kind="none", quantization="none"))
    setup = resolve_setup(replace(composed, config=config))
    sources = export_sources(config.model, has_tokenizer=True)
    saved = read_saved_adapter(config.model.adapter_path) if config.model.adapter_path else None
    adapter = saved.folder if saved else None
    tokenizer = load_tokenizer(config.model)
    end = end_of_adapter(adapter, tokenizer) if adapter else None
    subject = _Subject(setup, {"model": sources.base, "adapter": str(adapter) if adapter else None}, sources, end, None)
    weights = base_weights(config.model, setup.model, seed=config.seed)
    base = Path(str(sources.model))
    if options.proves:
        prompts = proof_prompts(setup, chat_encoder(config, tokenizer, TextTokenizer(tokenizer)), tokenizer, [])
        end_ids = [end.token_id, *end.other_end_ids] if end else as_list(setup.model.config.eos_token_id)
        observed, _ = observe_plainly(subject.served(base, adapter), prompts, end_ids)
        subject = replace(subject, reference=Reference(prompts, end_ids, tokenizer_digest(tokenizer), observed))
    dtype = options.dtype or setup.model.config.dtype or stored_dtype(base)
    if saved:
        weights = merged_weights(weights, saved)
    write = partial(write_model, setup.model.config, weights, sources=sources, end=end, dtype=dtype)
    write = partial(write, max_shard_size=options.max_shard_size)
    merged = (str(base), str(adapter)) if adapter else None
    return _finish(options.output, subject, _Content(write, dtype, merged=merged))


def check_output(folder: Path, model: ModelConfig) -> None:
    """Refuse to replace a folder that is not an export, or that the model is made of.

    Raises:
        ConfigError: it has files, but neither a proof nor the place of a run's export; or it is the base or adapter.
    """
    for source in (model.path, model.adapter_path):
        if source and resolve_path(source).resolve() == folder.resolve():
            raise ConfigError(f"output={folder} is the model that is exported, or its base; name another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={folder} is a file; name a folder")
    is_run_export = folder.name in ("export", "export-merged") and (folder.parent / "config.yaml").is_file()
    if folder.is_dir() and any(folder.iterdir()) and not is_run_export and not (folder / PROOF).is_file():
        raise ConfigError(f"output={folder} has files and is no export (no {PROOF}); name another folder, or empty it")


def _finish(output: Path, subject: _Subject, content: _Content) -> Path:
    """Fill the folder, prove it, write proof and card, and put it in its place."""
    digests: dict[str, str] = {}
    failed: list[str] = []

    def remember(name: str, tensor: torch.Tensor) -> None:
        digests[name] = digest(tensor)

    with naming_path(output), replacing_folder(output, waits=False) as folder:
        content.write(folder, on_written=remember if subject.reference else None)
        document: dict[str, Any] = {"of": subject.origin, "proved": None}
        if subject.reference:
            proof = _prove(folder, subject, content, digests)
            failed = proof.failed
            document |= _document(subject, content, proof)
        card = model_card(output, subject.setup.config, document, subject.run, content.is_adapter)
        write_text_atomic(folder / CARD, card)
        write_json_atomic(folder / PROOF, document | {"files": hash_files(folder)})
    if failed:
        raise NotEqual(f"{output} is not the model that it was made of: {'; '.join(failed)}; see {output / PROOF}")
    return output


def _prove(folder: Path, subject: _Subject, content: _Content, digests: dict[str, str]) -> Proof:
    assert subject.reference is not None
    base = str(subject.sources.model)
    return prove(
        folder,
        subject.served(base, folder) if content.is_adapter else subject.served(folder),
        subject.reference,
        digests=digests,
        dtype=content.dtype,
        end=subject.end.token_id if subject.end else None,
        merged=content.merged,
    )


def _document(subject: _Subject, content: _Content, proof: Proof) -> dict[str, Any]:
    """Return what PROOF.json says of the proof."""
    return {
        "proved": not proof.failed,
        "failed": proof.failed,
        "bound": proof.bound,
        "weights": str(content.dtype).removeprefix("torch."),
        "products": str(subject.setup.machine.compute_dtype).removeprefix("torch."),
        "device": subject.setup.machine.device_name,
        "versions": {name: installed_version(name) for name in ("qwlit", "safetensors", *PACKAGES)},
        "checks": jsonable(proof.facts),
    }
