"""Read a saved peft adapter, and merge it into the model or load it to train it further.

Shapes: O rows of a layer's weight, I columns, R rank. LoRA's A is (R, I) and its B (O, R).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path
from qwlit.core.sharding import copy_own_slice, local, own_slice_range
from qwlit.model.config import AdapterConfig, ModelConfig
from qwlit.model.families.decoder import EMBEDDING, HEAD
from qwlit.model.folder import ADAPTER_CONFIG, WEIGHTS, check_folder, read_json_object
from qwlit.model.weight_files import describe_differences, first_few, read_shapes, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIELD = "model.adapter_path"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# peft's names have this prefix, because peft wraps the model.
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
SUPPORTED_CONFIG_KEYS = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "eva_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
}
"""Keys of peft's LoraConfig that this module reads, or that do not change what a saved adapter computes. If another key
has a value, the adapter is a form of LoRA that qwlit does not support."""
# Values of init_lora_weights. With the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) peft also changes the base model's
# weights when it loads the adapter.
INITS_WITHOUT_BASE_CHANGE = (None, True, False, "gaussian", "orthogonal", "eva")
MOST_REPEATS = 2
"""Signs of repetition in a pattern of layers: with nested or many ones, Python's matching takes exponential time."""
MERGE_WITH_PEFT = "merge it with peft (merge_and_unload) and give the merged folder as model.path"


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter as peft saved it."""

    folder: Path
    config: Mapping[str, Any]
    """adapter_config.json."""
    shapes: Mapping[str, list[int]]
    """The shapes of its tensors, by names without peft's prefix."""

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers that have LoRA matrices."""
        return [name.removesuffix(A) for name in self.shapes if name.endswith(A)]

    @property
    def replaced(self) -> list[str]:
        """Names of the tensors that replace a weight of the model (peft's modules_to_save and bias)."""
        return [name for name in self.shapes if not name.endswith((A, B, MAGNITUDE))]

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, float32, by names without peft's prefix.

        Raises:
            ConfigError: a tensor holds inf or NaN.
        """
        file = self.folder / ADAPTER_WEIGHTS
        tensors = {_plain_name(name): tensor[:].float() for name, tensor in read_tensors({file: None})}
        if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
            raise ConfigError(f"{file}: {bad} holds inf or NaN; the adapter is damaged, copy or train it again")
        return tensors

    def scale(self, layer: str) -> float:
        """Return the factor of B A: alpha / R, with rsLoRA alpha / sqrt(R)."""
        rank = self.shapes[layer + A][0]
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if _pattern_matches(key, layer)), self.config["lora_alpha"]
        )
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)


def _plain_name(name: str) -> str:
    """Return a saved tensor's name in the model, without the parts that peft's wrappers add."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _pattern_matches(pattern: str, layer: str) -> bool:
    """Whether a key of peft's alpha_pattern matches the layer: a regular expression for the end of the name."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def read_saved_adapter(path: str) -> SavedAdapter:
    """Read a peft folder's configuration and the shapes of its tensors.

    Raises:
        ConfigError: there is no such folder, a file is missing or damaged, or the adapter is not LoRA.
    """
    folder = resolve_path(path)
    check_folder(folder, FIELD)
    if (folder / "export" / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{FIELD}={folder} is a run of qwlit; its adapter is {FIELD}={folder / 'export'}")
    if (folder / WEIGHTS).is_file():
        raise ConfigError(f"{FIELD}={folder} is a whole model and no adapter; set model.path={folder}")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{FIELD}={folder} has no {ADAPTER_CONFIG}; give a folder that peft or qwlit saved an adapter in"
        )
    config = read_json_object(folder / ADAPTER_CONFIG)
    _check_form(folder, config)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = " (pickled weights can run code when read)" if (folder / "adapter_model.bin").is_file() else ""
        raise ConfigError(f"{FIELD}={folder} has no {ADAPTER_WEIGHTS}{pickled}; save it again with a current peft")
    shapes = read_shapes({folder / ADAPTER_WEIGHTS: None})
    saved = SavedAdapter(folder, config, {_plain_name(name): shape for name, shape in shapes.items()})
    _check_matrices(saved)
    return saved


def _check_form(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not LoRA, or a form of LoRA that this module does not read."""
    file = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{FIELD}={folder} is a {config.get('peft_type')} adapter, qwlit reads LoRA; {MERGE_WITH_PEFT}"
        )
    other = next((key for key, value in config.items() if value and key not in SUPPORTED_CONFIG_KEYS), None)
    if config.get("init_lora_weights", True) not in INITS_WITHOUT_BASE_CHANGE:
        other = "init_lora_weights"
    if other:
        said = f"{other}={config[other]} is a form of LoRA that qwlit does not read"
        raise ConfigError(f"{file}: {said}; {MERGE_WITH_PEFT}")
    if not _is_finite_number(config.get("lora_alpha")):
        raise ConfigError(f"{file}: lora_alpha is missing or no number; copy the folder again")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_finite_number, patterns.values())):
        raise ConfigError(f"{file}: alpha_pattern must map patterns to numbers; copy the folder again")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError) as error:
            raise ConfigError(f"{file}: alpha_pattern {pattern!r} is no regular expression: {error}") from None
        if len(re.findall(r"[*+?{]", pattern)) > MOST_REPEATS or re.search(r"\)[*+?{]", pattern):
            said = f"alpha_pattern {pattern!r} repeats too much for a layer's name"
            raise ConfigError(f"{file}: {said}; {MERGE_WITH_PEFT}")


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _check_matrices(saved: SavedAdapter) -> None:
    """Refuse an adapter in which a matrix has no partner, or one of another rank."""
    for name in saved.shapes:
        layer = name.removesuffix(A).removesuffix(B)
        if layer == name:
            continue
        a, b = saved.shapes.get(layer + A, []), saved.shapes.get(layer + B, [])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            said = f"{layer}: matrix A {a} is of another shape than B {b} needs"
            raise ConfigError(f"{saved.folder / ADAPTER_WEIGHTS}: {said}; copy the folder again")


def check_initial_adapter(model: "PreTrainedModel", config: ModelConfig, adapter: AdapterConfig) -> None:
    """Refuse model.adapter_path if it does not fit the model or the adapter.* settings.

    Args:
        model: on the meta device, with the adapters that the run trains.

    Raises:
        ConfigError: naming the tensors that differ, or the overrides to set.
    """
    if config.adapter_path is None:
        return
    saved = read_saved_adapter(config.adapter_path)
    if adapter.kind != "none":
        _check_same_settings(saved, adapter)
        expected = {saved_name(name): list(p.shape) for name, p in model.named_parameters() if "lora_" in name}
        _check_shapes(saved, saved.shapes, expected)
        return
    if model.config.tie_word_embeddings:
        _check_tied_weight(saved)
    weights = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    found = {name: saved.shapes[name] for name in saved.replaced}
    for layer in saved.layers:
        out = saved.shapes.get(layer + B, [0])[0]
        found[f"{layer}.weight"] = [out, saved.shapes[layer + A][1]]
    _check_shapes(saved, found, {name: weights[name] for name in found if name in weights})


def _check_tied_weight(saved: SavedAdapter) -> None:
    """Refuse an adapter that changes head and embedding differently, if they are one weight in the model."""
    changed = {*saved.replaced, *(f"{layer}.weight" for layer in saved.layers)} & {HEAD, EMBEDDING}
    if not changed:
        return
    if changed <= set(saved.replaced) and len(changed) == 2:
        tensors = saved.tensors()
        if torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            return
    raise ConfigError(
        f"{FIELD}={saved.folder} changes {' and '.join(sorted(changed))}, but the model's head is its embedding"
        f" (tie_word_embeddings); {MERGE_WITH_PEFT}"
    )


def _check_same_settings(saved: SavedAdapter, adapter: AdapterConfig) -> None:
    """Refuse settings that differ from the saved adapter's, because training continues with its matrices."""
    config = saved.config
    more = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += [layer for layer in saved.layers if f"{layer}.weight" in (HEAD, EMBEDDING)]
    merge = "recipe=full_sft merges it into the model and trains that"
    if more:
        raise ConfigError(
            f"{FIELD}={saved.folder} was trained with {', '.join(more)}, which adapter.* cannot express; {merge}"
        )
    has = {
        "adapter.rank": (config.get("r"), adapter.rank),
        "adapter.alpha": (config.get("lora_alpha"), adapter.alpha),
        "adapter.use_rslora": (bool(config.get("use_rslora")), adapter.use_rslora),
        "adapter.use_dora": (bool(config.get("use_dora")), adapter.use_dora),
    }
    targets = sorted({layer.rpartition(".")[2] for layer in saved.layers})
    typed = [f"{key}={str(saved_value).lower()}" for key, (saved_value, value) in has.items() if saved_value != value]
    if sorted(adapter.target_modules) != targets and not adapter.layers:
        typed.append(f"adapter.target_modules=[{','.join(targets)}]")
    if typed:
        raise ConfigError(f"{FIELD}={saved.folder} has other settings; to continue it, set {' '.join(typed)}; {merge}")


def _check_shapes(saved: SavedAdapter, found: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> None:
    differences = describe_differences(found, expected, unexpected="not in the model")
    if on_embedding := [name for name in found if "lora_embedding" in name and name not in expected]:
        differences = (
            f"{first_few(on_embedding)} are LoRA on the embedding, which qwlit does not read; {MERGE_WITH_PEFT}"
        )
    if differences:
        raise ConfigError(f"{FIELD}={saved.folder} does not fit the model. Tensors {differences}")


def saved_name(name: str) -> str:
    """Return the name under which peft saves a parameter of an adapter."""
    plain = name.replace(".default.weight", ".weight")
    return plain.removesuffix(".weight") if MAGNITUDE in plain else plain


def load_initial_adapter(model: "PreTrainedModel", config: ModelConfig) -> None:
    """Load model.adapter_path into the model, which may be sharded. The base weights must be loaded before.

    If the model has adapter layers, they get the saved matrices. Otherwise the adapter is merged into the float32
    weights.
    """
    if config.adapter_path is None:
        return
    saved = read_saved_adapter(config.adapter_path)
    with torch.no_grad():
        if not hasattr(model, "peft_config"):
            _merge(model, saved)
            return
        tensors = saved.tensors()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                copy_own_slice(parameter, tensors[saved_name(name)])


def _merge(model: "PreTrainedModel", saved: SavedAdapter) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = saved.tensors()
    for name in saved.replaced:
        copy_own_slice(parameters[name], tensors[name])
    for layer in saved.layers:
        weight = parameters[f"{layer}.weight"]
        merge_layer(local(weight), saved, layer, tensors, own_slice_range(weight))


def merge_layer(
    rows: Tensor, saved: SavedAdapter, layer: str, tensors: Mapping[str, Tensor], part: tuple[int, int]
) -> None:
    """Add scale * B A to rows of a weight. With DoRA (Liu et al. 2024), then scale each row to the saved magnitude.

    Args:
        rows: those that `part` names, the first and the one after the last.
        tensors: of the adapter.
    """
    first, end = part
    a, b = tensors[layer + A].to(rows.device), tensors[layer + B][first:end].to(rows.device)  # (R, I), (O, R)
    rows.add_(b @ a, alpha=saved.scale(layer))
    if layer + MAGNITUDE in tensors:
        lengths = tensors[layer + MAGNITUDE].flatten()[first:end].to(rows.device)
        rows.mul_((lengths / rows.norm(dim=1)).unsqueeze(1))
