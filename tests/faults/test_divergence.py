"""A fine-tuning at a learning rate that is far too high: seen from inside the model."""

import pytest

from qwlit.training.step_gauges import ACTIVATION_NORM
from tests.faults.test_checkpoints import chat  # noqa: F401 - a fixture
from tests.runs.runs import qwlit, rows, train


@pytest.fixture(scope="module")
def pretrained(chat, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("pretrained")
    words = [f"data.path={chat}", "data.val_fraction=0", "train.max_steps=40", "train.max_epochs=null"]
    words.append("model.architecture.intermediate_size=128")  # QLoRA needs blocks of 64
    run = train([*words, "optim.lr=5e-3", "checkpoint.each_epoch=false", "run.name=base"], folder)
    return run / "export"


@pytest.mark.parametrize(("lr", "code"), [("1e-4", 0), ("1e-1", 3)])
def test_a_learning_rate_far_too_high_is_seen_in_the_activations(lr, code, pretrained, chat, tmp_path):  # noqa: F811
    words = [
        "model=demo",
        "hardware=cpu",
        "logging.every_steps=1",
        "model.init=pretrained",
        f"model.path={pretrained}",
        f"data.path={chat}",
        "data.val_fraction=0",
    ]
    words += ["train.max_steps=30", "train.max_epochs=null", f"optim.lr={lr}", "preflight.allow=[full_lr]"]
    done = qwlit(["train", *words, "guard=strict", "scheduler.warmup_steps=0", "run.name=a"], tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert (f"{ACTIVATION_NORM} grew from" in done.stderr) == (code == 3)
    norms = [row[ACTIVATION_NORM] for row in rows(tmp_path / "runs/a") if ACTIVATION_NORM in row]
    assert (max(norms) > 4 * norms[0]) == (code == 3)
