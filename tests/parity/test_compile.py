"""Compiled layers against layers as they are written: the same gradients, one graph for all packings, no break.

The graphs are traced and run by torch's own operators; tests/runs/test_compile.py makes machine code of them. torch's
varlen attention is given kernels for CPU, also with dropout. QWLIT_LONG=1 traces every case as the case "full".
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwlit.core.batch import MicroBatch
from qwlit.core.errors import ConfigError
from qwlit.model.attention import generation_attention
from qwlit.model.compile import compile_layers
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.loss_model import LossModel, build_loss_model
from qwlit.model.shard import shard_model
from qwlit.training.machine import resolve_compile
from qwlit.training.replay import replay
from tests.invariance.worker import machine
from tests.long import LONG
from tests.parity.varlen import register
from tests.runs.runs import ENVIRONMENT, free_port, interpreter, succeed_together
from tests.tiny import packed, padded, random_samples, tiny_architecture

CASES = {
    "full": {},
    "qwen2": {"family": "qwen2"},
    "lora": {"adapter": AdapterConfig(kind="lora", rank=2), "dropout": DropoutConfig(lora=0.1)},
    "qlora": {
        "adapter": AdapterConfig(kind="lora", rank=2, quantization="nf4", target_modules=("q_proj", "down_proj")),
        "dropout": DropoutConfig(lora=0.1),
    },
    "dropout": {"dropout": DropoutConfig(attention=0.1, feed_forward=0.1, residual=0.1, embedding=0.1)},
    "freeze": {"freeze": FreezeConfig(layers=(0, 1))},
    "selective": {"memory": "selective", "dropout": DropoutConfig(attention=0.1, feed_forward=0.1)},
    "whole layers again": {"memory": "full", "dropout": DropoutConfig(attention=0.1, residual=0.1)},
}
# AOTAutograd traces the gradients, and takes most of the time, where operators or recomputation are special to it.
GRADIENTS_TRACED = CASES if LONG else ("full", "qlora", "selective", "whole layers again")


def model(family="qwen3", adapter=None, dropout=None, freeze=None, memory="none") -> LossModel:
    wide = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64}  # nf4 wants rows of 64
    shape = replace(tiny_architecture(family, tied=True), **wide)
    return build_loss_model(
        ModelConfig(init="random", architecture=shape),
        adapter or AdapterConfig(),
        dropout or DropoutConfig(),
        freeze or FreezeConfig(),
        Execution("varlen", memory, torch.float32, torch.float32),
        seed=0,
    )


def micro_batches():
    draw = random.Random(0)
    sizes = [1, 3, 5, 2, 8, 1, 4]
    return [packed(random_samples([draw.randint(2, 40) for _ in range(size)], seed=size)) for size in sizes]


def validated(loss_model: LossModel, micros: list[MicroBatch]) -> list[float]:
    loss_model.eval()
    with torch.no_grad():
        losses = [loss_model(micro).loss_sum.item() for micro in micros]
    loss_model.train()
    return losses


def losses_and_gradients(loss_model: LossModel, *, briefly: bool):
    """Train on and validate micro-batches of several sizes.

    Args:
        briefly: only the first is validated, and before the others are trained on.
    """
    first, *others = micros = micro_batches()
    losses = validated(loss_model, [first]) if briefly else []
    for number, micro in enumerate(others if briefly else micros):
        torch.manual_seed(number)
        loss_sum = loss_model(micro).loss_sum
        loss_sum.backward()
        losses.append(loss_sum.item())
    losses += [] if briefly else validated(loss_model, micros)
    return losses, {name: p.grad for name, p in loss_model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch):
    register()
    monkeypatch.setattr(LossModel, "_kernel", lambda *_: "varlen")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_compiled_layers_give_the_same_losses_and_gradients_from_few_graphs(name):
    case, briefly = CASES[name], not LONG and name != "full"
    expected_losses, expected = losses_and_gradients(model(**case), briefly=briefly)
    compiled = model(**case)
    compile_layers(compiled.causal_lm, backend="aot_eager" if name in GRADIENTS_TRACED else "eager")
    losses, found = losses_and_gradients(compiled, briefly=briefly)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).norm() <= 1e-6 * gradient.norm(), parameter
    # The last layer is another function; each is traced for training and for validation, once for all lengths. Where
    # nothing below needs a gradient a layer's input has none, and it is traced once more.
    trains_all = name not in ("lora", "qlora", "freeze")
    assert 0 < counters["stats"]["unique_graphs"] <= (4 if trains_all else 6)


def test_generation_runs_the_layers_as_they_are_written_and_training_goes_on_compiled():
    loss_model = model()
    compile_layers(loss_model.causal_lm, backend="aot_eager")
    micro = micro_batches()[0]
    before = loss_model(micro).loss_sum
    graphs = counters["stats"]["unique_graphs"]
    with generation_attention(loss_model.causal_lm), torch.no_grad():
        loss_model.causal_lm.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert all(layer._compiled_call_impl for layer in loss_model.causal_lm.model.layers)
    assert loss_model(micro).loss_sum == before


@pytest.mark.parametrize("has_run", [False, True])
def test_a_replay_sees_every_module_inside_compiled_layers_and_training_goes_on_compiled(has_run):
    plain, loss_model, micro = model(), model(), micro_batches()[0]
    compile_layers(loss_model.causal_lm, backend="aot_eager")
    if has_run:
        loss_model(micro)
    seen = [
        [(found.module, found.direction) for found in replay(each, [micro], seed=0, step=0, rank=0)]
        for each in (plain, loss_model)
    ]
    assert seen[0] == seen[1] and any("q_proj" in name for name, _ in seen[1])
    graphs = counters["stats"]["unique_graphs"]
    assert (graphs > 0) == has_run
    loss_model(micro)
    assert counters["stats"]["unique_graphs"] == max(graphs, 2)


def test_asked_for_where_something_stands_against_it_it_is_refused():
    with pytest.raises(ConfigError, match=r"hardware.compile=true: because; set hardware.compile=auto"):
        resolve_compile(True, machine("single", 1), "because")


def test_by_itself_it_is_cuda_alone_that_compiles_and_says_why_not():
    cpu = machine("single", 1)
    assert resolve_compile("auto", cpu, "because") == (False, None)
    cuda = type(cpu)(**vars(cpu) | {"accelerator": "cuda"})
    assert resolve_compile("auto", cuda, "because") == (False, "because")
    assert resolve_compile(False, cuda, "because") == (False, None)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        resolve_compile(True, machine("single", 1), None)


@pytest.mark.parametrize("sharded", [False, True])
def test_padded_sequences_of_other_numbers_and_lengths_need_no_further_graph_nor_does_fsdp2(sharded, monkeypatch):
    monkeypatch.setattr(LossModel, "_kernel", lambda *_: "sdpa")
    loss_model = model()
    compile_layers(loss_model.causal_lm, backend="eager")
    if sharded:
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        shard_model(loss_model, init_device_mesh("cpu", (2,)), bf16=False)
    try:
        for lengths in ([9, 14, 5], [30, 2], [7, 7, 7, 7], [3, 40]):
            loss_model(padded(random_samples(lengths))).loss_sum.backward()
    finally:
        if sharded:
            dist.destroy_process_group()
    assert counters["stats"]["unique_graphs"] == 2  # the last layer is another function


def test_under_ddp_each_compiled_layer_stays_one_graph_and_the_ranks_gradients_are_those_of_plain_layers(tmp_path):
    meeting = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [interpreter(), "-m", "tests.parity.ddp_worker", str(tmp_path)]
    ranks = [([*words, str(rank)], meeting) for rank in range(2)]
    succeed_together(ranks, Path(__file__).parents[2], timeout=120)
    for rank in range(2):
        plain, compiled, graphs = torch.load(tmp_path / str(rank), weights_only=True)
        assert all((compiled[name] - g).norm() <= 1e-5 * g.norm() for name, g in plain.items())
        assert graphs == 2  # the last layer is another function
