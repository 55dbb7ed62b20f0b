"""What a run says when it stops: the module, the samples, and overrides that the next run accepts."""

import json

import pytest

from qwlit.config.compose import compose
from qwlit.config.remedies import DIVERGED_LR
from tests.faults.test_checkpoints import chat  # noqa: F401 - a fixture
from tests.faults.test_divergence import pretrained  # noqa: F401 - a fixture
from tests.runs.runs import TINY, qwlit

RUNS = {
    "full": (["recipe=full_sft", "train.max_grad_norm=null"], ["train.max_grad_norm=1.0", "adapter.kind=lora"]),
    "lora": (["recipe=lora"], []),
    "qlora": (["recipe=qlora"], []),
    "freeze": (["recipe=freeze"], []),
    "random": (["recipe=pretrain", "hardware.precision=16-mixed"], ["hardware.precision=32-true"]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_each_remedy_is_accepted_for_the_run_that_stopped(kind, pretrained, chat, tmp_path):  # noqa: F811
    more, expected = RUNS[kind]
    model = TINY if kind == "random" else ["hardware=cpu", f"model.path={pretrained}"]
    # The words that a user types: a warm-up in steps does not go together with one as a ratio.
    words = [*model, f"data.path={chat}", *more, "train.max_steps=30", "optim.lr=1e10", "scheduler.warmup_steps=2"]
    done = qwlit(["train", *words, "preflight.allow=[full_lr]", "guard=strict", "run.name=a"], tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs/a/diagnosis.json").read_text())
    assert all(any(remedy.startswith(word) for remedy in found["remedies"]) for word in expected)
    assert found["command"] in done.stdout and found["module"]["module"] in done.stdout
    program, *command = found["command"].split()
    assert program == "qwlit" and command[0] == "train"
    for remedy in found["remedies"]:
        planned = qwlit(["plan", *command[1:], *remedy.split()], tmp_path)
        assert planned.returncode == 0, (remedy, planned.stderr)


def test_a_remedy_for_a_run_that_diverged_is_no_higher_than_the_learning_rate_of_the_recipe():
    recipes = {"full": "full_sft", "lora": "lora", "random": "pretrain"}
    rates = {
        kind: compose(["model=demo", "data=demo", f"recipe={name}"]).config.optim.lr for kind, name in recipes.items()
    }
    assert all(DIVERGED_LR[kind] <= rate for kind, rate in rates.items())
