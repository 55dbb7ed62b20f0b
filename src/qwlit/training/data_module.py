"""A LightningDataModule over the step plan: one batch is one optimizer step, one Lightning epoch the whole run."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from qwlit.core.batch import MicroBatch, StepBatch
from qwlit.core.errors import ConfigError
from qwlit.data.batches import StepDataset, train_loader, validation_loader
from qwlit.data.samples import Samples
from qwlit.data.step_plan import StepPlan
from qwlit.training.machine import Machine


class StepDataModule(lightning.LightningDataModule):
    """Gives a Trainer the batches of the step plan, from the step at which the Trainer is."""

    def __init__(
        self, plan: StepPlan, validation: Sequence[Samples], machine: Machine, *, total_steps: int, pad_id: int
    ) -> None:
        """`validation`: the validation sets, each with its own loader; empty if the run does not validate."""
        super().__init__()
        self.plan = plan
        self.validation = validation
        self.machine = machine
        self.total_steps = total_steps
        self.pad_id = pad_id

    def setup(self, stage: str) -> None:
        """Refuse a Trainer that would not train as planned.

        Raises:
            ConfigError: naming the Trainer's argument.
        """
        trainer: Any = self.trainer
        if stage == "fit" and (wrong := _find_wrong_argument(trainer, self.machine, self.total_steps)):
            raise ConfigError(wrong)

    def train_dataloader(self) -> DataLoader[StepBatch]:
        trainer: Any = self.trainer
        return train_loader(
            StepDataset(self.plan.train, self.plan, trainer.global_rank, self.pad_id),
            # Lightning asks for the loader after it has read the checkpoint of a resumed run.
            start_step=trainer.global_step,
            total_steps=self.total_steps,
            num_workers=self.machine.num_workers,
            pin_memory=self.machine.pin_memory,
        )

    def val_dataloader(self) -> list[DataLoader[MicroBatch]]:
        trainer: Any = self.trainer
        return [
            validation_loader(
                samples,
                rank=trainer.global_rank,
                world_size=self.plan.world_size,
                limits=self.plan.limits,
                packing=self.plan.packing,
                pad_id=self.pad_id,
            )
            for samples in self.validation
        ]


def _find_wrong_argument(trainer: Trainer, machine: Machine, total_steps: int) -> str | None:
    """Return what is wrong with the Trainer's arguments, with the remedy; None where nothing is."""
    too_long = trainer.max_steps > total_steps or (trainer.max_steps < 0 and trainer.max_epochs != 1)
    samples_steps = trainer._accelerator_connector.use_distributed_sampler
    rules = (
        (
            trainer.world_size != machine.world_size,
            f"Trainer(devices=…, num_nodes=…): Lightning has {trainer.world_size} processes, but hardware.devices x"
            f" hardware.num_nodes is {machine.world_size}; make them equal",
        ),
        (
            trainer.precision != machine.precision,
            f"Trainer(precision={trainer.precision!r}): the run is planned for {machine.precision!r}; set that",
        ),
        (
            too_long,
            f"Trainer(max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}): the step plan has {total_steps}"
            f" steps, and one epoch is all of them; set max_steps={total_steps} or max_epochs=1",
        ),
        (
            bool(trainer.overfit_batches),
            "Trainer(overfit_batches=…) replaces the step plan; train on a file with a few rows instead",
        ),
        (
            trainer.limit_train_batches != 1.0 and trainer.max_epochs != 1,
            "Trainer(limit_train_batches=…): a second epoch would train on the same steps; set max_epochs=1",
        ),
        (
            trainer.world_size > 1 and samples_steps,
            "Trainer(use_distributed_sampler=True) replaces the step plan; set use_distributed_sampler=False",
        ),
    )
    return next((message for is_wrong, message in rules if is_wrong), None)
