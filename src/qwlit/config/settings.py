"""Settings of the run folder, the Slurm job, preflight and generation. The code that uses them is in higher layers."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from qwlit.core.schema import (
    Flag,
    NonNegativeFloat,
    NonNegativeInt,
    OneOrMore,
    PositiveFloat,
    PositiveInt,
    Ratio,
    WholeNumber,
    config_dataclass,
)
from qwlit.core.slurm import time_limit_seconds

LONGEST_NAME = 200
"""Bytes of a run's name. A file system allows 255; files beside the run folder have the name and a suffix."""


def cut_name(name: str, longest: int = LONGEST_NAME) -> str:
    """Return the name cut to `longest` bytes, between two characters."""
    return name.encode()[:longest].decode(errors="ignore")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.=,+-]*", name):
        raise ValueError(
            "a run's name is one folder of letters, digits and _ . = , + -; set run.root for another place"
        )
    if cut_name(name) != name:
        raise ValueError(
            f"a run's name has at most {LONGEST_NAME} bytes, this one has {len(name.encode())}; shorten it (a Chinese"
            " character has 3 bytes)"
        )
    return name


@config_dataclass
class RunSettings:
    """The run folder."""

    name: Annotated[str, AfterValidator(_folder_name)] | None = None
    """Folder under run.root; by default the experiment's name, or model-recipe-data. The same name resumes a run."""
    root: str = "runs"
    """Folder that contains the runs, relative to the current folder."""
    overwrite: Flag = False
    """Delete an existing run of this name and start a new one."""


def _slurm_time(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('write it in quotes, "12:00:00": YAML reads a clock time as a number')
    if isinstance(value, str):
        time_limit_seconds(value)
    return value


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("must be one line; give several lines as a list")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


@config_dataclass
class SlurmConfig:
    """The Slurm job that `submit` writes. Nodes, tasks, GPUs, cores and memory follow from the hardware profile."""

    partition: Line | None = None
    """Partition; null: the cluster's default. The same holds for account, qos and constraint."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that the nodes must have."""
    time: Annotated[str, BeforeValidator(_slurm_time)] = "24:00:00"
    """Time limit of one job; the job is requeued and the run resumes until it is done."""
    signal_seconds: Annotated[int, WholeNumber, Field(ge=10, le=65535, strict=True)] = 120
    """Seconds before the time limit at which the run is told to save: enough for one step and one checkpoint."""
    max_requeues_in_place: PositiveInt = 3
    """After this many requeues without a new step, the run is not requeued again; it would loop forever."""
    container: Line | None = None
    """Image for Pyxis' --container-image; the image's python is used. null: no container, the current environment."""
    mounts: tuple[Line, ...] = ()
    """Host folders that the container sees beside the working folder, as /from:/to."""
    setup: tuple[Line, ...] = ()
    """Shell lines before training, e.g. ["module load cuda"]; they may use variables as $NAME."""
    options: tuple[Line, ...] = ()
    """More options of sbatch, e.g. [--exclusive,--mem=64G]."""


@config_dataclass
class PreflightConfig:
    """Rules drawn from runs that failed; `plan` lists their findings."""

    allow: tuple[str, ...] = ()
    """Names of rules that only warn instead of refusing this run, e.g. [full_lr]."""


TopP = Annotated[float, Field(gt=0, le=1, strict=True)]


@config_dataclass
class GenerationSettings:
    """How a trained model answers. The names are those of transformers and vLLM."""

    thinking: Flag = False
    """Whether a model with a thinking mode thinks before it answers."""
    temperature: NonNegativeFloat = 0.7
    """Divides the logits before sampling; 0: take the likeliest token each time (greedy)."""
    top_p: TopP = 0.8
    """Sample among the likeliest tokens that together have this probability; 1: among all."""
    top_k: NonNegativeInt = 20
    """Sample among this many likeliest tokens; 0: among all."""
    min_p: Ratio = 0.0
    """Sample among tokens with at least this share of the likeliest token's probability; 0: among all."""
    repetition_penalty: PositiveFloat = 1.05
    """Divides positive logits of tokens that the text has already, and multiplies negative ones; 1: no penalty."""
    max_new_tokens: PositiveInt = 2048
    """An answer ends after this many tokens if it has not ended before."""
    stop: Annotated[tuple[str, ...], OneOrMore] = ()
    """Texts that end an answer, beside the model's end tokens."""
    batch_size: PositiveInt = 8
    """Prompts of a file that are answered together."""
    chat: Flag = True
    """Put the prompt into the chat template; false: continue the prompt as plain text."""
