"""`plan` from the command line, and the preflight of `train`."""

import json
import re
from pathlib import Path

import pytest

from qwlit.config.compose import compose
from qwlit.model.flops import count_flops
from qwlit.model.load import model_shape
from qwlit.model.presets import meta_causal_lm
from qwlit.planning import run_plan
from tests.runs.runs import TINY, qwlit, rows

ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / page).read_text("utf-8") for page in ("README.md", "docs/plan.md"))


def planned(words: list[str], folder: Path) -> dict:
    done = qwlit(["plan", "output=json", *words], folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shown_plans() -> list[tuple[str, str]]:
    return re.findall(r"^\$ qwlit plan (.+)\n((?:.*\n)+?)```", PAGES, re.M)


def comparable(text: str) -> list[str]:
    """Leave out why data were not looked at: the hub's answer differs from place to place."""
    return [line.rstrip() for line in text.splitlines() if line.strip() and "not checked" not in line]


@pytest.mark.parametrize(("words", "output"), shown_plans(), ids=[words for words, _ in shown_plans()])
def test_the_documents_show_what_plan_prints(words, output, tmp_path):
    done = qwlit(["plan", *words.split()], tmp_path)
    assert done.returncode == 0, done.stderr
    assert comparable(done.stdout) == comparable(output)
    assert ("not checked" in done.stdout) and ("not checked" in output)


def test_the_documents_show_five_plans():
    assert len(shown_plans()) == 5


def test_json_has_what_scripts_read(tmp_path):
    plan = planned(["hardware=a100x4", "recipe=full_sft", "model=qwen3_0_6b", "model.attention=sdpa"], tmp_path)
    assert plan["parameters"]["total"] == plan["parameters"]["trainable"] == 596_049_920
    assert plan["memory"]["total_gib"] == pytest.approx(sum(plan["memory"]["components"].values()))
    assert plan["memory"]["components"]["weights"] == pytest.approx(596_049_920 * 4 / 2**30)
    assert plan["fits"] is (plan["memory"]["total_gib"] <= plan["memory"]["device_gib"])
    sizes = [plan[key] for key in ("global_batch_size", "micro_batch_size", "accumulate_grad_batches", "devices")]
    assert sizes == [16, 4, 1, 4]
    assert (plan["num_nodes"], plan["strategy"], plan["precision"]) == (1, "ddp", "bf16-mixed")
    assert plan["steps"] == 1500 and plan["warmup_steps"] == 150
    assert plan["flops_per_token"] > 3e9
    assert {"name", "severity", "message", "remedy"} == set(plan["findings"][0])
    assert "Qwen/Qwen3-0.6B" in plan["not_checked"]


@pytest.mark.parametrize(
    ("profile", "accumulation"), [("rtx4090", 8), ("a100", 4), ("a100x2", 2), ("a100x4", 1), ("a100x4n2", 1)]
)
def test_accumulation_follows_from_batch_devices_and_micro_batch(profile, accumulation, tmp_path):
    assert planned([f"hardware={profile}"], tmp_path)["accumulate_grad_batches"] == accumulation


def test_with_tokenizer_and_data_at_hand_the_steps_are_those_of_train(tmp_path):
    words = ["experiment=demo", *TINY, "train.max_steps=null", "train.max_epochs=1", "hardware.micro_batch_size=8"]
    plan = planned(words, tmp_path)
    assert plan["not_checked"] is None
    assert plan["steps"] == 250 and plan["accumulation"] == {"min": 4, "median": 4, "max": 4}
    assert plan["padding_share"] == 0
    assert plan["tokens"] > 100_000
    limited = planned([*words, "hardware.micro_batch_size=null", "hardware.micro_batch_tokens=900"], tmp_path)
    seen = limited["accumulation"]
    assert seen["min"] <= limited["accumulate_grad_batches"] <= seen["max"] and seen["min"] < seen["max"]


def test_padding_is_said_where_there_is_some(tmp_path):
    padded = planned(["experiment=demo", *TINY, "data.packing=false", "hardware.micro_batch_size=8"], tmp_path)
    assert 0 < padded["padding_share"] < 0.5


def test_time_is_of_the_stated_share_of_the_peak(tmp_path):
    words = ["experiment=demo", "hardware=h100", "dropout=none"]
    plan = planned([*words, "mfu=0.5"], tmp_path)
    assert plan["seconds"] == pytest.approx(plan["tokens"] * plan["flops_per_token"] / (0.5 * 989e12))
    assert planned([*words, "mfu=0.25"], tmp_path)["seconds"] == pytest.approx(2 * plan["seconds"])


def test_what_would_make_it_fit_does(tmp_path):
    words = ["recipe=full_sft", "model=qwen2_5_7b", "hardware=rtx4090"]
    plan = planned(words, tmp_path)
    assert plan["fits"] is False
    assert [remedy["overrides"] for remedy in plan["would_fit"]] == [["recipe=lora"], ["recipe=qlora"]]
    for remedy in plan["would_fit"]:
        smaller = planned([*words, *remedy["overrides"]], tmp_path)
        assert smaller["fits"] and smaller["memory"]["total_gib"] == pytest.approx(remedy["total_gib"])


def test_plan_leaves_nothing_but_tokenized_data(tmp_path):
    planned(["experiment=demo", *TINY], tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".store"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output=jsonn"], r"output=jsonn: choose one of text, json\. Did you mean 'json'\?"),
        (["mfu=2"], r"mfu=2: give the share of the devices' peak"),
        (["optim.lrr=1"], r"optim\.lrr"),
        (["freeze.parameters=[nothing_such]"], r"nothing_such"),
        (["hardware=a100x4", "recipe=qlora", "hardware.strategy=fsdp"], r"cannot be sharded"),
    ],
)
def test_wrong_words_end_in_one_line(words, said, tmp_path):
    done = qwlit(["plan", *words], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and re.search(said, done.stderr), done.stderr


def test_much_data_is_left_to_inspect_to_tokenize(tmp_path, monkeypatch):
    monkeypatch.setattr(run_plan, "MOST_BYTES", 10)
    words = ["experiment=demo", *TINY]
    before = planned(words, tmp_path)
    assert "not tokenized yet" in before["not_checked"] and before["steps"] == 1000
    assert qwlit(["inspect", *words, "output=json"], tmp_path).returncode == 0
    after = planned(words, tmp_path)
    assert after["not_checked"] is None and after["steps"] == 1000


def test_data_that_are_elsewhere_are_not_checked_and_data_that_are_bad_are_refused_as_by_train(tmp_path):
    assert "gone.jsonl" in planned(["model=demo", "data.path=gone.jsonl"], tmp_path)["not_checked"]
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n' * 5)
    done = qwlit(["plan", "model=demo", "data.path=bad.jsonl"], tmp_path)
    assert done.returncode == 2 and "5 of 5 rows cannot be used" in done.stderr


def test_remedies_are_planned_on_the_same_data(tmp_path):
    rows = [{"input_ids": [1] * (1500 if number % 40 == 0 else 20)} for number in range(160)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "model=qwen3_0_6b",
        "model.init=random",
        "dropout=none",
        "hardware.activation_checkpointing=none",
        "hardware.offload_optimizer=false",
        "data.path=long.jsonl",
    ]
    words += ["hardware=rtx4090", "hardware.micro_batch_size=8", "hardware.gpu_memory_gb=14", "data.loss_on=all"]
    words += ["model.tokenizer=qwlit:demo/tokenizer"]
    plan = planned(words, tmp_path)
    assert plan["fits"] is False and plan["would_fit"]
    for remedy in plan["would_fit"]:
        smaller = planned([*words, *remedy["overrides"]], tmp_path)
        assert smaller["fits"] and smaller["memory"]["total_gib"] == pytest.approx(remedy["total_gib"])


def test_flops_a_token_are_those_of_the_data(tmp_path):
    rows = [{"input_ids": list(range(5, 5 + length))} for length in (500, 20, 20, 20)] * 4
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = planned(["model=demo", "data.path=d.jsonl", "data.loss_on=all", "train.max_epochs=1"], tmp_path)
    flops = count_flops(meta_causal_lm(model_shape(compose(["model=demo"]).config.model)))
    lengths = [len(row["input_ids"]) for row in rows]
    num_tokens, num_pairs = sum(lengths), sum(length**2 for length in lengths) / 2
    exact = flops.of(num_tokens=num_tokens, num_supervised_tokens=num_tokens - len(rows), num_token_pairs=num_pairs)
    assert plan["flops_per_token"] == pytest.approx(exact / num_tokens)


def test_train_refuses_what_a_rule_condemns_before_it_reads_data_and_allows_it_by_name(tmp_path):
    words = ["model=qwen3_0_6b", "hardware=cpu", "optim.lr=3e-4", "data.path=none.jsonl"]
    done = qwlit(["train", *words], tmp_path)
    assert done.returncode == 2
    assert "pretrained weights diverge above 0.0001; set optim.lr=1e-5, or model.init=random" in done.stderr
    done = qwlit(["train", *words, "preflight.allow=[full_lr]"], tmp_path)
    assert done.returncode == 2 and "none.jsonl" in done.stderr


def test_warnings_are_shown_at_the_start_and_kept(tmp_path):
    done = qwlit(
        ["train", "experiment=demo", *TINY, "train.max_steps=3", "train.max_grad_norm=null", "run.name=r"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "no_clip  train.max_grad_norm=null: gradients are not clipped; set train.max_grad_norm=1.0" in done.stdout
    found = {row["name"]: row for row in rows(tmp_path / "runs" / "r", "events.jsonl") if row["event"] == "finding"}
    assert found["no_clip"]["severity"] == "warning" and found["no_clip"]["remedy"]
    assert "few_steps" in found
