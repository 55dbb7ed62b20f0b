"""`python -m tests.faults.faulty train …`: qwlit with numeric faults planted into steps, on every rank that it starts.

QWLIT_FAULTS is a JSON list of {"kind", "steps", "rank", "value"}; without a rank it is on every rank. A fault belongs
to the samples of these steps, counted from 1, in a run without a rollback. It happens once, unless "again" is true.
With "run" it is only in the run of this name, and in its replays. The kinds "forward" and "backward" change one element
of the output of "module", or of its gradient, by the share "value"; "at" says which, as a share of the elements.

QWLIT_DIE_AT=N kills the process before the N-th change of a file that going back makes.
"""

import json
import os
import sys
from functools import partial

import torch

from qwlit.core.sharding import local
from qwlit.training.module import CausalLMModule

done: set[tuple[int, int]] = set()


def due(module, position):
    """The faults on this rank at the step whose samples these are."""
    found = []
    for index, fault in enumerate(json.loads(os.environ.get("QWLIT_FAULTS", "[]"))):
        here = fault.get("rank") in (None, module.global_rank)
        here = here and fault.get("run") in (None, module.trainer.default_root_dir.rpartition("/")[2])
        if position in fault["steps"] and here and (fault.get("again") or (index, position) not in done):
            done.add((index, position))
            found.append(fault)
    return found


def first_layer(module):
    return next(part for name, part in module.named_modules() if name.endswith("down_proj"))


def plant_state(module, fault):
    """Change a weight, or a moment of it, or one bit of it."""
    weight = next(p for p in first_layer(module).parameters() if p.requires_grad is not fault.get("frozen", False))
    values = local(weight.data).view(-1)
    if fault["kind"] == "parameter":
        values[0] = float(fault["value"])
    elif fault["kind"] == "flip":
        # The second highest bit of the mantissa: the value stays plausible.
        values[:1].view(torch.int32).bitwise_xor_(1 << 21)
    elif fault["kind"] in (state := module.optimizers(use_pl_optimizer=False).state[weight]):
        local(state[fault["kind"]]).view(-1)[0] = float(fault["value"])


class Faults:
    """The faults of the step that runs."""

    now: tuple = ()

    @classmethod
    def value(cls, kind):
        """The product of the values of this kind; None where there is none."""
        found = [float(fault["value"]) for fault in cls.now if fault["kind"] == kind]
        return found[0] if found else None


def change_loss(module, args, out):
    added, factor = Faults.value("loss"), Faults.value("scale")
    return out._replace(loss_sum=(out.loss_sum + (added or 0.0)) * (factor or 1.0))


def change_gradient(module, args, out):
    if (factor := Faults.value("gradient")) is not None and out.requires_grad:
        out.register_hook(lambda gradient: gradient * factor)


def changed(tensor, fault):
    """Return the tensor with another value in one place, and the same bits in all others."""
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[int(fault["at"] * len(mask))] = True
    share = fault["value"]
    return torch.where(mask.view(tensor.shape), tensor * (1 + share) + share * tensor.detach().abs().mean(), tensor)


def change_element(name, module, args, out):
    """Compute one element otherwise, as another kernel would."""
    tensor = out[0] if isinstance(out, tuple) else out
    for fault in Faults.now:
        if fault.get("module") == name and fault["kind"] == "forward":
            tensor = changed(tensor, fault)
        if fault.get("module") == name and fault["kind"] == "backward" and tensor.requires_grad:
            tensor.register_hook(lambda gradient, fault=fault: changed(gradient, fault))
    return (tensor, *out[1:]) if isinstance(out, tuple) else tensor


def plant():
    """Patch the module."""
    step, backward, over_ranks = (getattr(CausalLMModule, n) for n in ("training_step", "_backward", "_over_ranks"))

    def training_step(self, batch, batch_idx):
        # After a rollback another module has the same model.
        if not hasattr(self.loss_model, "planted"):
            self.loss_model.planted = True
            self.loss_model.register_forward_hook(change_loss, prepend=True)
            first_layer(self).register_forward_hook(change_gradient)
            for name, part in self.loss_model.causal_lm.named_modules():
                if any(fault.get("module") == name for fault in json.loads(os.environ.get("QWLIT_FAULTS", "[]"))):
                    # Before the hooks that observe a step.
                    part.register_forward_hook(partial(change_element, name), prepend=True)
        plan = self.trainer.datamodule.plan
        passed_over = sum(data.num_steps for data in plan.skipped_data if batch.step >= data.from_step)
        Faults.now = due(self, batch.step + passed_over + 1)
        for fault in Faults.now:
            plant_state(self, fault)
        step(self, batch, batch_idx)

    def scaled_backward(self, micro, count):
        # Only the gradient is scaled.
        return backward(self, micro, count) / (Faults.value("scale") or 1.0)

    def changed_norm(self, loss_sum, grad_norm):
        factor = Faults.value("norm")
        return over_ranks(self, loss_sum, grad_norm if factor is None else grad_norm * factor)

    CausalLMModule.training_step, CausalLMModule._backward = training_step, scaled_backward
    CausalLMModule._over_ranks = changed_norm


def die_while_going_back(number):
    """Kill this process before going back changes a file for the `number`-th time."""
    from qwlit.run import go_back

    record, changes = go_back._record, []

    def count(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if changes and (writes or event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree")):
            changes.append(event)
            if len(changes) > number:
                os._exit(137)

    def record_and_die(run, needed):
        changes.append("go back")
        sys.addaudithook(count)
        rollback = record(run, needed)
        changes.clear()
        return rollback

    go_back._record = record_and_die


if __name__ == "__main__":
    from qwlit.__main__ import main

    plant()
    if number := int(os.environ.get("QWLIT_DIE_AT", "0")):
        die_while_going_back(number)
    sys.exit(main())
