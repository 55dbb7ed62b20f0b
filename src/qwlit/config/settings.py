"""What a user can set about the run folder, the Slurm job and preflight: settings whose code is above this layer."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from qwlit.core.schema import Flag, PositiveInt, config_dataclass
from qwlit.core.slurm import time_limit_seconds


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.=,+-]{0,199}", name):
        raise ValueError("a run's name is one folder: letters, digits and _ . = , + -; set run.root for another place")
    return name


@config_dataclass
class RunSettings:
    """Where the run lives."""

    name: Annotated[str, AfterValidator(_folder_name)] | None = None
    """Folder under run.root; by default the experiment's name, or model-recipe-data. The same name continues a run."""
    root: str = "runs"
    """Folder that holds the runs, relative to the current one."""
    overwrite: Flag = False
    """Delete an existing run of this name and start anew."""


def _slurm_time(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('quote it, "12:00:00": YAML reads a clock time as a number')
    if isinstance(value, str):
        time_limit_seconds(value)
    return value


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("one line each")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


@config_dataclass
class SlurmConfig:
    """The Slurm job that `submit` writes. Nodes, tasks, GPUs, cores and memory follow from the hardware profile."""

    partition: Line | None = None
    """Partition; null: the cluster's default. So are account, qos and constraint."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    constraint: Line | None = None
    """Features that the nodes must have."""
    time: Annotated[str, BeforeValidator(_slurm_time)] = "24:00:00"
    """Time limit of one piece of the run; it is requeued and goes on until it is done."""
    signal_seconds: Annotated[int, Field(ge=10, le=65535, strict=True)] = 120
    """How long before the time limit the run is told to save: one step, one checkpoint and some."""
    max_requeues_in_place: PositiveInt = 3
    """A run that is requeued so often without one step more is left: it would loop for ever."""
    container: Line | None = None
    """Image for Pyxis' --container-image; its own python is used. null: no container, this environment."""
    mounts: tuple[Line, ...] = ()
    """What the container sees of the host beside the working folder, as /from:/to."""
    setup: tuple[Line, ...] = ()
    """Shell lines before training, e.g. ["module load cuda"]; variables as $NAME."""
    options: tuple[Line, ...] = ()
    """Further options of sbatch, e.g. [--exclusive,--mem=64G]."""


@config_dataclass
class PreflightConfig:
    """Rules that are known from how runs die; `plan` lists what they find."""

    allow: tuple[str, ...] = ()
    """Names of rules that would refuse this run and shall only warn, e.g. [full_lr]."""
