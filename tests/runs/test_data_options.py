"""Options of the data on the command line, each against the same data written by hand or a separate run."""

import json
import re
import shlex
from pathlib import Path

import lightning.pytorch as lightning
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoTokenizer

import qwlit as interface
from tests.runs.runs import DEMO, TINY, qwlit, rows, summary, train

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SHORT = ["train.max_steps=2", "data.val_fraction=0.2", "train.global_batch_size=4"]


def inspected_samples(folder, *words):
    done = qwlit(["inspect", *TINY, *words, "output=json"], folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def inspected(folder, *words):
    """The tokens of every training sample."""
    return [sample["input_ids"] for sample in inspected_samples(folder, *words)]


def refused(folder, *words):
    done = qwlit(["inspect", *TINY, *words], folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_file_with_other_names_is_inspected_as_the_same_file_renamed(place):
    (place / "own.csv").write_text("question,answer\n1 + 1?,2\n一加二？,三\n", encoding="utf-8")
    (place / "renamed.csv").write_text("instruction,output\n1 + 1?,2\n一加二？,三\n", encoding="utf-8")
    columns = "data.columns={instruction: question, output: answer}"
    assert inspected(place, "data.path=own.csv", columns) == inspected(place, "data.path=renamed.csv")
    assert "columns here: 'instruction', 'output'" in refused(place, "data.path=renamed.csv", columns)


def test_a_system_text_is_in_the_training_and_in_the_export_as_a_system_turn_of_each_row_would_be(place):
    chats = [json.loads(line)["messages"] for line in (place / "chat.jsonl").read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    system = "data.system=Add, 不要解释."
    explicit = [[{"role": "system", "content": "Add, 不要解释."}, *chat] for chat in chats]
    expected = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in explicit]
    assert inspected(place, "data.path=chat.jsonl", system) == expected
    assert inspected(place, "data.path=chat.jsonl") != expected, "without the text the stored tokens are others"
    run = train([*SHORT, "data.path=chat.jsonl", system, "run.name=a", "data.exact_match=2"], place)
    exported = AutoTokenizer.from_pretrained(run / "export")
    assert [exported.apply_chat_template(chat, return_dict=False) for chat in chats] == expected
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    assert all(sample["prompt"].startswith("<|im_start|>system\nAdd, 不要解释.<|im_end|>") for sample in samples)


def validations(run):
    """The records of metrics.jsonl with the numbers of a validation: step and numbers."""
    found = [record for record in rows(run) if "val/loss" in record]
    return [(r["step"], {key: value for key, value in r.items() if key.startswith("val/")}) for r in found]


def test_named_validation_sets_have_the_losses_of_separate_runs_and_their_mean_over_tokens(place):
    lines = (place / "chat.jsonl").read_text("utf-8").splitlines()
    files = {"a.jsonl": lines[:20], "math.jsonl": lines[20:27], "b.jsonl": lines[27:36], "c.jsonl": lines[36:]}
    for name, part in files.items():
        (place / name).write_text("\n".join(part), encoding="utf-8")
    words = ["data.path=a.jsonl", "train.max_steps=3", "validation.every_steps=1", "train.global_batch_size=4"]
    words += ["dropout=none", "data.exact_match=0"]
    sets = {"math": "math.jsonl", "long-chat_2": "[b.jsonl,c.jsonl]"}
    typed = "data.val_path={math: math.jsonl, long-chat_2: [b.jsonl,c.jsonl]}"
    run = train([*words, typed, "run.name=all"], place)
    alone = {name: train([*words, f"data.val_path={path}", f"run.name={name}"], place) for name, path in sets.items()}
    together = train([*words, "data.val_path=[math.jsonl,b.jsonl,c.jsonl]", "run.name=one"], place)
    tokens = {
        name: sum(sample["num_supervised_tokens"] for sample in inspected_samples(place, f"data.path={path}"))
        for name, path in sets.items()
    }
    assert tokens["math"] != tokens["long-chat_2"]
    for number, (step, found) in enumerate(validations(run)):
        separate = {name: validations(other)[number][1]["val/loss"] for name, other in alone.items()}
        mean = sum(separate[name] * tokens[name] for name in sets) / sum(tokens.values())
        assert found.keys() == {"val/loss", "val/accuracy", "val/math/loss", "val/long-chat_2/loss"}
        assert {name: found[f"val/{name}/loss"] for name in sets} == pytest.approx(separate, rel=1e-6), step
        assert found["val/loss"] == pytest.approx(mean, rel=1e-6)
        # The set without names validates the same samples, but in other micro-batches.
        assert found["val/loss"] == pytest.approx(validations(together)[number][1]["val/loss"], rel=1e-6)
    best = min((found for _, found in validations(run)), key=lambda found: found["val/loss"])
    assert summary(run)["val_loss_best"] == best["val/loss"]
    assert {name: summary(run)[f"val_loss_best/{name}"] for name in sets} == {n: best[f"val/{n}/loss"] for n in sets}
    assert not any("/" in key for key in summary(together))


class Watch(lightning.Callback):
    """Keeps the callback metrics of each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append({key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("val/")})


def test_a_trainer_of_ones_own_and_loggers_get_the_loss_of_each_named_set(place, monkeypatch):
    monkeypatch.chdir(place)
    words = [*TINY, "data.path=chat.jsonl", "data.val_path={a: chat.jsonl, b: chat.jsonl}", "train.max_steps=2"]
    words += ["data.max_samples=5", "train.global_batch_size=4", "dropout=none", "validation.every_steps=1"]
    ours, theirs, logger = Watch(), Watch(), CSVLogger(place / "csv")
    run = interface.train(*words, "run.name=ours", callbacks=[ours], loggers=[logger])
    module, data = interface.lightning_modules(*words)
    best = ModelCheckpoint(place / "saved", "{step}", monitor="val/b/loss")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=2, val_check_interval=1, callbacks=[theirs, best], **quiet)
    trainer.fit(module, data)
    recorded = [{key: v for key, v in found.items() if key != "val/accuracy"} for _, found in validations(run.path)]
    assert [pytest.approx(found, rel=1e-6) for found in recorded] == ours.seen == theirs.seen
    assert set(recorded[0]) == {"val/loss", "val/a/loss", "val/b/loss"}
    assert best.best_model_score == min(found["val/b/loss"] for found in theirs.seen)
    header = (place / "csv/lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert {"val/loss", "val/a/loss", "val/b/loss"} <= set(header.split(","))


SHOWN = re.findall(
    r"^qwlit (\w+) (.*data\.(?:system|columns|max_samples|val_path=\{).*)$", PAGE.read_text("utf-8"), re.M
)


@pytest.mark.parametrize(("subcommand", "words"), SHOWN)
def test_the_examples_in_the_documents_run(subcommand, words, place):
    (place / "qa.csv").write_text("question,answer\n1 + 1?,2\n", encoding="utf-8")
    for name in ("math", "a", "b"):
        (place / f"{name}.jsonl").write_bytes((place / "chat.jsonl").read_bytes())
    # `plan` reads the data as `train` does; FOLDER stands for a model's folder.
    subcommand = {"train": "plan"}.get(subcommand, subcommand)
    done = qwlit([subcommand, *TINY, *shlex.split(words.replace(" model.path=FOLDER", ""))], place)
    assert done.returncode == 0, done.stderr
    assert len(SHOWN) == 4
