"""Load a trained model for use: from a run's checkpoint, or from a model folder."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from qwlit.config.compose import Composed
from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError, DataError
from qwlit.core.files import read_json
from qwlit.data.chat import ChatEncoder
from qwlit.data.conversation import Conversation, Message
from qwlit.data.jinja_template import unmarked_template
from qwlit.data.recognise import resolve_template
from qwlit.data.rows import RowError
from qwlit.data.templates import ChatTemplate, ChatTemplateFamily, Supervision
from qwlit.data.tokenizer import END_OF_TEXT, TextTokenizer
from qwlit.model.config import DropoutConfig, FreezeConfig, ModelConfig
from qwlit.model.load import check_vocabulary, fingerprint, load_tokenizer
from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.planning.setup import Setup, resolve_setup
from qwlit.training.checkpointing.checkpoint import read_weights
from qwlit.training.checkpointing.folder import linked_checkpoint, list_checkpoints
from qwlit.training.tracking.run_folder import RunFolder

QUESTION = Conversation((Message("user", "?"),))
"""Shows how a template begins an answer."""
NONFINITE_REMEDY = (
    "The weights diverged in training, or float16 is too narrow for them: use an earlier checkpoint"
    " (run=…/checkpoints/step-…), or hardware.precision=32-true"
)


@dataclass(frozen=True)
class TrainedModel:
    """A model that is ready to answer, on its device."""

    setup: Setup
    loss_model: LossModel
    tokenizer: PreTrainedTokenizerFast
    text: TextTokenizer
    chat: ChatEncoder | None
    """None if the tokenizer has no chat template and the settings name none."""
    origin: str
    """Where the weights are from, for people."""
    notes: tuple[str, ...] = ()
    """What a user should know about the weights, such as a damaged checkpoint that was passed over."""
    checkpoint: Path | None = None
    """The checkpoint of a run that has these weights; None for a model folder."""

    @property
    def config(self) -> RunConfig:
        return self.setup.config

    @property
    def causal_lm(self) -> PreTrainedModel:
        return self.loss_model.causal_lm

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        own = self.causal_lm.generation_config.eos_token_id
        known = [] if own is None else own if isinstance(own, list) else [own]
        turn = [self.chat.end_of_turn_id] if self.chat else []
        text = [self.text.control_ids[END_OF_TEXT]] if END_OF_TEXT in self.text.control_ids else []
        return list(dict.fromkeys([*turn, *text, *known]))

    @property
    def pad_id(self) -> int:
        """Of positions that the attention mask leaves out."""
        pad = self.tokenizer.pad_token_id
        return next(iter(self.end_ids), 0) if pad is None else int(pad)

    @property
    def most_positions(self) -> int:
        """Tokens of a prompt and its answer together."""
        return int(self.causal_lm.config.max_position_embeddings)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: products in the precision of the hardware settings."""
        dtype = self.setup.machine.compute_dtype
        return torch.autocast(self.causal_lm.device.type, dtype=dtype, enabled=dtype != torch.float32)


def for_one_device(composed: Composed) -> Composed:
    """Return the settings for one device of this machine: a run of four GPUs can be used on a laptop.

    Typed settings of the hardware stay.
    """
    hardware: dict[str, Any] = {
        **{"accelerator": "auto", "devices": 1, "num_nodes": 1, "gpu": None, "gpu_memory_gb": None},
        **{"strategy": "auto", "precision": "auto", "activation_checkpointing": "none", "compile": False},
        "offload_optimizer": False,
    }
    free = {key: value for key, value in hardware.items() if f"hardware.{key}" not in composed.typed}
    config = composed.config
    if "hardware" in composed.typed or composed.choices.get("hardware") not in (None, "auto"):
        free = {key: hardware[key] for key in ("devices", "num_nodes", "strategy") if key in free}
    return replace(composed, config=replace(config, hardware=replace(config.hardware, **free)))


def load_model_folder(composed: Composed) -> TrainedModel:
    """Load the model that `model.path` or `model.hub_id` names, with `model.adapter_path` merged into it.

    Raises:
        ConfigError: the folder or its tokenizer cannot be used.
    """
    config = replace(
        composed.config,
        adapter=replace(composed.config.adapter, kind="none", quantization="none"),
        dropout=DropoutConfig(),
        freeze=FreezeConfig(),
    )
    setup = resolve_setup(replace(composed, config=config))
    execution = replace(setup.execution, frozen_dtype=setup.machine.frozen_dtype)
    loss_model = _build(replace(setup, execution=execution), freeze=None)
    model = config.model
    origin = str(model.path or model.hub_id) + (f" with {model.adapter_path}" if model.adapter_path else "")
    return _ready(setup, loss_model, origin, ())


def load_run(composed: Composed, folder: RunFolder, checkpoint: Path | None = None) -> TrainedModel:
    """Load the weights of a run: its best checkpoint, or the newest while it trains; adapters are not merged.

    Args:
        checkpoint: use this one; None: choose.

    Raises:
        ConfigError: no checkpoint is good, or the base model or tokenizer is not where the run found it, or another.
    """
    setup = resolve_setup(composed)
    trains_all = setup.num_trainable == setup.num_parameters
    if not trains_all:
        _refuse_other_base(setup.config.model, folder)
    loss_model = _build(setup, setup.config.freeze, leave_empty=trains_all)
    candidates = [checkpoint] if checkpoint else _candidates(folder)
    damaged = []
    for candidate in candidates:
        try:
            fill_from_checkpoint(loss_model, candidate)
        except ConfigError as error:
            # What follows is the remedy of a training.
            damaged.append(str(error).partition("; run the same command")[0])
            continue
        ready = replace(_ready(setup, loss_model, f"{folder.path}, {candidate.name}", damaged), checkpoint=candidate)
        before = read_json(folder.path / "manifest.json").get("tokenizer")
        if before in (None, ready.text.fingerprint):
            return ready
        return replace(ready, notes=(*damaged, "the tokenizer is not the one of the training, so answers may differ"))
    remedy = " yet; wait for its first one" if folder.status == "running" else ", so it has nothing to answer with"
    raise ConfigError("; ".join(damaged) or f"{folder.path} has no checkpoint{remedy}")


def _refuse_other_base(model: ModelConfig, folder: RunFolder) -> None:
    before, now = read_json(folder.path / "manifest.json").get("base"), fingerprint(model)
    if before not in (None, now):
        raise ConfigError(
            f"model.path={model.path}: the base model is not the one that {folder.path} was trained on (fingerprint"
            f" {before}, now {now}); put that back, or name its new place with model.path=FOLDER"
        )


def _candidates(folder: RunFolder) -> list[Path]:
    """Return the checkpoints of a run: the best first, while it trains the newest; then the others, newest first."""
    newest_first = list_checkpoints(folder)[::-1]
    best = None if folder.status == "running" else linked_checkpoint(folder, "best")
    return [best, *(path for path in newest_first if path != best)] if best else newest_first


def fill_from_checkpoint(loss_model: LossModel, checkpoint: Path) -> None:
    """Fill in all trained weights; where the checkpoint cannot be used, raise ConfigError and change none."""
    parameters = {name: p for name, p in loss_model.causal_lm.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in read_weights(checkpoint, parameters):
            parameters[name].copy_(weight)


def _build(setup: Setup, freeze: FreezeConfig | None, *, leave_empty: bool = False) -> LossModel:
    config = setup.config
    execution = replace(setup.execution, activation_checkpointing="none", compiled=False)
    return build_loss_model(
        *(config.model, config.adapter, config.dropout, freeze, execution),
        seed=config.seed,
        leave_empty=leave_empty,
    )


def _ready(setup: Setup, loss_model: LossModel, origin: str, notes: Sequence[str]) -> TrainedModel:
    tokenizer = load_tokenizer(setup.config.model)
    check_vocabulary(setup.config.model, tokenizer)
    text = TextTokenizer(tokenizer)
    loss_model.eval().requires_grad_(False).to(setup.machine.accelerator)
    lm = loss_model.causal_lm
    # transformers fills in every setting that a call leaves out, such as bad_words_ids, from the model's own.
    lm.generation_config = GenerationConfig(eos_token_id=lm.generation_config.eos_token_id)
    chat = chat_encoder(setup.config, tokenizer, text)
    return TrainedModel(setup, loss_model, tokenizer, text, chat, origin, tuple(notes))


def _as_it_asks(tokenizer: PreTrainedTokenizerFast, family: ChatTemplateFamily) -> ChatTemplate:
    """Return the family, or the tokenizer's own template where that begins an answer in another way.

    Families are recognised by whole conversations; the templates of models that always think differ only in prompts,
    which end with <think>.
    """
    own = unmarked_template(tokenizer)
    if own is None:
        return family
    own = replace(own, default_system=family.default_system)
    try:
        for thinking in (False, True):
            texts = [
                "".join(piece.text for piece in template.render_prompt(QUESTION, thinking=thinking))
                for template in (family, own)
            ]
            if texts[0] != texts[1]:
                return own
    except RowError:
        pass  # it says so at the user's prompt
    return family


def chat_encoder(config: RunConfig, tokenizer: PreTrainedTokenizerFast, text: TextTokenizer) -> ChatEncoder | None:
    """Return what encodes prompts; None if the tokenizer has no chat template and the settings name none."""
    template: ChatTemplate | None
    try:
        template = resolve_template(tokenizer, config.data.template)
    except DataError:
        # For training it must be known which tokens the assistant writes; for a prompt not.
        template = unmarked_template(tokenizer)
    if template is None:
        return None
    if config.data.system is not None:
        template = template.with_system(config.data.system)
    if isinstance(template, ChatTemplateFamily) and config.data.template == "auto":
        template = _as_it_asks(tokenizer, template)
    return ChatEncoder(text, template, Supervision())
