"""The optimizer that steps on the host: the same numbers, the order of its copies, and what it writes and reads."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwlit.core.copies import Copies, page_locked_bytes
from qwlit.optim.config import OptimConfig
from qwlit.optim.groups import plan_groups
from qwlit.optim.host import HostOptimizer
from qwlit.optim.optimizers import build_optimizer, set_clip_and_skip, set_learning_rate
from qwlit.planning.memory.optimizer import host_bytes


class Recorder(Copies):
    """Copies nothing before someone waits, as a device may; records what is done in which order."""

    def __init__(self):
        self.events: list[str] = []
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.names: dict[int, str] = {}

    def copy(self, target, source):
        name = self.names.get(target.data_ptr()) or f"to host: {self.names[source.data_ptr()]}"
        self.events.append(name)
        # torch counts a copy as a write when it is launched, and `data` has a count of its own.
        target.mul_(1)
        self.pending.append((target.data, source))

    def wait_on_host(self):
        self.events.append("host waits")
        self._finish()

    def wait_on_device(self):
        self.events.append("device waits")
        self._finish()

    def _finish(self):
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()


class Layered(nn.Module):
    """Two layers between an embedding and a head, by their Hugging Face names; the last layer is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(11, 8),
                "layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(2)),
                "norm": nn.LayerNorm(8),
            }
        )
        self.lm_head = nn.Linear(8, 11)

    def forward(self, ids):
        hidden = self.model["embed_tokens"](ids)
        for layer in (*self.model["layers"], self.model["layers"][-1]):
            hidden = torch.tanh(layer(hidden))
        return self.lm_head(self.model["norm"](hidden)).logsumexp(-1).mean()


def built(model: nn.Module, copies: Copies | None = None, **settings: Any) -> Any:
    config = OptimConfig(**({"lr": 1e-2, "weight_decay": 0.1} | settings))
    return build_optimizer(plan_groups(model.named_parameters(), config), config, copies)


def train(model, optimizer, steps, *, micro_batches=2, skipped=(), clip: float | None = 0.05):
    for step in steps:
        torch.manual_seed(step)
        set_learning_rate(optimizer, 1 / (1 + step))
        for index in range(micro_batches):
            if index == micro_batches - 1 and isinstance(optimizer, HostOptimizer):
                optimizer.begin_last_backward()
            model(torch.randint(11, (4, 5))).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        set_clip_and_skip(optimizer, norm, clip, torch.tensor(float(step in skipped)))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def equal(one, two):
    return len(one) == len(two) and all(map(torch.equal, one, two))


SETTINGS = [{"name": "adamw"}, {"name": "adamw", "amsgrad": True}, {"name": "sgd", "momentum": 0.9}]
IDS = ["adamw", "amsgrad", "sgd"]


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("clip", [0.05, None])
def test_the_host_steps_to_the_same_bits_as_the_device_also_over_skipped_steps(settings, clip):
    here, there = Layered(), Layered()
    on_host = built(there, Recorder(), **settings)
    on_host._copies.names = _Names(there, on_host)
    expected = train(here, built(here, **settings), range(6), skipped={0, 3}, clip=clip)
    assert equal(train(there, on_host, range(6), skipped={0, 3}, clip=clip), expected)


class _Names(dict):
    """The names of all tensors that the optimizer copies, by their address."""

    def __init__(self, model: nn.Module, optimizer: HostOptimizer):
        for name, parameter in model.named_parameters():
            own = optimizer.stand_ins[parameter]
            self |= {parameter.data_ptr(): f"weight {name}", own.data_ptr(): f"to host: weight {name}"}
            self[optimizer._gradients[parameter].data_ptr()] = f"gradient {name}"


def test_gradients_are_copied_in_the_backward_pass_and_each_layer_returns_while_the_next_one_steps(monkeypatch):
    model = Layered()
    recorder = Recorder()
    optimizer = built(model, recorder)
    recorder.names = _Names(model, optimizer)
    for part in optimizer.parts:
        first = next(name for name, p in model.named_parameters() if p is part.parameters[0])

        def step(step=part.optimizer.step, first=first):
            recorder.events.append(f"step {first.rpartition('.')[0]}")
            step()

        monkeypatch.setattr(part.optimizer, "step", step)
    train(model, optimizer, [0])
    recorder.events.clear()
    model.model["embed_tokens"].register_full_backward_hook(lambda *_: recorder.events.append("embedding's backward"))
    train(model, optimizer, [1])
    events = recorder.events
    # Everything above the embedding is on its way before the backward pass gets there, and only in the last
    # micro-batch: the first one's hook comes before all copies.
    first, last = (i for i, event in enumerate(events) if event == "embedding's backward")
    copied = [event for event in events if event.startswith("gradient")]
    assert not any(event.startswith("gradient") for event in events[:first])
    assert len(copied) == len(set(copied)) == len(list(model.parameters()))
    assert sum(event.startswith("gradient") for event in events[first:last]) == len(copied) - 1
    # The host waits for the copies once, then steps; the weights of a part leave before the next part steps.
    rest = events[events.index("host waits") :]
    order = [event for event in rest if not event.startswith("weight")]
    assert order == [
        "host waits",
        "step model.embed_tokens",
        "step model.layers.0",
        "step model.layers.1",
        "device waits",
    ]
    own = rest[rest.index("step model.layers.0") + 1 : rest.index("step model.layers.1")]
    assert own == ["weight model.layers.0.weight", "weight model.layers.0.bias"]
    # Nothing else has written the weights, so they are not copied to the host again.
    assert not any(event.startswith("to host: weight") for event in events)


def test_a_weight_that_something_else_has_written_is_copied_to_the_host_again():
    here, there = Layered(), Layered()
    one, two = built(here), built(there, Copies())
    train(here, one, range(2)), train(there, two, range(2))
    for model in (here, there):
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        model.model["layers"][0].load_state_dict(Layered().model["layers"][0].state_dict())
    assert equal(train(there, two, range(2, 4)), train(here, one, range(2, 4)))


def test_also_a_sharded_weight_that_something_else_has_written():
    here, there = Layered(), Layered()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(there, mesh=init_device_mesh("cpu", (1,)))
        one, two = built(here), built(there, Copies())
        train(here, one, range(2), clip=None), train(there, two, range(2), clip=None)
        with torch.no_grad():
            here.lm_head.weight.mul_(2), there.lm_head.weight.mul_(2)
        expected = train(here, one, range(2, 4), clip=None)
        assert equal([weight.full_tensor() for weight in train(there, two, range(2, 4), clip=None)], expected)
    finally:
        dist.destroy_process_group()


def test_loaded_moments_stay_on_the_host_when_lightning_moves_the_state_to_the_device():
    first, again = Layered(), Layered()
    optimizer = built(first, Copies())
    train(first, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(first.state_dict())
    restored = built(again, Copies())
    restored.load_state_dict(state)
    _optimizer_to_device(restored, torch.device("meta"))
    assert equal(train(again, restored, range(2, 4)), train(first, optimizer, range(2, 4)))


def test_8_bits_are_for_a_matrix_of_which_every_ranks_slice_is_large_enough():
    # Ranks with other tensors in their state could not compare them.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        large, uneven = (
            nn.Parameter(
                DTensor.from_local(torch.ones(2, 2048), mesh, [Shard(0)], shape=(rows, 2048), stride=(2048, 1))
            )
            for rows in (4, 3)
        )
        config = OptimConfig(name="adamw_8bit", lr=1e-2)
        named = [(f"model.layers.{i}.mlp.up_proj.weight", p) for i, p in enumerate((large, uneven))]
        optimizer = build_optimizer(plan_groups(named, config), config)
        for parameter in (large, uneven):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert optimizer.state[large]["state1"].dtype == torch.uint8
        assert optimizer.state[uneven]["state1"].dtype == torch.float32
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize(("saves_on_host", "loads_on_host"), [(True, True), (True, False), (False, True)])
def test_state_is_that_of_the_device_and_goes_from_one_to_the_other(settings, saves_on_host, loads_on_host):
    first, again = Layered(), Layered()
    optimizer = built(first, Copies() if saves_on_host else None, **settings)
    train(first, optimizer, range(3))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(first.state_dict())
    expected = train(first, optimizer, range(3, 6))
    again.load_state_dict(weights)
    restored = built(again, Copies() if loads_on_host else None, **settings)
    if loads_on_host:
        train(again, restored, [9])  # what it held before must be gone
        again.load_state_dict(weights)
    restored.load_state_dict(state)
    assert equal(train(again, restored, range(3, 6)), expected)


def test_a_parameter_without_gradient_stays_as_it_is():
    model = Layered()
    model.unused = nn.Linear(2, 2)
    before = model.unused.weight.detach().clone()
    optimizer = built(model, Copies())
    train(model, optimizer, range(2))
    assert torch.equal(model.unused.weight, before) and model.unused.weight not in optimizer.state


def test_one_backward_pass_leaves_no_hooks():
    model = Layered()
    optimizer = built(model, Copies())
    train(model, optimizer, range(3))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_the_plan_counts_the_hosts_memory():
    class Counted(Copies):
        size = 0

        def allocate(self, num_elements):
            self.size += 4 * num_elements
            return super().allocate(num_elements)

    model, copies = Layered(), Counted()
    config = OptimConfig(lr=1e-2)
    optimizer = built(model, copies, weight_decay=config.weight_decay)
    train(model, optimizer, [0])
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    groups = plan_groups(model.named_parameters(), config)
    assert copies.size + moments == host_bytes(groups, config, lambda p: p.numel(), page_locked=False)
    # The embedding, norm and head, and each layer: two pieces of each are page-locked.
    sizes = [4 * (11 * 8 + 16 + 11 * 8 + 11), 4 * (8 * 8 + 8), 4 * (8 * 8 + 8)]
    taken = sum(2 * page_locked_bytes(size) for size in sizes)
    assert moments + taken == host_bytes(groups, config, lambda p: p.numel(), page_locked=True)


@pytest.mark.parametrize(("size", "taken"), [(0, 0), (1, 1), (2**20, 2**20), (2**20 + 1, 2**21), (3e9, 2**32)])
def test_page_locked_memory_takes_a_power_of_two(size, taken):
    assert page_locked_bytes(size) == taken
