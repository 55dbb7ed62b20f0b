"""lm-eval measures an exported folder by the command and the task of the documents, and gets the run's own answers.

Takes minutes to install an environment of its own, so it runs only with QWLIT_LONG=1; QWLIT_LM_EVAL names the python of
one that is there already.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, qwlit, train

PYTHON = os.environ.get("QWLIT_LM_EVAL")
pytestmark = pytest.mark.skipif(not (LONG or PYTHON), reason="installs lm-eval: QWLIT_LONG=1")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "after-training.md").read_text("utf-8")
GREEDY = ["generation.temperature=0", "generation.max_new_tokens=64"]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    if PYTHON:
        return PYTHON
    place = tmp_path_factory.mktemp("lm-eval")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = ["install", "--quiet", "-c", "constraints.txt", "-e", ".[lm-eval]"]
    subprocess.run([place / "bin" / "pip", *install], cwd=ROOT, check=True)
    return str(place / "bin" / "python")


def test_lm_eval_gets_the_answers_of_the_run_and_scores_them_as_evaluate_does(python, tmp_path):
    prompts = [f"{number} km?" for number in range(8)]
    rows = [{"prompt": prompt, "completion": f"{prompt[0]} kilometers"} for prompt in prompts]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    words = ["data.path=chat.jsonl", "run.name=demo", "optim.lr=3e-3", "dropout=none", "train.max_steps=60"]
    train([*words, "train.global_batch_size=8", "scheduler.warmup_steps=5"], tmp_path)
    # One of the rows has another answer than the model gives.
    rows[3]["completion"] = "none"
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert qwlit(["generate", "run=demo", "prompts=test.jsonl", "output=own.jsonl", *GREEDY], tmp_path).returncode == 0
    measured = ["evaluate", "run=demo", "data.path=test.jsonl", "metrics=exact_match", *GREEDY]
    assert qwlit(measured, tmp_path).returncode == 0

    (tmp_path / "own_rows.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])
    (shown,) = re.findall(r"^lm-eval (run .+)$", PAGE, re.M)
    done = subprocess.run(
        [python, "-m", "lm_eval", *shlex.split(shown), "--device", "cpu", "--log_samples"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "lm-eval").rglob("results_*.json")
    (samples,) = (tmp_path / "lm-eval").rglob("samples_*.jsonl")
    own = [json.loads(line)["answer"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    asked = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in asked] == own
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["models"]["demo"]
    (score,) = evaluation["quality"]["non_thinking"]["exact_match"]
    assert json.loads(results.read_text())["results"]["own_rows"]["exact_match,none"] == score["score"]
    assert 0.5 < score["score"] < 1
