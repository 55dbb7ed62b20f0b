"""`verify`: equal runs get a certificate; other seeds, data and threads do not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from qwlit.core.errors import ConfigError, QwlitError
from qwlit.run.difference import compare_runs
from qwlit.run.locate import Replay, locate, unlike_itself
from qwlit.run.verify import certify, differing_entries, first_difference, read_steps
from tests.long import LONG
from tests.runs.runs import DEMO, ENVIRONMENT, TINY, qwlit, qwlit_process, rows, train

long = pytest.mark.skipif(not LONG, reason="QWLIT_LONG is not set")
WORDS = [*TINY, "recipe=pretrain", "dropout=pretrain", "train.max_steps=12", "train.max_epochs=null"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with chat.jsonl, with a copy in which one answer has another digit, and with the run `a`."""
    folder = tmp_path_factory.mktemp("verify")
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:64]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    row = json.loads(lines[5])
    row["messages"][-1]["content"] += "7"
    lines[5] = json.dumps(row, ensure_ascii=False)
    (folder / "changed.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train([*WORDS, "data.path=chat.jsonl", "run.name=a", "trace.every_steps=1", "trace.weights_every_steps=4"], folder)
    return folder


def certificate(place, name) -> dict:
    return json.loads((place / "runs" / f"{name}-verify" / "certificate.json").read_text())


def test_two_processes_that_train_the_same_get_a_certificate(place):
    words = ["verify", *WORDS, "data.path=chat.jsonl", "run.name=b", "steps=4", "repeats=2", "hardware.devices=2"]
    done = qwlit_process(words, place, timeout=300)
    assert done.returncode == 0, done.stderr
    found = certificate(place, "b")
    assert (found["equal"], found["compared_steps"], len(found["runs"])) == (True, 4, 2)
    assert found["circumstances"]["attention"] == "sdpa" and found["circumstances"]["devices"] == 2
    text = (place / "runs/b-verify/certificate.txt").read_text()
    assert "equal to the bit" in text and "torch 2" in text
    traces = [rows(place / "runs/b-verify" / f"repeat-{number}", "trace.jsonl") for number in (1, 2)]
    assert traces[0] == traces[1] and "parameters" in traces[0][-1]
    assert not (place / "runs/b-verify/repeat-1/export").exists()


def test_a_run_is_repeated_with_its_schedule_and_compared_with_its_trace(place):
    done = qwlit_process(["verify", "run=a", "steps=8"], place)
    assert done.returncode == 0, done.stderr
    assert certificate(place, "a")["compared_steps"] == 8
    # Its weights too, where the run has hashed them: at steps 4 and 8.
    assert rows(place / "runs/a-verify/repeat-1", "trace.jsonl") == rows(place / "runs/a", "trace.jsonl")[:8]
    # The same learning rates as in the whole run.
    assert rows(place / "runs/a")[6]["optim/lr"] == rows(place / "runs/a-verify/repeat-1")[6]["optim/lr"]


@pytest.mark.parametrize(
    ("words", "environment", "quantity", "said"),
    [
        (["seed=1"], {}, "samples", "seed 0 against 1"),
        (["data.path=changed.jsonl"], {}, "loss_sum", "data file chat.jsonl"),
        pytest.param([], {"OMP_NUM_THREADS": "2"}, None, "1 thread against 2", marks=long),
    ],
    ids=["seed", "one changed row", "threads"],
)
def test_what_is_not_the_same_is_no_certificate_and_is_named(place, words, environment, quantity, said):
    done = qwlit_process(["verify", "run=runs/a", "steps=8", *words], place, environment=ENVIRONMENT | environment)
    assert said in " ".join(done.stdout.split())
    found = certificate(place, "a")
    if quantity is None and done.returncode == 0:
        return  # on some machines the number of threads changes no sum
    assert done.returncode == 4 and found["equal"] is False
    assert quantity in (None, found["difference"]["quantity"])
    assert done.stderr.startswith(f"qwlit verify: not equal: step {found['difference']['step']} differs in")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=none"], "neither none nor runs/none is the folder of a run"),
        (["run="], "run is empty; is a shell variable unset?"),
        (["run=untraced"], "run=untraced: it has no trace.jsonl to compare with"),
        (["repeats=1", *WORDS], "repeats=1: give a whole number of at least 2"),
        ([*WORDS, "data.path=chat.jsonl", "run.name=mine", "steps=2"], "exists and is not a verification"),
    ],
)
def test_what_is_wrong_ends_in_one_line(place, words, said):
    (place / "runs/mine-verify").mkdir(exist_ok=True)
    (place / "runs/mine-verify/notes.txt").write_text("x")
    (place / "runs/untraced").mkdir(exist_ok=True)
    (place / "runs/untraced/config.yaml").touch()
    done = qwlit(["verify", *words], place)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert (place / "runs/mine-verify/notes.txt").exists()


def record(step, **changes):
    return {"step": step, "samples": "a", "loss_sum": "b", "grad_norm": "c"} | changes


def test_the_first_difference_is_found_among_the_steps_that_all_traces_have():
    one = [record(step) for step in range(1, 6)]
    other = [record(1), record(2), record(3, grad_norm="x"), record(4, samples="y")]
    steps, found = first_difference([one, one, other])
    assert steps == 4 and (found.step, found.quantity, found.values) == (3, "grad_norm", ("c", "c", "x"))
    # A hash of the weights that only one of them has is no difference.
    assert first_difference([one, [record(1, parameters="p"), *one[1:]]]) == (5, None)


def test_a_number_that_is_not_finite_in_one_run_is_a_difference_and_a_damaged_record_is_passed_over(tmp_path):
    losses = [[{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": loss}] for loss in (None, 2.0)]
    assert first_difference(losses, ["train/loss"])[1].values == (None, 2.0)
    assert first_difference([losses[0], losses[0]], ["train/loss"]) == (2, None)
    assert first_difference([[record(1, loss_sum=[1])], [record(1)]])[1].quantity == "loss_sum"
    (tmp_path / "trace.jsonl").write_text('{"samples": "a"}\n{"step": "2"}\n{"step": 3}\n{"step":')
    assert read_steps(tmp_path / "trace.jsonl") == [{"step": 3}]


def test_settings_of_a_model_from_a_folder_are_not_listed_against_those_of_a_preset(tmp_path):
    for name, text in [("a", "{hidden_size: 64, vocab_size: 9}"), ("b", "{hidden_size: null, vocab_size: null}")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"seed: 1\nmodel: {{path: {name}, architecture: {text}}}\n")
        (tmp_path / name / "trace.jsonl").write_text(json.dumps(record(1)) + "\n")
    assert compare_runs(tmp_path / "a", tmp_path / "b").circumstances == [
        "model.path a against b",
        f"model.architecture of {tmp_path / 'b'} is that of its model's folder; the other run sets 2 of its keys",
    ]
    for text in ("[1", "- 1", ""):
        (tmp_path / "b/config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="restore it"):
            compare_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"devices": 2}, "other numbers of ranks"),
        ({"parameters": {"total": 9, "trainable": 2}}, "the models differ"),
    ],
)
def test_runs_whose_modules_compute_other_things_are_not_replayed(other, said, tmp_path):
    manifest = {"devices": 1, "num_nodes": 1, "parameters": {"total": 9, "trainable": 9}}
    for name, found in (("a", manifest), ("b", manifest | other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(QwlitError, match=f"not replayed: {said}"):
        locate([tmp_path / "a", tmp_path / "b"], 1, tmp_path, lambda *_: pytest.fail("it was replayed"))


def test_a_replay_that_does_not_repeat_its_run_says_what_is_not_as_it_was(tmp_path):
    then = {"data_files": {"a.jsonl": "1" * 64}, "variables": {}, "compiled": True}
    now = then | {"data_files": {"a.jsonl": "2" * 64}, "variables": {"OMP_NUM_THREADS": "1"}}
    replay = Replay(tmp_path / "x", tmp_path / "scratch", None)
    for folder, manifest, loss in ((replay.run, then, "a"), (replay.folder.path, now, "b")):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "trace.jsonl").write_text(json.dumps(record(1, loss_sum=loss)) + "\n")
    assert unlike_itself(replay, 1) == (
        f"the replay of {replay.run} does not repeat its own trace: step 1, loss_sum; data file a.jsonl 11111111"
        " against 22222222; a replay runs compiled layers uncompiled"
    )


def test_a_replay_sets_the_variables_and_threads_of_its_run_and_no_other_variable(tmp_path):
    variables = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "8", "LD_PRELOAD": "x.so"}
    for threads, expected in ((2, "2"), ("x; rm", "8")):
        (tmp_path / "manifest.json").write_text(json.dumps({"num_threads": threads, "variables": variables}))
        found = Replay(tmp_path, tmp_path / "scratch", None).environment((1, 2), None)
        assert (found["MKL_CBWR"], found["OMP_NUM_THREADS"]) == ("COMPATIBLE", expected)
        assert "LD_PRELOAD" not in found


def test_what_changed_between_the_repeats_of_a_verification_is_named(tmp_path, monkeypatch):
    def trained(overrides, steps, folder, number, **_):
        run = folder.path / f"repeat-{number}"
        run.mkdir()
        (run / "trace.jsonl").write_text(json.dumps(record(1)) + "\n")
        (run / "manifest.json").write_text(json.dumps({"num_threads": number}))

    monkeypatch.setattr("qwlit.commands.verify._train", trained)
    done = qwlit(["verify", *WORDS, "run.name=x", "repeats=2"], tmp_path)
    assert done.returncode == 0 and "not as in runs/x-verify/repeat-1: 1 thread against 2" in done.stdout


def test_without_a_common_step_nothing_is_certified(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"no step is in every trace\.jsonl"):
        certify([tmp_path / "a", tmp_path / "b"])


def test_a_faked_version_of_a_package_is_named():
    first = {"packages": {"torch": "2.13.0", "numpy": "2"}, "seed": 1}
    second = {"packages": {"torch": "2.15.0", "numpy": "2"}, "seed": 1}
    assert differing_entries(first, second) == ["torch 2.13.0 against 2.15.0"]


def test_what_differs_is_said_in_words_and_what_only_one_has_recorded_is_not():
    first = {"attention": "sdpa", "num_threads": 8, "packages": {"torch": "2"}, "data": "1" * 16, "variables": {}}
    first |= {"data_files": {"a.jsonl": "2" * 64}, "compiled": False}
    first |= {"cpu": {"flags": "avx fma"}, "git": {"commit": "a" * 40, "dirty": False}}
    second = {"attention": "eager", "num_threads": 2, "packages": {"torch": "2", "jinja2": "3"}, "data": "3" * 16}
    second |= {"variables": {"NCCL_ALGO": "Ring"}, "data_files": {"a.jsonl": "4" * 64}, "seed": 1, "compiled": True}
    second |= {"git": {"commit": "b" * 40, "dirty": True, "changes": "5"}, "cpu": {"flags": "avx avx2"}}
    assert differing_entries(first, second) == [
        "commit aaaaaaaa against bbbbbbbb",
        "uncommitted changes no against yes",
        "processor flags fma against avx2",
        "NCCL_ALGO none against Ring",
        "attention sdpa against eager",
        "compiled no against yes",
        "8 threads against 2",
        "data file a.jsonl 22222222 against 44444444",
        "tokenized data 11111111 against 33333333",
    ]


def test_a_run_from_another_ones_config_names_what_is_not_as_it_was(place):
    again = ["train", "config=runs/a/config.yaml", "train.max_steps=2", "run.overwrite=true"]
    done = qwlit([*again, "run.name=again"], place)
    assert done.returncode == 0 and "not as in" not in done.stdout
    other = place / "faked"
    other.mkdir()
    manifest = json.loads((place / "runs/a/manifest.json").read_text())
    manifest["packages"]["torch"], manifest["num_threads"] = "2.15", 8
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "config.yaml").write_text((place / "runs/a/config.yaml").read_text())
    done = qwlit([*again, "run.name=again", "config=faked/config.yaml", "model.attention=eager"], place)
    said = [line.split("not as in faked: ")[1] for line in done.stdout.splitlines() if "not as in" in line]
    assert said == [f"torch 2.15 against {torch.__version__}", "attention sdpa against eager", "8 threads against 1"]


def test_diff_names_the_first_step_the_place_in_it_and_the_circumstances(place):
    more = ["data.path=chat.jsonl", "trace.every_steps=1"]
    train([*WORDS, *more, "run.name=same"], place)
    done = qwlit(["diff", "a=a", "b=runs/same"], place)
    assert done.returncode == 0 and "equal to the bit, over 12 steps" in done.stdout
    train([*WORDS, *more, "run.name=warm", "scheduler.warmup_steps=5"], place)
    train([*WORDS, *more, "run.name=warmer", "scheduler.warmup_steps=6"], place)
    done = qwlit_process(["diff", "a=warm", "b=warmer"], place)
    said = " ".join(done.stdout.split())
    # The first step trains at other learning rates, so the second one has another loss.
    assert done.returncode == 4 and "first difference step 2, loss_sum" in said and "equal up to step 1" in said
    assert "the forward pass, or the weights before the step" in said
    values = [rows(place / "runs" / name, "trace.jsonl")[1]["loss_sum"] for name in ("warm", "warmer")]
    shown = re.findall(r"warm\w*: ([\d.]+) \(bits (\w+)\)", said)
    assert [np.float32(number).byteswap().tobytes().hex() for number, _ in shown] == values == [b for _, b in shown]
    # The replay finds it in the step before, whose weights the trace does not have.
    assert "step 1: the optimizer step" in said and "its gradient is the same" in said
    assert "scheduler.warmup_steps 5 against 6" in said
    assert done.stderr.startswith("qwlit diff: runs/warm and runs/warmer differ from step 1 on")


def test_diff_compares_logged_numbers_where_there_is_no_trace(place):
    train([*WORDS, "data.path=chat.jsonl", "run.name=plain"], place)
    train([*WORDS, "data.path=chat.jsonl", "run.name=other", "seed=3"], place)
    done = qwlit(["diff", "a=plain", "b=other", "replay=false"], place)
    assert done.returncode == 4 and "step 1, train/loss" in done.stdout and "seed 0 against 3" in done.stdout
    for words in (["a=plain"], ["a=plain", "b=nothing"], ["a=plain", "b=other", "seed=1"]):
        wrong = qwlit(["diff", *words], place)
        assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1


def test_diff_names_the_samples_of_another_order_and_the_token_of_a_changed_row(place):
    more = [*WORDS, "trace.every_steps=1"]
    train([*more, "data.path=chat.jsonl", "run.name=seed5", "seed=5"], place)
    done = qwlit(["diff", "a=a", "b=seed5"], place)
    assert done.returncode == 4 and "only runs/a trains on" in done.stdout and "chat.jsonl:" in done.stdout
    train([*more, "data.path=changed.jsonl", "run.name=row"], place)
    done = qwlit_process(["diff", "a=a", "b=row", "output=json"], place)
    assert done.returncode == 4, done.stderr
    found = json.loads(done.stdout)
    assert (found["place"]["phase"], found["place"]["step"]) == ("the data", found["difference"]["step"])
