"""`import qwlit`: train, plan and read runs from Python, and train in a Trainer of one's own."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as lightning
import pandas
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import qwlit
from tests.runs.runs import ENVIRONMENT, TINY, assert_same_run, losses, rows

DEMO = [*TINY, "train.max_steps=12", "validation.every_steps=4", "data.exact_match=0", "checkpoint.every_steps=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the demo's data are tokenized once."""
    return tmp_path_factory.mktemp("interface")


@pytest.fixture
def demo(folder, monkeypatch):
    """The overrides of a short run; its run folder is in the current folder's runs/."""
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    return DEMO


class Watch(lightning.Callback):
    """Keeps what the Trainer's callback metrics are at each step and each validation."""

    def __init__(self):
        self.train, self.validation = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append((trainer.global_step, trainer.callback_metrics.get("train/loss")))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validation.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def own_trainer(data, **arguments):
    asked = {"max_steps": data.total_steps, "val_check_interval": 4, "logger": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", enable_model_summary=False, **(asked | arguments))


def validations(run):
    return [(row["step"], row["val/loss"]) for row in rows(run) if "val/loss" in row]


def test_import_is_light_and_lists_the_interface():
    code = (
        "import sys, qwlit; assert not {'torch', 'lightning', 'transformers', 'hydra'} & sys.modules.keys();"
        "assert set(qwlit.__all__) <= set(dir(qwlit)); [getattr(qwlit, name) for name in qwlit.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_gives_the_run_of_the_command_line_and_calls_callbacks_and_loggers(demo, tmp_path):
    watch, logger = Watch(), CSVLogger(tmp_path / "csv")
    run = qwlit.train(*demo, "run.name=python", callbacks=[watch], loggers=[logger])
    command = [sys.executable, "-m", "qwlit", "train", *demo, "run.name=command"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    assert_same_run(run.path, Path("runs/command"))
    assert watch.validation == [(s, pytest.approx(v, rel=1e-6)) for s, v in validations(run.path)]
    assert [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(run.path)] == watch.train
    logged = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "val/loss", "optim/lr"} <= set(logged[0].split(",")) and len(logged) > 12


def test_a_run_is_read_from_its_folder(demo, tmp_path, monkeypatch):
    run = qwlit.train(*demo, "run.name=a", "data.exact_match=4", "logger.use=[csv,tensorboard]")
    assert run.summary["status"] == "done" and "done" in repr(run)
    frame = run.metrics()
    assert list(frame["step"][frame["val/loss"].notna()]) == [4, 8, 12]
    pandas.testing.assert_frame_equal(pandas.read_csv(run.path / "csv" / "metrics.csv"), frame, check_like=True)
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.metrics() == rows(run.path)
    assert [event["step"] for event in run.events() if event["event"] == "checkpoint"] == [4, 8, 12]
    samples = qwlit.Run("runs/a").samples()
    assert len(samples) == 4
    model, tokenizer = run.model(), run.tokenizer()
    ids = tokenizer(samples[0]["prompt"], return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert samples[0]["answer"].startswith(tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n"))


def test_an_adapter_is_loaded_with_its_base(demo):
    base = qwlit.train(*demo, "run.name=base", "train.max_steps=2").path / "export"
    data = [f"model.path={base}", "recipe=lora", "hardware=cpu", "data=demo", "adapter.rank=4", "data.exact_match=0"]
    run = qwlit.train(*data, "run.name=adapter", "train.max_steps=2", "preflight.allow=[lr_range]")
    assert any("lora" in name for name, _ in run.model().named_parameters())


def test_what_is_wrong_raises_and_leaves_the_interpreter_running(demo, tmp_path):
    with pytest.raises(qwlit.ConfigError, match=r"optim.lrr.*optim.lr"):
        qwlit.train(*demo, "optim.lrr=1")
    with pytest.raises(qwlit.DataError, match=r"'missing\.jsonl' does not exist"):
        qwlit.train(*demo, "data.path=missing.jsonl")
    with pytest.raises(qwlit.ConfigError, match="is not the folder of a run"):
        qwlit.Run(tmp_path)
    with pytest.raises(qwlit.GuardStop, match="not finite"):
        qwlit.train(
            *demo, "run.name=diverges", "optim.lr=1e30", "train.max_grad_norm=null", "preflight.allow=[full_lr]"
        )
    with pytest.raises(qwlit.ConfigError, match="no export"):
        qwlit.Run("runs/diverges").model()
    with pytest.raises(qwlit.ConfigError, match="ModelCheckpoint"):
        qwlit.train(*demo, callbacks=[ModelCheckpoint()])


def test_an_error_in_a_callback_reaches_the_caller_and_the_run_resumes(demo):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        qwlit.train(*demo, "run.name=cut", callbacks=[Stop()])
    run = qwlit.train(*demo, "run.name=cut")
    assert run.summary["resumed_from"] == 4
    assert_same_run(run.path, qwlit.train(*demo, "run.name=whole").path)


def test_several_processes_train_as_subprocesses_and_refuse_callbacks(demo, capfd):
    run = qwlit.train(*demo, "run.name=two", "hardware.devices=2")
    assert run.summary["status"] == "done" and "12 steps" in capfd.readouterr().out
    with pytest.raises(qwlit.ConfigError, match=r"starts 2 processes; set hardware.devices=1"):
        qwlit.train(*demo, "run.name=two", "hardware.devices=2", callbacks=[Watch()])
    with pytest.raises(qwlit.ConfigError, match="is finished"):
        qwlit.train(*demo, "run.name=two", "hardware.devices=2")


def test_plan_is_the_plan_of_the_command_line(demo):
    plan = qwlit.plan("hardware=a100x4", "recipe=full_sft", "model=qwen3_0_6b")
    assert plan.setup.num_parameters == 596_049_920 and plan.memory.fits
    assert plan.machine.world_size == 4 and plan.accumulate_grad_batches == 1


def test_a_trainer_of_ones_own_trains_as_qwlit_does_monitors_exactly_and_resumes_to_the_bit(demo, tmp_path):
    run = qwlit.train(*demo, "run.name=ours")
    module, data = qwlit.lightning_modules(*demo)
    watch, early = Watch(), EarlyStopping("val/loss", patience=3)
    best = ModelCheckpoint(tmp_path / "saved", "{step}", monitor="val/loss", save_top_k=-1)
    logger = TensorBoardLogger(tmp_path / "board")
    own_trainer(data, logger=logger, callbacks=[watch, best, early]).fit(module, data)
    expected = dict(validations(run.path))
    # float32, as Lightning stores metrics
    assert dict(watch.validation) == pytest.approx(expected, rel=1e-6)
    assert best.best_model_path.endswith(f"step={min(expected, key=expected.get)}.ckpt")
    assert float(early.best_score) == pytest.approx(min(expected.values()), rel=1e-6)
    # The module's own callback measures after the user's, so a step sees the loss of the one before.
    assert [loss for _, loss in watch.train[1:]] == pytest.approx([loss for _, loss in losses(run.path)][:-1], rel=1e-6)
    assert list((tmp_path / "board").rglob("events.out.tfevents.*"))
    weights = {name: p.detach().clone() for name, p in module.loss_model.causal_lm.named_parameters()}
    for name, weight in run.model().named_parameters():
        assert torch.equal(weight, weights[name]), name

    module, data = qwlit.lightning_modules(*demo)
    own_trainer(data).fit(module, data, ckpt_path=tmp_path / "saved" / "step=8.ckpt")
    for name, weight in module.loss_model.causal_lm.named_parameters():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": -1}, "set max_steps=12 or max_epochs=1"),
        ({"max_steps": -1, "max_epochs": 3}, "set max_steps=12 or max_epochs=1"),
        ({"max_steps": 13}, "set max_steps=12 or max_epochs=1"),
        ({"precision": "bf16-mixed"}, r"precision='bf16-mixed'\): the run is planned for '32-true'"),
        ({"limit_train_batches": 5, "val_check_interval": 1.0}, "set max_epochs=1"),
        ({"overfit_batches": 2, "val_check_interval": 1.0}, "overfit_batches"),
        ({"gradient_clip_val": 1.0}, "gradient clipping is not supported for manual optimization"),
        ({"accumulate_grad_batches": 2}, "gradient accumulation is not supported for manual optimization"),
    ],
)
def test_a_trainer_that_would_not_train_as_planned_is_refused(arguments, message, demo):
    module, data = qwlit.lightning_modules(*demo)
    with pytest.raises(Exception, match=f"(?i){message}"):
        own_trainer(data, **arguments).fit(module, data)


def test_a_trainer_of_ones_own_on_two_devices_trains_as_one_does(demo, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        "import json, sys, lightning, qwlit\n"
        "module, data = qwlit.lightning_modules(*json.loads(sys.argv[1]))\n"
        "trainer = lightning.Trainer(accelerator='cpu', devices=2, strategy='ddp', max_steps=data.total_steps,\n"
        "    val_check_interval=4, logger=False, enable_checkpointing=False, use_distributed_sampler=False)\n"
        "trainer.fit(module, data)\n"
        "if trainer.is_global_zero: print('loss', float(trainer.callback_metrics['val/loss']))\n"
    )
    two = json.dumps([*demo, "hardware.devices=2"])
    done = subprocess.run([sys.executable, script, two], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.splitlines()[-1].split()[1])
    assert loss == pytest.approx(validations(qwlit.train(*demo, "run.name=one").path)[-1][1], rel=2e-5)


def test_fsdp_and_float16_need_the_trainer_of_qwlit(demo):
    for setting in ("hardware.strategy=fsdp", "hardware.precision=16-mixed"):
        with pytest.raises(qwlit.ConfigError, match=f"{setting} needs qwlit's own Trainer"):
            qwlit.lightning_modules(*demo, setting, "hardware.devices=2" if "fsdp" in setting else "seed=1")


def test_overrides_in_a_list_are_refused():
    with pytest.raises(qwlit.ConfigError, match=r"\['seed=1'\] is not a text: pass each override by itself"):
        qwlit.plan(["seed=1"])
