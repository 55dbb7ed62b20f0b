"""The `--help` texts of the subcommands, built from the settings' dataclasses so that they are never out of date."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

WIDTH = 110
NAME_WIDTH = 38

INSPECT = """\
python -m qwlit inspect [output=text|json] [sample=N] [group=choice ...] [key=value ...]

Shows what `train` with the same overrides would train on: the supervised tokens (green, or in [[ ]] without colours),
lengths, packing of the first steps, and quarantined rows with their reasons. Trains nothing. Needs no GPU and no
weights, only the tokenizer.

  inspect experiment=demo
  inspect data.path=chat.jsonl model.path=FOLDER sample=3        one sample, token by token
  inspect data.path=chat.jsonl output=json                       one line per sample: sample, input_ids, loss_mask,
                                                                 num_supervised_tokens; the rest goes to stderr
"""

PLAN = """\
python -m qwlit plan [output=text|json] [mfu=0.4] [group=choice ...] [key=value ...]

Says what `train` with the same overrides would do, without training: parameters, memory by component against the
device's memory, micro-batches, steps, schedule, time, and the preflight findings. It takes the devices from a GPU's
hardware profile, not from this machine, and needs no GPU, no weights and no network. What depends on data or
tokenizer is "not checked" if they are not available.

  plan hardware=a100x4 recipe=full_sft
  plan hardware=rtx4090 recipe=qlora model=qwen2_5_7b data.path=chat.jsonl
  plan hardware=h100 mfu=0.5                                     the time at half of the devices' peak
  plan hardware=a100 output=json                                 for scripts
"""

SUBMIT = """\
python -m qwlit submit [dry_run=true] [seeds=[0,1,2]|repeats=N] [slurm.key=value ...] [group=choice ...] [key=value ...]
python -m qwlit submit sweep=NAME|FILE trials=N tasks=N [dry_run=true] [key=value ...]

Writes the Slurm job that runs `train` with the same overrides, and passes it to sbatch. Nodes, tasks, GPUs, cores and
memory follow from the hardware profile. Before its time limit, or when Slurm preempts it, the job saves a checkpoint
and is requeued; the same run resumes, until it is done.

  submit hardware=a100x4 recipe=full_sft slurm.partition=gpu slurm.time=12:00:00
  submit hardware=a100x4 recipe=full_sft dry_run=true                    print the file, submit nothing
  submit hardware=a100 recipe=lora seeds=[0,1,2]                         an array: one run per seed
  submit hardware=a100 recipe=lora repeats=3                             the same: N seeds, from `seed` on
  submit sweep=lora trials=20 tasks=4 hardware=a100 data.path=…          a sweep whose trials four tasks share

If partition, account and set-up lines are always the same, keep them in a file: slurm=NAME (see docs/slurm.md).
"""

SWEEP = """\
python -m qwlit sweep sweep=NAME|FILE [backend=wandb|optuna] [trials=N] [agents=N|jobs=N] [key=value ...]
python -m qwlit sweep sweep=NAME|FILE action=best [run.name=… run.root=…]
python -m qwlit sweep action=find_lr|pilot [key=value ...]
python -m qwlit sweep action=repeat [repeats=5] [key=value ...]

Searches for settings. Every trial is an ordinary run of `train`. Its overrides are those of the sweep file, then those
typed here, then the values being tried. Both backends read the same file, in W&B's format. The same command resumes an
interrupted sweep.

  sweep sweep=lora data.path=chat.jsonl data.val_fraction=0.05                   W&B: creates the sweep, starts agents
  sweep sweep=lora backend=optuna trials=20 jobs=2 data.path=… data.val_fraction=0.05    no account, no server
  sweep sweep=presets backend=optuna                                             the guide's four settings, once each
  sweep sweep=lora action=best                                                   the best trial as an experiment file
  sweep action=find_lr recipe=lora data.path=chat.jsonl                          a learning-rate range test
  sweep action=pilot recipe=full_sft data.path=chat.jsonl                        short runs at 1/3, 1 and 3 x optim.lr
  sweep action=repeat repeats=5 recipe=lora data.path=chat.jsonl                 five seeds, and how far they differ

  sweep=    {sweeps}; or the path of a file
  trials=   number of trials in all; a grid needs none
  agents=   wandb: number of agents to start here, by default one per GPU; 0 prints how to start them
  jobs=     optuna: trials that run at the same time, by default one per GPU. Several machines that share the folder
            may run the same command

The sweep's folder is run.root/NAME (or run.root/run.name): sweep.json, and one run per trial.
"""

TRAIN = """\
python -m qwlit train [group=choice ...] [key=value ...]

Trains a model. The same command resumes an unfinished run of the same name.

  train experiment=demo                                          two minutes, no network, no GPU
  train hardware=a100x4 recipe=full_sft                          four A100s, Qwen3-0.6B from the hub
  train model.path=FOLDER data.path=chat.jsonl data.val_fraction=0.05 recipe=lora
  train config=runs/NAME/config.yaml run.name=again              an earlier run's settings
  train ... --cfg job                                            print the settings, train nothing
"""


VERIFY = """\
python -m qwlit verify [repeats=3] [steps=20] [group=choice ...] [key=value ...]
python -m qwlit verify run=RUN [steps=20] [key=value ...]

Trains the first steps several times, each time in a fresh process, and compares samples, loss, gradient norm and
weights of every step bit by bit. Writes certificate.json and certificate.txt into run.root/NAME-verify. Exit code 4:
they differ.

  verify experiment=demo                                       three times 20 steps
  verify determinism=reproducible recipe=lora model.path=FOLDER data.path=chat.jsonl repeats=5
  verify run=NAME                                              repeats a run's first steps, and compares with its trace

  repeats=  how many processes train; with run= 1, because the run itself is the first
  steps=    how many steps each of them trains, with the schedule of the whole run
  run=      a run with trace.jsonl (determinism=reproducible or strict, or trace.every_steps): a name under run.root, or
            a path; settings typed beside it replace the run's own
"""

DIFF = """\
python -m qwlit diff a=RUN b=RUN [replay=true|false] [output=text|json]

Says in which step two runs differ first, and in what: samples, loss, gradient norm or weights. Runs with trace.jsonl
(determinism=reproducible or strict, or trace.every_steps) are compared bit by bit, others by their logged numbers. Also
names what their manifests and settings do not share: versions, threads, attention, precision, seed, data.

Then it trains both again from their newest checkpoints before that step, each with its own settings and number of
threads, and names the first module whose output or gradient differs, how far, and at which token. The runs stay as they
are. Exit code 4: they differ.

  diff a=lora-1 b=lora-2                         names under run.root, or paths
  diff a=lora-1 b=lora-2 replay=false            without training

  run.root= folder that contains the runs, by default runs
  replay=   false: do not train
  output=   text, or json
"""

GENERATE = """\
python -m qwlit generate run=RUN | model.path=FOLDER [prompt=TEXT | prompts=FILE output=FILE.jsonl] [setting=value ...]

Talks to a trained model in the terminal; also spelled chat. A run answers with its best checkpoint, while it still
trains with its newest. Adapters need not be merged.

  generate run=demo                              a conversation
  generate run=demo prompt='...'                 one answer
  generate run=runs/x/checkpoints/step-000100    the weights of this checkpoint
  generate model.path=FOLDER generation=thinking model.path also takes the folder of an adapter
  generate run=x prompts=test.jsonl output=answers.jsonl   every prompt of a file, in any format of the training data

  run            name under run.root, or path, of a run or of one of its checkpoints
  prompt         a question; without prompt and prompts you are asked
  prompts        file with prompts; an answer in a row becomes `expected` in the output. A .txt file is one prompt
  output         JSON lines: messages, answer, thinking, ended, expected; an earlier file is replaced
  show_thinking  true, the default: print thinking dimmed; false: do not print it

generation=non_thinking and generation=thinking have the sampling values that Qwen recommends; seed=N repeats answers.
"""

EXPORT = """\
python -m qwlit export run=RUN | model.path=BASE model.adapter_path=ADAPTER output=FOLDER [option=value ...]

Writes a trained model as a folder for transformers, vLLM and llama.cpp, and proves it: a fresh process with plain
transformers must compute the same logits and greedy answers, end its answers, and render the same tokens. PROOF.json
has the numbers, README.md says what the model is. Also spelled merge. Exit code 4: it is not the same model.

  export run=x                                   LoRA and QLoRA merged into the base: runs/x/export-merged
  export run=x adapter=keep                      the adapter for peft: runs/x/export
  export run=runs/x/checkpoints/step-000100 output=step-100
  export model.path=BASE model.adapter_path=ADAPTER output=FOLDER

  run             name under run.root, or path, of a run or of one of its checkpoints; a run exports its best checkpoint
  output          folder to write; it replaces an earlier export, and nothing else
  adapter         merge: add the adapter to the base's own weights, also those of QLoRA; keep: leave it an adapter
  dtype           auto: the base's; bfloat16, float16, float32
  max_shard_size  largest size of one file, by default 5GB
  prove           false: write the folder only

In float32, logits may differ by 1e-5 of the largest one; with weights or products in 16 bits, by 2e-2.
"""

EVALUATE = """\
python -m qwlit evaluate run=RUN | run=[RUN,...] | model.path=FOLDER [data.path=FILE] [metrics=[...]] [setting=...]

Measures loss, perplexity, bits per byte and accuracy of the supervised tokens: of all rows, by file and by script.
Without data.path these are the validation rows of the run, with it all rows of the file. Several models are compared
sample by sample. Also spelled eval.

  evaluate run=demo                              the run's validation rows
  evaluate run=[a,b] data.path=test.jsonl        two runs on a file of your own
  evaluate run=demo metrics=[exact_match,rouge_l] prompts=200
  evaluate run=demo metrics=exact_match temperatures=default modes=[thinking,non_thinking]

  run           names under run.root, or paths, of runs and checkpoints; also model folders
  metrics       of the answers: exact_match, containment, rouge_l, bleu (needs sacrebleu), or a
                function of your own as module:function, called with the answer and the expected one
  prompts       most rows whose prompts are answered; by default 100
  temperatures  draw quality against temperature: a list, or default for 0.1 to 1.3
  repeats       answers with different seeds to each prompt; by default 1, with temperatures 3
  modes         thinking, non_thinking or both, each with its sampling values
  folder        where evaluation.json and the pictures go; by default evaluation. A run's newest evaluation also lies
                in its folder, and `report` shows it
  output        text, or json
"""

REPORT = """\
python -m qwlit report runs=[RUN,...] [baseline=RUN] [output=text|json] [page=FILE] [follow=true]

Compares runs, the best first: how their settings, results and events differ. Also writes report.html with curves and,
from four runs on, which settings mattered. Reads run folders and trains nothing.

  report runs=runs/demo                          one run: its curves, events and samples
  report runs=[runs/a,runs/b]                    how b differs from a in settings and results
  report 'runs=[runs/lora-*]' baseline=lora-2e-4 all runs with such a name, against one of them
  report runs=runs/lora                          a sweep: its trials, and which settings mattered
  report 'runs=[runs/*]' output=json             one JSON document for scripts; the page is written as well

  runs       run folders, sweep folders, their names in runs/, and globs: a list, or a single one
  baseline   name or folder of the run that the others are compared with; by default the first run named, or the best
             trial of a sweep
  output     text, or json
  page       file to write; by default report.html in the run's folder, the sweep's folder, or the common parent folder
             of all runs
  follow     true: write the page every 10 s until the runs end, or until Ctrl-C; a browser loads it again by itself

Prints a diagnosis of each run that shows a symptom, with overrides to try. Warns about runs that cannot be compared:
other validation data, device, precision or code. Of runs with other seeds it prints mean, deviation and 95 % confidence
interval, and whether other settings differ by more than the seeds do.
"""

INTROS = {
    "train": TRAIN,
    "plan": PLAN,
    "sweep": SWEEP,
    "submit": SUBMIT,
    "inspect": INSPECT,
    "verify": VERIFY,
    "diff": DIFF,
    "evaluate": EVALUATE,
    "generate": GENERATE,
    "export": EXPORT,
    "report": REPORT,
}
SETTINGS = {
    "submit": ("slurm.", "hardware.", "run.", "seed"),
    "inspect": ("data.", "model.", "run.root", "seed", "train.global", "hardware.micro"),
    "diff": (),
    "evaluate": (
        "generation.",
        "model.",
        "data.",
        "hardware.micro",
        "hardware.precision",
        "hardware.accelerator",
        "run.root",
        "seed",
    ),
    "generate": (
        "generation.",
        "model.",
        "data.system",
        "data.template",
        "hardware.precision",
        "hardware.accelerator",
        "run.root",
        "seed",
    ),
    "export": ("model.", "generation.", "hardware.precision", "hardware.accelerator", "run.root"),
    "report": (),
}
"""Subcommand → the settings in its help, by the beginning of their names; without an entry: all."""


def help_text(subcommand: str) -> str:
    """Return what `SUBCOMMAND --help` prints."""
    intro, prefixes = INTROS[subcommand], SETTINGS.get(subcommand, ("",))
    if subcommand == "sweep":
        from qwlit.tuning.sweep_file import sweep_names

        intro = intro.format(sweeps=", ".join(sweep_names()))
    replaced = "; run=NAME takes those of the run" if f"{subcommand} run=" in intro else ""
    return f"{intro}\n{_groups_and_settings(prefixes, replaced)}" if prefixes else intro


def _groups_and_settings(prefixes: tuple[str, ...], replaced: str) -> str:
    """Describe all groups, and the settings whose names begin with one of `prefixes`.

    Args:
        replaced: what replaces the defaults, if anything does.
    """
    from qwlit.config.compose import compose
    from qwlit.config.groups import group_options
    from qwlit.config.overrides import format_value

    groups = "".join(_entry(name, ", ".join(options)) for name, options in group_options().items())
    settings = "".join(
        _entry(f"{key}={format_value(value)}", doc)
        for key, value, doc in _fields(compose([]).config, "")
        if key.startswith(prefixes)
    )
    return (
        f"Groups: group=choice loads a file of settings\n{groups}\n"
        f"Settings: key=value, shown with their defaults{replaced}\n{settings}"
    )


def _fields(settings: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, default, help) of every field."""
    docstrings = _docstrings(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "architecture":
            continue
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, " ".join(docstrings.get(field.name, "").split())


def _docstrings(section: type[Any]) -> dict[str, str]:
    """Return the docstring of each field: the text in the source below it."""
    source = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(source, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in pairwise(source.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


def _entry(name: str, text: str) -> str:
    """Write a name and its text in two columns; the text of a long name begins in the next line."""
    margin = " " * (NAME_WIDTH + 4)
    wrapped = textwrap.fill(text, WIDTH, initial_indent=margin, subsequent_indent=margin)
    if len(name) > NAME_WIDTH:
        return f"  {name}\n{wrapped}\n"
    return f"  {name}{wrapped[len(name) + 2 :]}\n"
