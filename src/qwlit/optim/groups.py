"""Sort the trainable parameters into groups by learning rate, weight decay and algorithm, each into one group."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from qwlit.core.errors import ConfigError
from qwlit.core.patterns import is_kind, layer_of, select, top_layer
from qwlit.optim.config import GroupRule, OptimConfig
from qwlit.optim.kinds import OPTIMIZERS


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same learning rate, weight decay and algorithm."""

    name: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    algorithm: str
    """A key of OPTIMIZERS: optim.name, or adamw for the parameters that this optimizer does not train."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def plan_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[ParameterGroup]:
    """Sort the trainable parameters, with their Hugging Face names, into groups.

    Raises:
        ConfigError: a rule matches no parameter or sets no value, or lora_plus_ratio is set without LoRA.
    """
    parameters = dict(named_parameters)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    top = top_layer(parameters)
    rules = _rule_of(trained, config, top)
    if config.lora_plus_ratio != 1 and not any(map(_is_lora_b, trained)):
        raise ConfigError("optim.lora_plus_ratio is for LoRA's B matrices, but the model has none; use recipe=lora")
    groups: dict[tuple[str, float, float, str], ParameterGroup] = {}
    for name, parameter in trained.items():
        rule = rules.get(name)
        decays = not any(is_kind(kind, name) for kind in config.no_decay)
        weight_decay = config.weight_decay if decays else 0.0
        if rule is not None and rule.weight_decay is not None:
            weight_decay = rule.weight_decay
        title = _title(rule) if rule else "decay" if decays else "no_decay"
        if rule is None or rule.lr is None:
            title += _lr_suffix(name, config)
        key = (title, _peak_lr(name, rule, config, top), weight_decay, _algorithm(name, parameter, config))
        groups.setdefault(key, ParameterGroup(*key)).parameters[name] = parameter
    return list(groups.values())


def _rule_of(trained: dict[str, nn.Parameter], config: OptimConfig, top: int) -> dict[str, GroupRule]:
    """Return the first rule that matches, by the name of each parameter that a rule matches."""
    found: dict[str, GroupRule] = {}
    for index, rule in enumerate(config.groups):
        setting = f"optim.groups[{index}]"
        if rule.lr is None and rule.lr_multiplier is None and rule.weight_decay is None:
            raise ConfigError(f"{setting} sets nothing; give lr, lr_multiplier or weight_decay")
        if rule.lr is not None and rule.lr_multiplier is not None:
            raise ConfigError(f"{setting}: lr and lr_multiplier are both set; give one of them")
        names = select(trained, rule.match, layers=rule.layers, top=top, field=setting, things="trained parameter")
        if names <= found.keys():
            raise ConfigError(f"{setting}: earlier rules match all parameters of '{rule.match}'; move it up")
        found = dict.fromkeys(names, rule) | found
    return found


def _title(rule: GroupRule) -> str:
    return rule.match if rule.layers is None else f"{rule.match}, layers {rule.layers[0]}-{rule.layers[1]}"


def _lr_suffix(name: str, config: OptimConfig) -> str:
    """Return the part of a group's name that says which layer or matrix its learning rate is for."""
    suffix = ", LoRA B" if config.lora_plus_ratio != 1 and _is_lora_b(name) else ""
    if config.layer_lr_decay == 1:
        return suffix
    if is_kind("embedding", name):
        return f", embedding{suffix}"
    layer = layer_of(name)
    return suffix if layer is None else f", layer {layer}{suffix}"


def _peak_lr(name: str, rule: GroupRule | None, config: OptimConfig, top_layer: int) -> float:
    if rule is not None and rule.lr is not None:
        return rule.lr
    multiplier = rule.lr_multiplier if rule is not None and rule.lr_multiplier is not None else 1.0
    if config.layer_lr_decay != 1:
        layer = layer_of(name)
        # The embedding is below layer 0; the final norm and the head are above the top layer.
        height = layer if layer is not None else -1 if is_kind("embedding", name) else top_layer + 1
        multiplier *= config.layer_lr_decay ** (top_layer + 1 - height)
    if _is_lora_b(name):
        multiplier *= config.lora_plus_ratio
    return config.lr * multiplier


def _is_lora_b(name: str) -> bool:
    return ".lora_B." in name


def _algorithm(name: str, parameter: nn.Parameter, config: OptimConfig) -> str:
    return config.name if OPTIMIZERS[config.name].trains(name, parameter) else "adamw"
