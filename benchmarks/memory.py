"""Memory as `plan` counts it against memory as it is allocated: predicted, measured, error.

    python -m benchmarks.memory [parts=steps,sharded,runs]

steps: small models on CPU take real training steps while torch's profiler notes every allocation; what stood before the
step (weights, optimizer) is added by its size. At the shapes of Qwen3-0.6B and Qwen2.5-7B one forward pass runs on fake
tensors under autocast, and what autograd keeps is summed.

sharded: the shapes of 7B models on four devices under FSDP2 and bf16 autocast, with fake tensors and fake collectives:
every tensor that is alive in forward and backward passes of the first of the four ranks.

runs: whole trainings of the shape of Qwen2.5-0.5B by the command line, from a folder in bfloat16, with a validation,
two checkpoints, export and answers to prompts: the largest resident size of the process against the peak of `plan`.
Full fine-tuning needs 17 GiB.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.live_bytes import LiveBytes
from benchmarks.machine import describe
from qwlit.config.compose import compose
from qwlit.core.batch import MicroBatch
from qwlit.core.copies import Copies
from qwlit.data.batches import collate
from qwlit.model.activation_checkpointing import apply_activation_checkpointing
from qwlit.model.attention import register_attention
from qwlit.model.config import Execution
from qwlit.model.cpu import WORKSPACES
from qwlit.model.families import FAMILIES
from qwlit.model.loss_model import LossModel, build_loss_model, build_meta_model
from qwlit.model.presets import to_hf_config
from qwlit.model.shard import shard_model
from qwlit.optim.groups import plan_groups
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip
from qwlit.planning.memory.activations import activation_bytes
from qwlit.planning.memory.estimate import estimate_memory
from qwlit.planning.memory.state import MicroShape, ShardingAndPrecision
from qwlit.training.machine import resolve_machine

RESULTS = Path(__file__).parent / "results"
QWLIT = [sys.executable, "-m", "qwlit"]
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MIB = 2**20
# Shapes chosen after the formulas were written.
SHAPES = {
    "qwen3, 6 layers of 320": [
        *("model.architecture.hidden_size=320", "model.architecture.intermediate_size=896"),
        *("model.architecture.num_hidden_layers=6", "model.architecture.num_attention_heads=10"),
        *("model.architecture.num_key_value_heads=2", "model.architecture.vocab_size=6000"),
    ],
    "qwen2, 4 layers of 448, untied": [
        *("model.architecture.model_type=qwen2", "model.architecture.tie_word_embeddings=false"),
        *("model.architecture.hidden_size=448", "model.architecture.intermediate_size=1152"),
        *("model.architecture.num_hidden_layers=4", "model.architecture.num_attention_heads=7"),
        *("model.architecture.num_key_value_heads=1", "model.architecture.head_dim=64"),
        *("model.architecture.vocab_size=9000",),
    ],
}
WAYS = {
    "full": ["recipe=full_sft"],
    "LoRA": ["recipe=lora"],
    "QLoRA": ["recipe=qlora"],
    "freeze": ["recipe=freeze"],
    "full, dropout": ["recipe=full_sft", "dropout.feed_forward=0.1", "dropout.residual=0.1"],
    "full, sgd": ["recipe=full_sft", "optim=sgd"],
    "full, muon": ["recipe=full_sft", "optim=muon"],
    "full, padded": ["recipe=full_sft", "data.packing=false"],
    "full, strict": ["recipe=full_sft", "determinism=strict"],
}
POLICIES = ("none", "selective", "full", "offload")
LENGTHS, SUPERVISED, MICRO_BATCHES = [311, 97, 640, 205], 0.4, 2


@dataclass
class Row:
    """One line of the table, bytes."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


class _Samples:
    """Random samples of the given lengths, their ends supervised."""

    def lengths(self, ids: Any) -> Any:
        import numpy as np

        return np.array(LENGTHS, dtype=np.int32)[ids]

    def read(self, ids: Any) -> tuple[Any, Any]:
        import numpy as np

        rows, masks = [], []
        for index in ids:
            row = np.random.default_rng(index).integers(0, 500, LENGTHS[index]).astype(np.int32)
            mask = (np.arange(len(row)) >= (1 - SUPERVISED) * len(row)).astype(np.uint8)
            mask[0] = 0
            rows.append(row)
            masks.append(mask)
        return np.concatenate(rows), np.concatenate(masks)


def micro_batch(*, packing: bool) -> tuple[MicroBatch, MicroShape]:
    micro = collate(_Samples(), list(range(len(LENGTHS))), packing=packing, pad_id=0, filler=False)  # type: ignore[arg-type]
    widths = LENGTHS if packing else [max(LENGTHS)] * len(LENGTHS)
    pairs = float(sum(width**2 for width in widths))
    return micro, MicroShape(micro.input_ids.numel(), len(micro.targets), pairs, packing)


def compare(shape: list[str], way: list[str], policy: str) -> tuple[float, float]:
    """Return predicted and measured bytes of a training step."""
    words = ["model=demo", "hardware=cpu", "dropout=none", *shape, *way, f"hardware.activation_checkpointing={policy}"]
    config = compose(words).config
    machine = replace(
        resolve_machine(config.hardware, config.determinism, profile="cpu"),
        activation_checkpointing=policy,  # type: ignore[arg-type]
    )
    kernel: Any = "eager" if config.determinism == "strict" else "sdpa"
    execution = Execution(kernel, machine.activation_checkpointing, torch.float32, torch.float32)
    meta_model = build_meta_model(config.model, config.adapter, config.dropout, config.freeze)
    groups = plan_groups(meta_model.named_parameters(), config.optim)
    micro, size = micro_batch(packing=config.data.packing)
    estimate = estimate_memory(config, meta_model, groups, machine, execution, replace(size, accumulates=True))
    predicted = estimate.total - estimate.components["reserve"]
    model = build_loss_model(config.model, config.adapter, config.dropout, config.freeze, execution, seed=0)
    return predicted, _measured(model, config, micro)


def _measured(model: LossModel, config: Any, micro: MicroBatch) -> float:
    groups = plan_groups(model.causal_lm.named_parameters(), config.optim)
    optimizer = build_optimizer(groups, config.optim)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            (model(micro).loss_sum / 1000).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=True)
        set_clip_and_skip(optimizer, norm, 1.0, torch.zeros(()))
        optimizer.step()
        optimizer.zero_grad()

    WORKSPACES.clear()  # of another model
    step()  # makes the optimizer's state
    before = sum(_size(t) for t in _standing(model, optimizer)) + sum(map(_size, WORKSPACES.values()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = most = 0
    for event in sorted(_allocations(profile), key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def _allocations(profile: Any) -> Iterator[Any]:
    return (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def _standing(model: LossModel, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield state.absmax
            yield from (t for t in (getattr(state.state2, "absmax", None),) if t is not None)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Kept:
    """What autograd keeps: each storage once, by its shape."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[torch.Size, int]] = {}
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self.sizes[storage._cdata] = (tensor.shape, storage.nbytes())
            self._alive.append(tensor)
        return tensor


def compare_fake(words: list[str]) -> tuple[float, float]:
    """Return predicted and kept bytes of one forward pass of a large model's decoder under autocast."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = compose(["hardware=cpu", "dropout=none", *words]).config
    execution = Execution("sdpa", "none", torch.bfloat16, torch.bfloat16)
    sharding = ShardingAndPrecision("cpu", 1, 2)
    micro, size = micro_batch(packing=True)
    subject_model = build_meta_model(config.model, config.adapter, config.dropout, config.freeze)
    predicted = activation_bytes(subject_model, config.adapter, config.dropout, execution, sharding, size).after_forward
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LossModel(_as_fake(subject_model, execution.frozen_dtype), "sdpa").train()
        return predicted, kept_by_forward(model, micro)


def kept_by_forward(model: LossModel, micro: MicroBatch) -> float:
    """Return the bytes that autograd keeps of a forward pass of the decoder, with fake tensors, under autocast."""
    kept = _Kept()
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.causal_lm.model(
            input_ids=micro.input_ids,
            position_ids=micro.position_ids,
            use_cache=False,
            attention_kernel=model.attention,
            cu_seqlens=micro.cu_seqlens,
            max_seqlen=micro.max_seqlen,
            document_lengths=None if model.attention == "varlen" else micro.document_lengths,
            label_positions=micro.label_positions,
        )
    # Autocast's copies of the weights are a component of their own.
    weights = {tuple(sorted(p.shape)) for p in model.parameters()}
    return float(sum(size for shape, size in kept.sizes.values() if tuple(sorted(shape)) not in weights))


SHARDED = [
    *(["model=qwen2_7b", f"hardware.activation_checkpointing={level}"] for level in ("none", "selective", "full")),
    ["model=qwen3_8b", "hardware.activation_checkpointing=full"],
    ["model=qwen3_4b", "hardware.activation_checkpointing=full"],
    ["model=qwen2_7b", "hardware.activation_checkpointing=full", "recipe=lora"],
    ["model=qwen2_7b", "hardware.activation_checkpointing=none", "hardware.offload_optimizer=true"],
    ["model=qwen3_8b", "hardware.activation_checkpointing=full", "hardware.offload_optimizer=true"],
]
REDUCED_ONCE = ["model=qwen3_4b", "hardware.activation_checkpointing=full"]


def compare_sharded(
    words: list[str], *, num_micro_batches: int = MICRO_BATCHES, reduce_once: bool = False
) -> tuple[float, float]:
    """Return predicted and measured bytes of a training step on one of four devices that shard the model.

    Forward and backward passes and the optimizer's step run; the second step counts, when there are moments. Device and
    host are one here, so an optimizer on the host is counted with its memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = compose(["hardware=cpu", "recipe=full_sft", "dropout=none", *words]).config
    machine = replace(
        resolve_machine(config.hardware, config.determinism, profile="cpu"),
        activation_checkpointing=config.hardware.activation_checkpointing,  # type: ignore[arg-type]
        strategy="fsdp",
        devices=4,
        precision="bf16-mixed",
        reduce_once=reduce_once,
    )
    frozen = torch.float32 if config.adapter.kind == "none" else torch.bfloat16
    execution = Execution("sdpa", machine.activation_checkpointing, frozen, torch.bfloat16)
    meta_model = build_meta_model(config.model, config.adapter, config.dropout, config.freeze)
    groups = plan_groups(meta_model.named_parameters(), config.optim)
    micro, size = micro_batch(packing=True)
    size = replace(size, accumulates=num_micro_batches > 1)
    estimate = estimate_memory(config, meta_model, groups, machine, execution, size)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())  # type: ignore[no-untyped-call]
    try:
        mesh = init_device_mesh("cpu", (4,))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = LossModel(_as_fake(meta_model, frozen), "sdpa").train()
            apply_activation_checkpointing(model.causal_lm, machine.activation_checkpointing)
            shard_model(model, mesh, bf16=True)
            named = ((name.rpartition("causal_lm.")[2], p) for name, p in model.named_parameters())
            with LiveBytes() as live:
                to_host = Copies() if machine.offload_optimizer else None
                optimizer: Any = build_optimizer(plan_groups(named, config.optim), config.optim, to_host)
                for _ in range(2):
                    live.most = live.now
                    for index in range(num_micro_batches):
                        is_last = index == num_micro_batches - 1
                        model.set_requires_gradient_sync(is_last or not reduce_once)  # type: ignore[operator]
                        if is_last and machine.offload_optimizer:
                            optimizer.begin_last_backward()
                        with torch.autocast("cpu", torch.bfloat16):
                            loss = model(micro).loss_sum
                        loss.backward()  # type: ignore[no-untyped-call]
                        del loss
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        WORKSPACES.clear()  # of fake tensors
        dist.destroy_process_group()
    return estimate.total - estimate.components["reserve"], float(live.most)


def _as_fake(model: Any, frozen_dtype: torch.dtype) -> Any:
    """Give a model on the meta device fake tensors in place of its own."""
    model.set_attn_implementation(register_attention())
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                dtype = p.dtype if p.requires_grad else frozen_dtype
                module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape)
    model.tie_weights()
    return model


def rows() -> Iterator[Row]:
    for name, shape in SHAPES.items():
        for way, words in WAYS.items():
            for policy in POLICIES if way in ("full", "LoRA", "QLoRA", "freeze") else ("none",):
                yield Row(f"{name}; {way}; {policy}", *compare(shape, words, policy))
    for model in ("qwen3_0_6b", "qwen2_5_7b"):
        for recipe in ("full_sft", "lora"):
            yield Row(f"{model}; {recipe}; kept, fake tensors", *compare_fake([f"model={model}", f"recipe={recipe}"]))


def sharded() -> Iterator[Row]:
    for words in SHARDED:
        names = "; ".join(_level_name(word) for word in words)
        yield Row(f"{names}; sharded over 4", *compare_sharded(words))
    names = "; ".join(map(_level_name, REDUCED_ONCE))
    yield Row(f"{names}; sharded over 4, reduced once", *compare_sharded(REDUCED_ONCE, reduce_once=True))


def _level_name(word: str) -> str:
    return "optimizer on the host" if word == "hardware.offload_optimizer=true" else word.partition("=")[2]


def whole_runs() -> Iterator[Row]:
    """Train in a process of its own, with each recipe."""
    with tempfile.TemporaryDirectory() as name:
        architecture = compose(["model=qwen2_5_0_5b"]).config.model.architecture
        assert architecture is not None
        _, model_class = FAMILIES["qwen2"].classes()
        model = model_class(to_hf_config(architecture)).to(torch.bfloat16)
        model.save_pretrained(f"{name}/model")
        del model
        for recipe in ("qlora", "lora", "full_sft"):
            words = [f"model.path={name}/model", "model.tokenizer=qwlit:demo/tokenizer", f"recipe={recipe}"]
            words += ["hardware=cpu", "data=demo", "data.max_samples=100", "data.exact_match=20", "train.max_steps=2"]
            words += ["train.max_epochs=null", "train.global_batch_size=16", "hardware.micro_batch_size=4"]
            words += ["checkpoint.every_steps=1", "preflight.allow=[full_lr]"]
            plan = subprocess.run([*QWLIT, "plan", "output=json", *words], capture_output=True, check=True)
            train = [*QWLIT, "train", f"run.root={name}/runs", f"run.name={recipe}", *words]
            _, status, usage = os.wait4(subprocess.Popen(train, stdout=subprocess.DEVNULL).pid, 0)
            if status:
                raise SystemExit(f"{recipe} failed")
            planned = json.loads(plan.stdout)["memory"]["total_gib"] * 2**30
            yield Row(f"qwen2_5_0_5b; {recipe}; the whole run", planned, usage.ru_maxrss * 2**10)


PARTS = {"steps": rows, "sharded": sharded, "runs": whole_runs}


def main(arguments: list[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    parts = options.get("parts", ",".join(PARTS)).split(",")
    results = RESULTS / "memory.json"
    kept = [Row(**row) for row in json.loads(results.read_text())["rows"]] if len(parts) < len(PARTS) else []
    found: list[Row] = []
    for row in (row for part in parts for row in PARTS[part]()):
        found.append(row)
        print(
            f"{row.what:<62} {row.predicted / MIB:>10.1f} {row.measured / MIB:>10.1f} MiB {row.error:>+7.1%}",
            flush=True,
        )
    measured = {row.what for row in found}
    found = [row for row in kept if row.what not in measured] + found
    machine = describe("torch", "transformers", "peft", "bitsandbytes")
    lines = ["# Memory: predicted against measured", "", "`python -m benchmarks.memory`", ""]
    lines += [
        ", ".join(f"{k} {v}" for k, v in machine.items()),
        "",
        "| what | predicted, MiB | measured, MiB | error |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.what} | {r.predicted / MIB:,.1f} | {r.measured / MIB:,.1f} | {r.error:+.1%} |" for r in found]
    PAGE.write_text("\n".join(lines) + "\n")
    results.write_text(json.dumps({"machine": machine, "rows": [vars(r) for r in found]}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
