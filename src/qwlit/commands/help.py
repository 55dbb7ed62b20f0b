"""The `--help` texts of the subcommands, built from the settings' dataclasses so that they are never out of date."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from qwlit.config.compose import compose, group_options
from qwlit.config.overrides import format_value
from qwlit.config.run import RunConfig

WIDTH = 110
NAME_WIDTH = 38

INSPECT_INTRO = """\
python -m qwlit inspect [output=text|json] [sample=N] [group=choice ...] [key=value ...]

Shows what `train` with the same overrides would train on: the supervised tokens (green, or in [[ ]] without colours),
lengths, packing of the first steps, and quarantined rows with their reasons. Trains nothing. Needs no GPU and no
weights, only the tokenizer.

  inspect experiment=demo
  inspect data.path=chat.jsonl model.path=FOLDER sample=3        one sample, token by token
  inspect data.path=chat.jsonl output=json                       one line per sample: sample, input_ids, loss_mask,
                                                                 num_supervised_tokens; the rest goes to stderr

Groups: group=choice loads a file of settings
"""

PLAN_INTRO = """\
python -m qwlit plan [output=text|json] [mfu=0.4] [group=choice ...] [key=value ...]

Says what `train` with the same overrides would do, without training: parameters, memory by component against the
device's memory, micro-batches, steps, schedule, time, and the preflight findings. It believes the hardware profile and
needs no GPU, no weights and no network. What depends on data or tokenizer is "not checked" if they are not available.

  plan hardware=a100x4 recipe=full_sft
  plan hardware=rtx4090 recipe=qlora model=qwen2_5_7b data.path=chat.jsonl
  plan hardware=h100 mfu=0.5                                     the time at half of the devices' peak
  plan hardware=a100 output=json                                 for scripts

Groups: group=choice loads a file of settings
"""

SUBMIT_INTRO = """\
python -m qwlit submit [dry_run=true] [seeds=[0,1,2]] [slurm.key=value ...] [group=choice ...] [key=value ...]
python -m qwlit submit sweep=NAME|FILE trials=N tasks=N [dry_run=true] [key=value ...]

Writes the Slurm job that runs `train` with the same overrides, and passes it to sbatch. Nodes, tasks, GPUs, cores and
memory follow from the hardware profile. Before its time limit, or when Slurm preempts it, the job saves a checkpoint
and is requeued; the same run resumes, until it is done.

  submit hardware=a100x4 recipe=full_sft slurm.partition=gpu slurm.time=12:00:00
  submit hardware=a100x4 recipe=full_sft dry_run=true                    print the file, submit nothing
  submit hardware=a100 recipe=lora seeds=[0,1,2]                         an array: one run per seed
  submit sweep=lora trials=20 tasks=4 hardware=a100 data.path=…          a sweep whose trials four tasks share

If partition, account and set-up lines are always the same, keep them in a file: slurm=NAME (see docs/slurm.md).

Groups: group=choice loads a file of settings
"""

SWEEP_INTRO = """\
python -m qwlit sweep sweep=NAME|FILE [backend=wandb|optuna] [trials=N] [agents=N|jobs=N] [key=value ...]
python -m qwlit sweep sweep=NAME|FILE action=best [run.name=… run.root=…]
python -m qwlit sweep action=find_lr [key=value ...]

Searches for settings. Every trial is an ordinary run of `train`. Its overrides are those of the sweep file, then those
typed here, then the values being tried. Both backends read the same file, in W&B's format. The same command resumes an
interrupted sweep.

  sweep sweep=lora data.path=chat.jsonl data.val_fraction=0.05                   W&B: creates the sweep, starts agents
  sweep sweep=lora backend=optuna trials=20 jobs=2 data.path=… data.val_fraction=0.05    no account, no server
  sweep sweep=presets backend=optuna                                             the guide's four settings, once each
  sweep sweep=lora action=best                                                   the best trial as an experiment file
  sweep action=find_lr recipe=lora data.path=chat.jsonl                          a learning-rate range test

  sweep=    {sweeps}; or the path of a file
  trials=   number of trials in all; a grid needs none
  agents=   wandb: number of agents to start here, by default one per GPU; 0 prints how to start them
  jobs=     optuna: trials that run at the same time, by default one per GPU. Several machines that share the folder
            may run the same command

The sweep's folder is run.root/NAME (or run.root/run.name): sweep.json, and one run per trial.

Groups: group=choice loads a file of settings
"""

TRAIN_INTRO = """\
python -m qwlit train [group=choice ...] [key=value ...]

Trains a model. The same command resumes an unfinished run of the same name.

  train experiment=demo                                          two minutes, no network, no GPU
  train hardware=a100x4 recipe=full_sft                          four A100s, Qwen3-0.6B from the hub
  train model.path=FOLDER data.path=chat.jsonl data.val_fraction=0.05 recipe=lora
  train config=runs/NAME/config.yaml run.name=again              an earlier run's settings
  train ... --cfg job                                            print the settings, train nothing

Groups: group=choice loads a file of settings
"""


def train_help() -> str:
    return TRAIN_INTRO + _groups_and_settings(("",))


def submit_help() -> str:
    return SUBMIT_INTRO + _groups_and_settings(("slurm.", "hardware.", "run.", "seed"))


def sweep_help() -> str:
    from qwlit.tuning.sweep_file import sweep_names

    return SWEEP_INTRO.format(sweeps=", ".join(sweep_names())) + _groups_and_settings(("",))


def inspect_help() -> str:
    return INSPECT_INTRO + _groups_and_settings(
        ("data.", "model.", "run.root", "seed", "train.global", "hardware.micro")
    )


def plan_help() -> str:
    return PLAN_INTRO + _groups_and_settings(("",))


def _groups_and_settings(prefixes: tuple[str, ...]) -> str:
    """Describe all groups, and the settings whose names begin with one of `prefixes`."""
    groups = "".join(_entry(name, ", ".join(options)) for name, options in group_options().items())
    defaults = compose([]).config
    settings = "".join(
        _entry(f"{key}={format_value(value)}", doc)
        for key, value, doc in _fields(RunConfig, defaults, "")
        if key.startswith(prefixes)
    )
    return f"{groups}\nSettings: key=value, shown with their defaults\n{settings}"


def _fields(owner: Any, values: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, help) of every field."""
    for field in dataclasses.fields(owner):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value) and field.name != "architecture":
            yield from _fields(type(value), value, f"{prefix}{field.name}.")
        elif field.name != "architecture":
            description = owner.__pydantic_fields__[field.name].description or ""
            yield prefix + field.name, value, " ".join(description.split())


def _entry(name: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH - NAME_WIDTH - 4) or [""]
    head = f"  {name:<{NAME_WIDTH}}  "
    if len(name) > NAME_WIDTH:
        return f"  {name}\n" + "".join(f"{'':<{NAME_WIDTH + 4}}{line}\n" for line in lines)
    return head + f"\n{'':<{NAME_WIDTH + 4}}".join(lines) + "\n"
