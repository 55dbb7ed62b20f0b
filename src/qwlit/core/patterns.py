"""Patterns that select parameters by name, for optimizer groups, freezing and adapters.

A pattern is a kind (`bias`, `norm`, `embedding`, `head`, `attention`, `mlp`), a part of the dotted name (`q_proj`,
`layers.0`, `lora_A`), or a glob over the whole name (`model.layers.*.weight`). Names are Hugging Face's, as in
`model.layers.0.self_attn.q_proj.weight`.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from qwlit.core.errors import ConfigError, nearest

KINDS = ("bias", "norm", "embedding", "head", "attention", "mlp")


def is_kind(kind: str, name: str) -> bool:
    """Whether the parameter is of this kind (of `KINDS`); an attention layer's bias is both bias and attention."""
    owner = name.rpartition(".")[0].rpartition(".")[2]
    return {
        "bias": name.endswith(".bias"),
        "norm": owner.endswith("norm"),
        "embedding": ".embed_tokens." in f".{name}",
        "head": name.startswith("lm_head."),
        "attention": ".self_attn." in name,
        "mlp": ".mlp." in name,
    }[kind]


def matches(pattern: str, name: str) -> bool:
    if pattern in KINDS:
        return is_kind(pattern, name)
    return f".{pattern}." in f".{name}." or fnmatchcase(name, pattern)


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that a parameter belongs to; None if it belongs to none."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def top_layer(names: Iterable[str]) -> int:
    """Return the index of the highest decoder layer, -1 where there is none."""
    return max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)


def select(
    names: Iterable[str],
    pattern: str,
    *,
    field: str,
    layers: tuple[int, int] | None = None,
    top: int | None = None,
    things: str = "parameter",
) -> set[str]:
    """Return the names that match the pattern, in a range of layers where one is given.

    Args:
        field: the setting that holds the pattern, for the message.
        layers: first and last decoder layer, counted from 0.
        top: the model's highest layer; None: the highest in `names`.
        things: what the names stand for, for the message.

    Raises:
        ConfigError: no name matches, or the model has no such layers.
    """
    names = list(names)
    inside = names if layers is None else names_in_layers(names, layers, field=field, top=top)
    found = {name for name in inside if matches(pattern, name)}
    if not found:
        raise ConfigError(f"{field}: '{pattern}' matches no {things}{_where(layers)}.{_hint(pattern, names)}")
    return found


def names_in_layers(names: Iterable[str], layers: tuple[int, int], *, field: str, top: int | None = None) -> list[str]:
    """Return the names in a range of decoder layers, both ends included.

    Raises:
        ConfigError: the model has no such layers.
    """
    first, last = layers
    names = list(names)
    top = top_layer(names) if top is None else top
    if not first <= last <= top:
        raise ConfigError(f"{field}: layers [{first},{last}] are not a range of the model's layers, 0 to {top}")
    return [name for name in names if (layer := layer_of(name)) is not None and first <= layer <= last]


def _where(layers: tuple[int, int] | None) -> str:
    return "" if layers is None else f" in layers {layers[0]} to {layers[1]}"


def _hint(pattern: str, names: list[str]) -> str:
    if pattern == "head" and any(is_kind("embedding", name) for name in names):
        return " The head is tied to the embedding; use 'embedding'."
    known = {part for name in names for part in name.split(".") if not part.isdigit()} - {"weight", "model"}
    known |= {kind for kind in KINDS if any(is_kind(kind, name) for name in names)}
    known -= {pattern}
    return nearest(pattern, sorted(known)) or f" Known: {', '.join(sorted(known))}."
