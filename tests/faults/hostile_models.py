"""Model folders and adapters of somebody else."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.artefacts import (
    CANARY,
    CODE,
    ESCAPES,
    INSPECT,
    PLAN,
    SMALL,
    TRAIN,
    Artefact,
    Canary,
    all_of,
    change,
    link,
    nested,
    write,
)

CONFIG, TOKENIZER, SETTINGS = "model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"
WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
ADAPTER = "adapter/adapter_config.json"
ADAPTED = ["plan", *SMALL, "recipe=lora", "adapter.rank=4", "adapter.alpha=8", "model.path=model"]
TOKENIZING = [*INSPECT, "model.tokenizer=model"]
BASED = [*ADAPTED[:-1], "model.path=adapter"]
ON_ADAPTER = [*ADAPTED, "model.adapter_path=adapter"]


def in_config(says: str | None, **entries: Any) -> Artefact:
    return Artefact(PLAN, change(CONFIG, **entries), says)


def in_adapter(says: str | None, **entries: Any) -> Artefact:
    return Artefact(ON_ADAPTER, change(ADAPTER, **entries), says)


def templated(template: str, says: str | None) -> Artefact:
    """A chat template that does something else than to write a conversation."""
    words = [*INSPECT, "model.tokenizer=model", "data.template=auto"]
    return Artefact(words, all_of(change(SETTINGS, chat_template=template), _remove_jinja), says)


def _remove_jinja(place: Path) -> None:
    (place / "model/chat_template.jinja").unlink(missing_ok=True)


def unpickled(name: str, *, keep_weights: bool) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        if not keep_weights:
            (place / WEIGHTS).unlink()
        torch.save({"weight": Canary()}, place / name)

    return make


def header(value: Any, length: int | None = None, data: bytes = bytes(64)) -> Callable[[Path], object]:
    """Replace the weights by a safetensors file with this header; `length` is what the file says of its length."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return write(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def renamed_tensor(name: str) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        tensors[name] = tensors.pop(min(tensors))
        save_file(tensors, place / WEIGHTS)

    return make


def indexed(weight_map: Any) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        (place / WEIGHTS).rename(place / "elsewhere.safetensors")
        (place / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return make


def tokenizer_with(says: str | None, **entries: Any) -> Artefact:
    words = TOKENIZING
    return Artefact(words, change(TOKENIZER, **entries), says)


WEIGHT_FILES = {
    "only a pickle": Artefact(TRAIN, unpickled("model/pytorch_model.bin", keep_weights=False), "only pickled weights"),
    "a pickle beside the weights": Artefact(TRAIN, unpickled("model/pytorch_model.bin", keep_weights=True)),
    "a pickle named .pt": Artefact(TRAIN, unpickled("model/consolidated.00.pt", keep_weights=False), "has no weights"),
    "a pickle named .safetensors": Artefact(TRAIN, unpickled(WEIGHTS, keep_weights=True), "damaged"),
    "an older pickle named .safetensors": Artefact(TRAIN, write(WEIGHTS, pickle.dumps(Canary())), "damaged"),
    "an index that names a pickle": Artefact(
        TRAIN, all_of(indexed({"a": "w.bin"}), unpickled("model/w.bin", keep_weights=True)), "damaged"
    ),
    "an index that leaves the folder": Artefact(TRAIN, indexed({"a": "../elsewhere.safetensors"}), INDEX),
    "an index that names a file of the system": Artefact(TRAIN, indexed({"a": "/etc/passwd"}), INDEX),
    "an index that names a device": Artefact(TRAIN, indexed({"a": "/dev/zero"}), INDEX),
    "an index of numbers": Artefact(TRAIN, indexed({"a": 7}), INDEX),
    "an index of lists": Artefact(TRAIN, indexed({"a": ["x"]}), INDEX),
    "an index that is a list": Artefact(TRAIN, indexed(["x"]), INDEX),
    "an index with an escape": Artefact(TRAIN, indexed({"a": ESCAPES}), INDEX),
    "an index with a null byte": Artefact(TRAIN, indexed({"a": "w\0.safetensors"}), INDEX),
    "a header of 100 GB": Artefact(TRAIN, header({}, 10**11), "damaged"),
    "a header of 2^64 bytes": Artefact(TRAIN, header({}, 2**64 - 1), "damaged"),
    "a header of 90 MB": Artefact(TRAIN, header(b'{"a":"' + b"x" * 9 * 10**7 + b'"}'), "damaged"),
    "a nested header": Artefact(TRAIN, header(nested(10**5).encode()), "damaged"),
    "a header that is a list": Artefact(TRAIN, header([1, 2]), "damaged"),
    "tensors that overlap": Artefact(TRAIN, header({"a": tensor(0, 64, [16]), "b": tensor(0, 64, [16])}), "damaged"),
    "a tensor behind the end": Artefact(TRAIN, header({"a": tensor(0, 2**40, [2**38])}), "damaged"),
    "a tensor before the start": Artefact(TRAIN, header({"a": tensor(-64, 0, [16])}), "damaged"),
    "a shape that overflows": Artefact(TRAIN, header({"a": tensor(0, 64, [2**63, 2**63])}), "damaged"),
    "a dtype of nobody": Artefact(TRAIN, header({"a": tensor(0, 64, [16], "os.system")}), "damaged"),
    "a tensor with a path as its name": Artefact(TRAIN, renamed_tensor("../../x"), "disagree"),
    "a tensor with an escape in its name": Artefact(TRAIN, renamed_tensor(ESCAPES), "disagree"),
    "a tensor with two lines in its name": Artefact(TRAIN, renamed_tensor("a\nqwlit train: done"), "disagree"),
}

CODE_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
NOT_BUILT = "no model can be built"
CONFIGS = {
    "a config that names code": Artefact(
        TRAIN, all_of(change(CONFIG, auto_map=CODE_MAP, trust_remote_code=True), write("model/evil.py", CODE))
    ),
    "a config that names code on the hub": in_config(None, auto_map={"AutoConfig": "evil/repo--evil.Config"}),
    "a config that names a kernel on the hub": in_config(None, _attn_implementation="evil/kernels"),
    "a config that names another kernel": in_config(None, attn_implementation="evil/kernels:attack", use_kernels=True),
    "a config with a type of nobody": in_config("qwlit trains", model_type="../../evil"),
    "a config whose type is a list": in_config("qwlit trains", model_type=["qwen3"]),
    "a config with an escape": in_config("qwlit trains", model_type=ESCAPES),
    "a config whose architecture is code": in_config("qwlit trains", architectures=["os.system"]),
    "a config whose dtype is code": in_config("dtype", dtype="os.system"),
    "a config whose dtype is a list": in_config("dtype", torch_dtype=["float32"]),
    "a config with a quantizer": in_config("quantized", quantization_config={"quant_method": "evil", "modules": "os"}),
    "a config with a quantizer that is a text": in_config("quantized", quantization_config="evil"),
    "a config of 10^30 columns": in_config("hidden_size", hidden_size=10**30),
    "a config of a billion layers": in_config("num_hidden_layers", num_hidden_layers=10**9),
    "a config of minus one layer": in_config("num_hidden_layers", num_hidden_layers=-1),
    "a config of half a head": in_config("config.json", num_attention_heads=0.5),
    "a config whose size is a text": in_config("config.json", hidden_size="64"),
    "a config whose size is an object": in_config("config.json", intermediate_size={"a": 1}),
    "a config whose head_dim is huge": in_config(NOT_BUILT, head_dim=2**60),
    "a config whose head_dim is 0": in_config("config.json", head_dim=0),
    "a config whose eps is a text": in_config("config.json", rms_norm_eps="1e-6; import os"),
    "a config with a rope of nobody": in_config("rope", rope_scaling={"type": "evil", "factor": 2.0}),
    "a config with a rope of another kind": in_config(NOT_BUILT, rope_parameters={"rope_type": "yarn", "factor": {}}),
    "a config with a long rope": in_config(NOT_BUILT, rope_scaling={"rope_type": "linear", "factor": "x" * 999}),
    "a config with layers of another kind": in_config("layer_types", layer_types=[{"a": 1}]),
    "a config with an activation of nobody": in_config(NOT_BUILT, hidden_act="os.system"),
    "a config with an activation that is a list": in_config("config.json", hidden_act=["ClippedGELUActivation", {}]),
    "a config with tied weights of another kind": in_config("config.json", tie_word_embeddings="no"),
    "a config with hooks": in_config(None, _name_or_path="https://example.org/x", id2label={"0": "x"}, to_dict=1),
    "a config with a plan of another kind": in_config(NOT_BUILT, base_model_tp_plan=1),
    "a nested config": Artefact(PLAN, write(CONFIG, '{"a":' + nested(10**5) + "}"), "config.json"),
    "a config with a number of 10^6 digits": Artefact(PLAN, write(CONFIG, '{"a":' + "9" * 10**6 + "}"), "config.json"),
    "a config that is no UTF-8": Artefact(PLAN, write(CONFIG, b"\xff\xfe{}"), "config.json"),
    "a config that is a device": Artefact(PLAN, link(CONFIG, "/dev/zero"), "config.json"),
    "a config that is this process": Artefact(PLAN, link(CONFIG, "/proc/self/environ"), "config.json"),
}

OS = "__init__.__globals__.os.mkdir('" + CANARY + "')"
TEMPLATES = {
    "a template that calls cycler": templated("{{ cycler." + OS + " }}", "template"),
    "a template that calls lipsum": templated(f"{{{{ lipsum.__globals__['os'].mkdir('{CANARY}') }}}}", "template"),
    "a template that calls joiner": templated("{{ joiner." + OS + " }}", "template"),
    "a template that calls namespace": templated("{{ namespace." + OS + " }}", "template"),
    "a template that walks the classes": templated(
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c.__init__.__globals__ }}{% endfor %}", "template"
    ),
    "a template that asks for attributes": templated("{{ messages|attr('__class__')|attr('__mro__') }}", "template"),
    "a template that formats": templated("{{ '{0.__class__.__mro__}'.format(messages) }}", "template"),
    "a template that formats a map": templated("{{ '{m.__class__}'.format_map({'m': messages}) }}", "template"),
    "a template that formats by a filter": templated("{{ '{0.__class__}'|format(messages) }}", "template"),
    "a template that looks at itself": templated("{{ self.__init__.__globals__ }}", "template"),
    "a template that looks at the function": templated("{{ raise_exception.__globals__ }}", "template"),
    "a template that includes a file": templated("{% include '/etc/passwd' %}", "template"),
    "a template that imports a file": templated("{% import 'os' as os %}{{ os }}", "template"),
    "a template that extends a file": templated("{% extends '../../x' %}", "template"),
    "a template that changes its input": templated("{% do messages.clear() %}{{ messages.pop() }}", "template"),
    "a template without an end": templated("{% for i in range(10**12) %}x{% endfor %}", "template"),
    "a template that multiplies a text": templated("{{ 'a' * 10**10 }}", "template"),
    "a template that raises a power": templated("{{ 10**10**10 }}", "template"),
    "a template that calls itself": templated("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "template"),
    "a template that raises an escape": templated(
        "{{ raise_exception('" + ESCAPES.replace("\x1b", "\\x1b") + "') }}", "template"
    ),
    "a template that is a list": templated([{"name": "default", "template": "{{ cycler." + OS + " }}"}], "template"),  # type: ignore[arg-type]
    "a template that is a number": templated(7, "template"),  # type: ignore[arg-type]
    "a template that is this process": Artefact(
        TOKENIZING, link("model/chat_template.jinja", "/proc/self/environ"), "is empty"
    ),
}

TOKENIZERS = {
    "a tokenizer that names code": Artefact(
        TOKENIZING,
        all_of(change(SETTINGS, auto_map=CODE_MAP, tokenizer_class="Evil"), write("model/evil.py", CODE)),
    ),
    "a tokenizer with a class of another kind": Artefact(
        TOKENIZING, change(SETTINGS, tokenizer_class=["os", "system"]), "tokenizer"
    ),
    "a tokenizer with an end token of another kind": Artefact(
        TOKENIZING, change(SETTINGS, eos_token={"__type": "Evil", "content": 7}), "tokenizer"
    ),
    "a tokenizer with an escape in its end token": Artefact(
        TOKENIZING, change(SETTINGS, eos_token=ESCAPES), "521 tokens"
    ),
    "tokenizer settings that are a list": Artefact(TOKENIZING, write(SETTINGS, "[1]"), "tokenizer"),
    "nested tokenizer settings": Artefact(TOKENIZING, write(SETTINGS, '{"a":' + nested(10**5) + "}"), "tokenizer"),
    "a tokenizer with a normalizer that grows": tokenizer_with(
        None, normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10**5}
    ),
    "a tokenizer with a vocabulary that is a list": tokenizer_with("tokenizer", model=["x"]),
    "a tokenizer with an id of 10^12": tokenizer_with(
        None, added_tokens=[{"id": 10**12, "content": "<x>", "special": True}]
    ),
    "a nested tokenizer": Artefact(TOKENIZING, write(TOKENIZER, '{"model":' + nested(10**5) + "}"), "tokenizer"),
    "a tokenizer with a list of merges that is this process": Artefact(
        TRAIN, link("model/merges.txt", "/proc/self/environ"), "is empty"
    ),
    "a tokenizer with other templates that are all files": Artefact(
        TRAIN, link("model/additional_chat_templates", "/etc")
    ),
    "a tokenizer beside a config of another kind": Artefact(
        TOKENIZING, change(CONFIG, model_type=["qwen3"]), "cannot be read"
    ),
    "a tokenizer that is no JSON": Artefact(TOKENIZING, write(TOKENIZER, pickle.dumps(Canary())), "tokenizer"),
}

ADAPTERS = {
    "an adapter with a pickle": Artefact(
        ON_ADAPTER,
        all_of(
            lambda place: (place / "adapter/adapter_model.safetensors").unlink(),
            unpickled("adapter/adapter_model.bin", keep_weights=True),
        ),
        "adapter_model",
    ),
    "an adapter whose base is above": Artefact(BASED, change(ADAPTER, base_model_name_or_path="../.."), "config.json"),
    "an adapter whose base is a page": Artefact(
        BASED, change(ADAPTER, base_model_name_or_path="https://example.org/x"), "base"
    ),
    "an adapter whose base is on the hub": Artefact(
        BASED, change(ADAPTER, base_model_name_or_path="evil/model"), "evil/model"
    ),
    "an adapter whose base is a list": Artefact(BASED, change(ADAPTER, base_model_name_or_path=["x"]), "base"),
    "an adapter whose base is an escape": Artefact(BASED, change(ADAPTER, base_model_name_or_path=ESCAPES), "base"),
    "an adapter whose base has a null byte": Artefact(BASED, change(ADAPTER, base_model_name_or_path="a\0b"), "base"),
    "an adapter whose base is nobody's home": Artefact(
        BASED, change(ADAPTER, base_model_name_or_path="~nobody-here/x"), "no such user"
    ),
    "an adapter that names a module": Artefact(
        ON_ADAPTER,
        all_of(change(ADAPTER, megatron_config={"a": 1}, megatron_core="evil"), write("evil.py", CODE)),
        "megatron",
    ),
    "an adapter that maps to code": in_adapter(
        None, auto_mapping={"base_model_class": "system", "parent_library": "os"}
    ),
    "an adapter of a type of nobody": in_adapter("qwlit reads LoRA", peft_type="../../EVIL"),
    "an adapter whose targets are a long pattern": in_adapter(None, target_modules="(a+)+" * 20 + "$"),
    "an adapter whose alpha pattern repeats": in_adapter("alpha_pattern", alpha_pattern={"(a+)+$": 2}),
    "an adapter whose alpha pattern is a list": in_adapter("alpha_pattern", alpha_pattern=["x"]),
    "an adapter of rank 10^12": in_adapter("adapter", r=10**12),
    "an adapter whose rank is a text": in_adapter("adapter", r="os.system"),
    "an adapter whose alpha is an object": in_adapter("adapter", lora_alpha={"a": 1}),
    "an adapter whose start changes the base": in_adapter("init_lora_weights", init_lora_weights="pissa_niter_10000"),
    "an adapter that repeats layers": in_adapter("layer_replication", layer_replication=[[0, 10**9]]),
}

MODELS = WEIGHT_FILES | CONFIGS | TEMPLATES | TOKENIZERS | ADAPTERS
