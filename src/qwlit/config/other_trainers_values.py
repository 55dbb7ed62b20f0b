"""Convert the values of other trainers' options, where a concept differs from qwlit's.

Every function takes our setting, the typed value, and the values of all options found: by the function that reads them,
else by our setting, and by their name.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from qwlit.core.files import resolve_path

Others = Mapping[str, str]
COLUMNS_OF_SWIFT = {"query": "prompt", "response": "completion"}
"""ms-swift's names of columns, and the keys that a format reads here."""
COLUMNS_OF_REGISTRY = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""Likewise the names in LLaMA-Factory's dataset_info.json."""


@dataclass(frozen=True)
class Answer:
    """What to type instead of one or several options that set the same."""

    overrides: dict[str, str]
    remark: str = ""
    """About the overrides; without any, why there are none."""
    typed: tuple[str, ...] = ()
    """The options as typed."""
    is_weak: bool = False
    """Whether another answer with the same setting replaces this one."""

    def command(self) -> str:
        """Return the overrides as words of a shell."""
        # Quotes only around what a shell would split or expand.
        words = (f"{key}={value}" for key, value in self.overrides.items())
        return " ".join(shlex.quote(w) if re.search(r"""[\s{}*?|&;<>()$"'#`!\\]""", w) else w for w in words)

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.overrides and self.remark else self.remark
        return " ".join([*self.typed, "→"] * bool(self.typed) + [f"{self.command()}{remark}"])


def read_value(text: str) -> Any:
    """Return the value that a text in YAML, JSON or Python holds, or the text itself if it cannot be read."""
    try:
        return yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return text


def _batch(ours: str, value: str, others: Others) -> Answer:
    """Return micro-batch and samples of a step, from the micro-batch of a device and the accumulation."""
    micro, accumulation = others.get("micro_batch"), others.get("accumulation", "accumulation")
    if micro is None:
        return Answer({}, f"train.global_batch_size = hardware.micro_batch_size x {accumulation} x devices")
    counts = [others.get(key, "") for key in ("hardware.devices", "hardware.num_nodes")]
    known = [count for count in counts if count.isdecimal()]
    here = {"hardware.micro_batch_size": micro}
    if not (micro.isdecimal() and accumulation.isdecimal()):
        return Answer(here, f"train.global_batch_size = {micro} x {accumulation} x devices")
    here["train.global_batch_size"] = str(prod(map(int, [micro, accumulation, *known])))
    return Answer(here, "" if known else "on one device, N times that on N")


def _rank(ours: str, value: str, others: Others) -> Answer:
    # LLaMA-Factory's examples leave lora_alpha out; adapters here would be scaled by another factor.
    is_known = "adapter.alpha" in others or not value.isdecimal()
    remark = "" if is_known else f"adapter.alpha is 32 unless set, in LLaMA-Factory twice the rank, {2 * int(value)}"
    return Answer({ours: value}, remark)


def _betas(ours: str, value: str, others: Others) -> Answer:
    return Answer({ours: f"[{others.get('beta1', '0.9')},{others.get('beta2', '0.999')}]"})


def _model(ours: str, value: str, others: Others) -> Answer:
    is_folder = value.startswith((".", "/", "~")) or resolve_path(value).is_dir() or value.count("/") != 1
    return Answer({"model.path" if is_folder else "model.hub_id": value})


def _data(ours: str, value: str, others: Others) -> Answer:
    # ms-swift writes a number of rows behind the name: ORG/NAME#500.
    parts = [part.strip(" '\"").partition("#") for part in value.strip("[]").split(",")]
    folder = Path(others.get("dataset_dir", "data"))
    entries = _registry(folder)
    found = [_registered(entries[n], folder) if n in entries else (_data_path(n), {}) for n, _, _ in parts]
    paths = [path for path, _ in found]
    overrides = {ours: paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"}
    missing = any(path.startswith("FILE_OF_") for path in paths)
    remarks = [f"put the file there that {folder / 'dataset_info.json'} names"] if missing else []
    if any(columns != found[0][1] for _, columns in found):
        remarks.append("data.columns is the same for all sets, so rename the columns in the files")
    elif columns := found[0][1]:
        overrides["data.columns"] = _flow(columns)
    counts = {count for _, _, count in parts}
    if len(counts) > 1:
        remarks.append("data.max_samples is one number for all sets, so cut the files to these rows")
    elif counts != {""}:
        overrides["data.max_samples"] = counts.pop()
    return Answer(overrides, ", ".join(remarks))


def _registry(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the data sets in LLaMA-Factory's dataset_info.json in this folder; none if it cannot be read."""
    try:
        entries = json.loads(resolve_path(str(folder / "dataset_info.json")).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    usable = entries.items() if isinstance(entries, dict) else ()
    return {name: e for name, e in usable if isinstance(e, dict) and ("hf_hub_url" in e or "file_name" in e)}


def _registered(entry: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, str]]:
    """Return path and column map of a data set in dataset_info.json; a column with its usual name is left out."""
    split = f":{entry['split']}" if "split" in entry else ""
    hub = "/".join(["hf:" + str(entry.get("hf_hub_url")), *filter(None, [entry.get("subset")])]) + split
    path = hub if "hf_hub_url" in entry else str(folder / str(entry["file_name"]))
    keys = dict(COLUMNS_OF_REGISTRY)
    if (entry.get("tags") or {}).get("role_tag") == "role":
        del keys["messages"]
    given: dict[str, str] = entry.get("columns") or {}
    columns = {keys.get(name, name): str(column) for name, column in given.items()}
    return path, {key: column for key, column in columns.items() if key != column}


def _flow(columns: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{key}: {column}' for key, column in columns.items())}}}"


def _data_path(name: str) -> str:
    """Return the path of a data set's name: a file as it is, ORG/NAME on the hub, else a placeholder."""
    if name.startswith(("/", ".", "~", "hf:")) or Path(name).suffix or resolve_path(name).exists():
        return name
    return f"hf:{name}" if name.count("/") == 1 else f"FILE_OF_{name}"


def _list(ours: str, value: str, others: Others) -> Answer:
    items = re.findall(r"""[^\s,\[\]"']+""", value)
    return Answer({ours: f"[{','.join(items)}]"})


def _folder(ours: str, value: str, others: Others) -> Answer:
    return Answer({"run.root": str(Path(value).parent), "run.name": Path(value).name})


def _min_lr(ours: str, value: str, others: Others) -> Answer:
    try:
        return Answer({ours: f"{float(value) / float(others['optim.lr']):.4g}"})
    except (KeyError, ValueError, ZeroDivisionError):
        return Answer({}, f"{ours} is the share of the peak, {value} / optim.lr")


def _columns_of_swift(ours: str, value: str, others: Others) -> Answer:
    # Their column comes first, and query and response have other names here.
    columns = read_value(value)
    if not (columns and isinstance(columns, dict)):
        return Answer({}, f"give {ours} our key first, '{ours}={{instruction: question}}'")
    return Answer({ours: _flow({COLUMNS_OF_SWIFT.get(str(key), str(key)): column for column, key in columns.items()})})


READERS: dict[str, Callable[[str, str, Others], Answer]] = {
    "micro_batch": _batch,
    "accumulation": _batch,
    "rank": _rank,
    "beta1": _betas,
    "beta2": _betas,
    "model": _model,
    "data": _data,
    "list": _list,
    "folder": _folder,
    "min_lr": _min_lr,
    "columns_of_swift": _columns_of_swift,
}
