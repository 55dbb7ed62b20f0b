"""Convert the values of other trainers' options, where a concept differs from qwlit's.

Every function takes our setting, the typed value, and the values of all options found, by the function that reads them,
else by our setting, else by their name. It returns overrides and a remark in parentheses, or only a text.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from qwlit.core.files import resolve_path
from qwlit.core.lists import read_list
from qwlit.training.config import LoggerName

Others = Mapping[str, str]
LEAVE_OUT = "leave it out"
LOGGERS: tuple[str, ...] = get_args(LoggerName)
COLUMNS_OF_SWIFT = {"query": "prompt", "response": "completion"}
"""ms-swift's names of columns, and the keys that a format reads here."""
SHAREGPT = {"role": "from", "content": "value"}
"""Keys of a ShareGPT turn."""
NO_WHOLE_LOGITS = ("liger", "cut_cross_entropy")
"""Parts of the names of axolotl's plugins that save the memory of the logits."""
READ_WHOLE = ("columns_of_swift",)
"""Functions below that read a mapping."""


def quoted(override: str) -> str:
    """Put an override that a shell would split or expand into quotes."""
    return shlex.quote(override) if re.search(r"""[\s{}*?|&;<>()$"'#`!\\]""", override) else override


def read_mapping(text: str) -> dict[str, Any]:
    """Return the mapping that a text in YAML, JSON or Python holds; an empty one if it holds none."""
    try:
        value = yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def as_number(text: str) -> float | None:
    """Return the number, or None if the text is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _batch(ours: str, value: str, others: Others) -> str:
    """Return micro-batch and samples of a step, from the micro-batch of a device and the accumulation."""
    micro, accumulation = others.get("micro_batch"), others.get("accumulation")
    if micro is None:
        return f"train.global_batch_size = hardware.micro_batch_size x {accumulation} x devices"
    if accumulation is None:
        return f"hardware.micro_batch_size={micro} (train.global_batch_size has all samples of a step on all devices)"
    if not (micro.isdecimal() and accumulation.isdecimal()):
        return f"hardware.micro_batch_size={micro} (train.global_batch_size = {micro} x {accumulation} x devices)"
    size = int(micro) * int(accumulation)
    counts = [others.get(key, "") for key in ("hardware.devices", "hardware.num_nodes")]
    known = [int(count) for count in counts if count.isdecimal()]
    for count in known:
        size *= count
    on = "" if known else " (on one device, N times that on N)"
    return f"hardware.micro_batch_size={micro} train.global_batch_size={size}{on}"


def _betas(ours: str, value: str, others: Others) -> str:
    return f"optim.betas=[{others.get('beta1', '0.9')},{others.get('beta2', '0.999')}]"


def _model(ours: str, value: str, others: Others) -> str:
    is_folder = value.startswith((".", "/", "~")) or resolve_path(value).is_dir() or value.count("/") != 1
    return quoted(f"model.path={value}" if is_folder else f"model.hub_id={value}")


def _data(ours: str, value: str, others: Others) -> str:
    # ms-swift writes a number of rows behind the name: ORG/NAME#500.
    parts = [part.strip().partition("#") for part in value.strip("[]").split(",")]
    paths = [_data_path(name) for name, _, _ in parts]
    rows = f" data.max_samples={parts[0][2]}" if parts[0][2] else ""
    unknown = [path for path in paths if path.startswith("FILE_OF_")]
    registry = Path(others.get("dataset_dir", "data")) / "dataset_info.json"
    remark = f" (put the file there that {registry} names)" if unknown else ""
    return quoted(f"{ours}={paths[0]}" if len(paths) == 1 else f"{ours}=[{','.join(paths)}]") + rows + remark


def _data_path(name: str) -> str:
    """Return the path of a data set's name: a file as it is, ORG/NAME on the hub, else a placeholder."""
    if name.startswith(("/", ".", "~", "hf:")) or Path(name).suffix or resolve_path(name).exists():
        return name
    return f"hf:{name}" if name.count("/") == 1 else f"FILE_OF_{name}"


def _modules(ours: str, value: str, others: Others) -> str:
    names = re.findall(r"""[^\s,\[\]"']+""", value)
    return quoted(f"{ours}=[{','.join(names)}]")


def _folder(ours: str, value: str, others: Others) -> str:
    path = Path(value)
    return quoted(f"run.root={path.parent}") + " " + quoted(f"run.name={path.name}")


def _held_out(ours: str, value: str, others: Others) -> str:
    number = as_number(value)
    if number is None or number < 1:
        return f"{ours}={value}"
    return f"{ours}=0.05 (a share: divide {value} by the number of rows)"


def _steps(ours: str, value: str, others: Others) -> str:
    number = as_number(value)
    if number is None or number >= 1 or number == 0:
        return f"{ours}={value}"
    if ours == "scheduler.warmup_steps":
        return f"scheduler.warmup_ratio={value}"
    return f"give {ours} a number of steps, {value} of all steps"


def _min_lr(ours: str, value: str, others: Others) -> str:
    least, peak = as_number(value), as_number(others.get("optim.lr", ""))
    if least is None or not peak:
        return f"{ours} is the share of the peak, {value} / optim.lr"
    return f"{ours}={least / peak:.4g}"


def _device(ours: str, value: str, others: Others) -> str:
    name, _, number = value.partition(":")
    name = "cuda" if name == "gpu" else name
    return f"{ours}={name}" + (f" (choose the device with CUDA_VISIBLE_DEVICES={number})" if number else "")


def _loggers(ours: str, value: str, others: Others) -> str:
    names = read_list(value) if value.startswith("[") else [name.strip() for name in value.split(",")]
    if unknown := [name for name in names if name not in LOGGERS]:
        return f"not in this version: there is no logger {unknown[0]}, but {', '.join(LOGGERS)}"
    return f"logger={names[0]}" if len(names) == 1 else quoted(f"logger.use=[{','.join(names)}]")


def _columns_of_swift(ours: str, value: str, others: Others) -> str:
    # Their column comes first, and query and response have other names here.
    renamed = {COLUMNS_OF_SWIFT.get(key, key): column for column, key in read_mapping(value).items()}
    if not renamed:
        return f"give {ours} our key first, '{ours}={{instruction: question}}'"
    return quoted(f"{ours}={{{', '.join(f'{key}: {column}' for key, column in renamed.items())}}}")


def _turn_keys(ours: str, value: str, others: Others) -> str:
    keys = read_mapping(value)
    if keys and all(column in (key, SHAREGPT.get(key)) for key, column in keys.items()):
        return LEAVE_OUT
    return "not in this version: rename the keys inside of messages to role and content"


def _messages(ours: str, value: str, others: Others) -> str:
    if value == "messages" or (value == "conversations" and "from" in others.get("turn_keys", "")):
        return LEAVE_OUT
    return quoted(f"data.columns={{messages: {value}}}")


def _plugins(ours: str, value: str, others: Others) -> str:
    if all(any(part in name.lower() for part in NO_WHOLE_LOGITS) for name in read_list(value)):
        return "not needed: the head computes only supervised tokens and never holds all logits"
    return "not in this version: convert the rows to one of the formats in docs/data.md"


READERS: dict[str, Callable[[str, str, Others], str]] = {
    "micro_batch": _batch,
    "accumulation": _batch,
    "beta1": _betas,
    "beta2": _betas,
    "model": _model,
    "data": _data,
    "modules": _modules,
    "folder": _folder,
    "held_out": _held_out,
    "steps": _steps,
    "min_lr": _min_lr,
    "device": _device,
    "loggers": _loggers,
    "columns_of_swift": _columns_of_swift,
    "turn_keys": _turn_keys,
    "messages": _messages,
    "plugins": _plugins,
}
