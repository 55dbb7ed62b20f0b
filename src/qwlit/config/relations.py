"""Check settings against each other: one may exclude, need or contradict another."""

from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError
from qwlit.core.secrets import hide_secrets
from qwlit.data.columns import check_columns
from qwlit.data.config import check_weights
from qwlit.data.formats import FORMATS_WITHOUT_ANSWER
from qwlit.model.config import AdapterConfig, FreezeConfig
from qwlit.model.hub import looks_like_hub_id
from qwlit.optim.kinds import OPTIMIZERS

TEXTS = {
    "run.name",
    "run.root",
    "model.path",
    "model.adapter_path",
    "model.tokenizer",
    "model.hub_id",
    "data.path",
    "data.val_path",
    "data.system",
} | {f"slurm.{name}" for name in ("partition", "account", "qos", "constraint", "time", "container")}
"""Settings that are text even if they look like a number, and that must not be empty."""
WARMUP = ("scheduler.warmup_steps", "scheduler.warmup_ratio")
LENGTH = ("train.max_steps", "train.max_epochs")
VALIDATION = ("data.val_path", "data.val_fraction")
"""Pairs of settings of which a run needs one."""


def check_relations(config: RunConfig) -> None:
    """Check settings against each other.

    Raises:
        ConfigError: naming both settings and the remedy.
    """
    for check in CHECKS:
        check(config)


def _texts(config: RunConfig) -> None:
    for key in sorted(TEXTS):
        section, name = key.split(".")
        if getattr(getattr(config, section), name) == "":
            raise ConfigError(f"{key} is empty; is a shell variable unset? Leave the key out to use the default")


def _length(config: RunConfig) -> None:
    if config.train.max_steps is None and config.train.max_epochs is None:
        raise ConfigError("train.max_steps and train.max_epochs are both null; set one, or the run has no end")


def _schedule(config: RunConfig) -> None:
    scheduler = config.scheduler
    if scheduler.warmup_steps is not None and scheduler.warmup_ratio is not None:
        raise ConfigError("scheduler.warmup_steps and scheduler.warmup_ratio are both set; give one of them")
    if scheduler.name in ("exponential", "range_test") and scheduler.min_lr_ratio == 0:
        raise ConfigError(f"scheduler.min_lr_ratio=0: {scheduler.name} never reaches 0; set e.g. 0.01")


def _data(config: RunConfig) -> None:
    data = config.data
    if data.path is None:
        raise ConfigError("data.path is not set; give a file, a folder or hf:ORG/NAME, or data=demo")
    check_weights(data)
    if data.val_path is not None and data.val_fraction > 0:
        raise ConfigError("data.val_path and data.val_fraction are both set; give one of them")
    check_columns(data.columns or {}, data.format)
    if data.system is not None and data.format in FORMATS_WITHOUT_ANSWER:
        raise ConfigError(f"data.system is for conversations, but data.format={data.format} has none; leave it out")
    if data.exact_match and data.val_path is None and data.val_fraction == 0:
        raise ConfigError(
            f"data.exact_match={data.exact_match} answers validation samples; set data.val_path or val_fraction"
        )


def _optimizer(config: RunConfig) -> None:
    optim, kind = config.optim, OPTIMIZERS[config.optim.name]
    if optim.amsgrad and not kind.has_amsgrad:
        raise ConfigError(f"optim.amsgrad=true works only with adamw, but optim.name={optim.name}; set optim=adamw")
    if optim.nesterov and optim.momentum == 0 and kind.has_momentum:
        raise ConfigError("optim.nesterov=true needs momentum, but optim.momentum=0; change one of them")


def _strict(config: RunConfig) -> None:
    if config.determinism != "strict":
        return
    name, precision, attention = config.optim.name, config.hardware.precision, config.model.attention
    if not OPTIMIZERS[name].allows_strict:
        raise ConfigError(
            f"determinism=strict trains in float32, but optim.name={name} uses fewer bits; set optim=adamw"
        )
    if config.adapter.quantization != "none":
        raise ConfigError(
            "determinism=strict trains in float32, but adapter.quantization=nf4 has 4 bits; set it to none"
        )
    if precision not in ("auto", "32-true"):
        raise ConfigError(
            f"determinism=strict trains in float32, but hardware.precision={precision};"
            " set hardware.precision=32-true, or use determinism=reproducible"
        )
    if config.hardware.tf32:
        raise ConfigError("determinism=strict computes in full float32, but hardware.tf32=true rounds; leave it out")
    if attention not in ("auto", "eager"):
        raise ConfigError(f"determinism=strict needs eager attention, but model.attention={attention}; use auto")


def _hub(config: RunConfig) -> None:
    model = config.model
    if model.hub != "huggingface" and not (model.hub_id or (model.tokenizer and looks_like_hub_id(model.tokenizer))):
        raise ConfigError(
            f"model.hub={model.hub} has no effect: neither model.hub_id nor model.tokenizer is a hub id; leave it out"
        )


def _adapter(config: RunConfig) -> None:
    adapter, freeze = config.adapter, config.freeze
    if config.model.adapter_path and config.model.init == "random":
        raise ConfigError("model.adapter_path needs trained weights, but model.init=random; set model.init=pretrained")
    if adapter.kind == "none":
        for key, default in vars(AdapterConfig()).items():
            if getattr(adapter, key) != default:
                raise ConfigError(
                    f"adapter.{key} needs adapters, but adapter.kind=none; set recipe=qlora or recipe=lora"
                )
        if config.dropout.lora:
            raise ConfigError(f"dropout.lora={config.dropout.lora}: there are no adapters; set it to 0, or recipe=lora")
    elif freeze != FreezeConfig():
        raise ConfigError("freeze.* has no effect with adapter.kind=lora, which freezes the whole base; leave it out")


def _dropout(config: RunConfig) -> None:
    dropout = config.dropout
    if dropout.layers is not None and not (dropout.attention or dropout.feed_forward or dropout.residual):
        raise ConfigError(
            "dropout.layers is set, but dropout.attention, feed_forward and residual are all 0; set one of them"
        )


def _profile(config: RunConfig) -> None:
    steps = config.profile.steps
    if steps is not None and not 0 < steps[0] <= steps[1]:
        raise ConfigError(f"profile.steps={list(steps)}: give [first,last] with 1 <= first <= last")


# Limits of W&B's server and client, which would end the run only when it has read the data.
LONGEST_TAG, LONGEST_PROJECT, NOT_IN_PROJECT = 64, 128, "/\\#?%:"


def _logger(config: RunConfig) -> None:
    logger = config.logger
    if logger.upload_checkpoints and not logger.wandb:
        raise ConfigError("logger.upload_checkpoints=true uploads to W&B, but logger=none; set logger=wandb")
    if not logger.wandb:
        return
    for tag in logger.tags:
        if not 0 < len(tag) <= LONGEST_TAG:
            raise ConfigError(f"logger.tags: a W&B tag has 1 to {LONGEST_TAG} characters, '{tag}' has {len(tag)}")
    project = logger.project or ""
    if len(project) > LONGEST_PROJECT or set(project) & set(NOT_IN_PROJECT):
        raise ConfigError(
            f"logger.project={project}: a W&B project's name has at most {LONGEST_PROJECT} characters, and none of"
            f" {' '.join(NOT_IN_PROJECT)}"
        )


def _slurm(config: RunConfig) -> None:
    slurm = config.slurm
    for key, lines in (("setup", slurm.setup), ("options", slurm.options)):
        for line in lines:
            if (hidden := hide_secrets(line)) != line:
                raise ConfigError(
                    f"slurm.{key}: '{hidden}' has a password, a key or a token, and config.yaml and the job's file"
                    " would keep it; write it into a file that only you can read, and set slurm.setup=['source FILE']"
                )


CHECKS = (
    *(_texts, _length, _schedule, _data, _optimizer, _strict),
    *(_hub, _adapter, _dropout, _profile, _logger, _slurm),
)
