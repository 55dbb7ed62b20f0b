"""`export`: what plain transformers computes from the folder is what the run computed; a fault makes the proof fail.

All combinations and faults: `QWLIT_LONG=1 pytest -n 0 -s tests/runs/test_export.py`; -s prints the largest differences.
Where a test takes `here`, plain transformers compute in this process, because a fresh one imports for five seconds.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwlit.config.compose import compose
from qwlit.core.errors import NotEqual
from qwlit.core.files import replacing_folder
from qwlit.inference import plain_proof
from qwlit.inference.export import write_model
from qwlit.inference.merge import base_weights
from qwlit.inference.model_card import model_card
from qwlit.inference.proof import Proof, _compare_logits, hash_files
from qwlit.model.quantize import BLOCK
from qwlit.model.saved_adapter import SavedAdapter
from tests import published
from tests.long import LONG
from tests.runs.runs import DEMO, in_this_process, qwlit, qwlit_process

MODELS = {"qwen2_tied": "Qwen2.5-0.5B-Instruct", "qwen2_untied": "Qwen2.5-7B-Instruct", "qwen3": "Qwen3-0.6B"}
REAL = {"qwen3_real": "Qwen3-0.6B"}
TEXT_END, END = 511, 513
"""<|endoftext|> and <|im_end|> of the demo's tokenizer."""
CHATS = [[{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}。"}] for n in range(24)]
FAST = [
    *("hardware=cpu", "preflight.allow=[full_lr]", "dropout=none", "data.val_fraction=0.2", "train.max_steps=3"),
    *("train.global_batch_size=4", "scheduler=constant", "scheduler.warmup_steps=0", "data.exact_match=2"),
]
RECIPES = {
    "full": ["recipe=full_sft", "optim.lr=1e-3"],
    "lora": ["recipe=lora", "optim.lr=1e-2"],
    "qlora": ["recipe=qlora", "optim.lr=1e-2"],
}
SHARDED = ["hardware.strategy=fsdp", "hardware.devices=2"]
slow = pytest.mark.skipif(not LONG, reason="QWLIT_LONG=1")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, real_tokenizer_folder):
    """A function from a key of MODELS to a folder as published, small, in bfloat16.

    Beside the one with the real vocabulary, which takes seconds to read, they have that of the demo.
    """
    place = tmp_path_factory.mktemp("bases")

    def made(kind: str) -> Path:
        folder = place / kind
        if not folder.exists():
            ends = {"eos_token_id": [END, TEXT_END], "pad_token_id": TEXT_END, "do_sample": True, "temperature": 0.1}
            small = {"intermediate_size": 2 * BLOCK}
            with pytest.MonkeyPatch.context() as patch:
                if kind != "qwen3_real":
                    small |= {"vocab_size": 576, "eos_token_id": END, "bos_token_id": TEXT_END}
                    patch.setattr(published, "generation_of", lambda name: ends)
                patch.setattr(published, "SMALL", published.SMALL | small)
                tokenizer = real_tokenizer_folder if kind == "qwen3_real" else lambda family: DEMO / "tokenizer"
                published.published_folder((MODELS | REAL)[kind], folder, tokenizer)
        return folder

    return made


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """A function from model, recipe and further words to a run of three steps; each is trained once."""
    runs: dict[Any, Path] = {}

    def made(kind: str, recipe: str, *words: str) -> Path:
        if (key := (kind, recipe, words)) not in runs:
            place = tmp_path_factory.mktemp("runs")
            rows = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in CHATS)
            (place / "chats.jsonl").write_text(rows, encoding="utf-8")
            run = qwlit_process if SHARDED[0] in words else qwlit
            asked = [f"model.path={bases(kind)}", f"data.path={place / 'chats.jsonl'}", "run.name=a"]
            done = run(["train", *FAST, *RECIPES[recipe], *asked, *words], place)
            assert done.returncode == 0, done.stdout + done.stderr
            runs[key] = place / "runs" / "a"
        return runs[key]

    return made


@pytest.fixture
def here(monkeypatch):
    """Makes the proof in this process."""
    monkeypatch.setattr("qwlit.inference.proof.run_plainly", in_this_process)
    monkeypatch.setattr(plain_proof, "imports_qwlit", lambda: False)


def exported(run: Path, *words: str, code: int = 0) -> tuple[Path, dict[str, Any]]:
    """Export a run; return the folder and PROOF.json."""
    output = run.parent / "out"
    done = qwlit(["export", f"run={run}", f"output={output}", *words], run.parent)
    assert done.returncode == code, done.stdout + done.stderr
    return output, json.loads((output / "PROOF.json").read_text(encoding="utf-8"))


COMBINATIONS = [
    (kind, recipe, adapter, dtype, strategy)
    for kind in MODELS
    for recipe, adapter in (("full", "merge"), ("lora", "merge"), ("lora", "keep"), ("qlora", "merge"))
    for dtype in (("float32", "bfloat16") if adapter == "merge" else ("auto",))
    for strategy in (((), tuple(SHARDED)) if recipe != "qlora" else ((),))
]


def test_in_a_fresh_process_plain_transformers_computes_what_the_run_did(trained):
    _, proof = exported(trained("qwen3_real", "lora"))
    assert proof["proved"] and proof["checks"]["plain_transformers"]["ok"]


@pytest.mark.parametrize(
    ("kind", "recipe", "adapter", "dtype", "strategy"),
    COMBINATIONS if LONG else [("qwen2_untied", "lora", "merge", "float32", ())],
    ids=lambda value: str(value) if isinstance(value, str) else f"{'fsdp' if value else 'one'}",
)
def test_the_export_is_proved_to_be_the_model_of_the_run(kind, recipe, adapter, dtype, strategy, trained, here):
    run = trained(kind, recipe, *strategy)
    folder, proof = exported(run, f"adapter={adapter}", f"dtype={dtype}", "max_shard_size=100KB")
    logits = proof["checks"]["logits"]
    print(kind, recipe, adapter, dtype, strategy and "fsdp", logits["relative_to_largest_logit"], logits["largest_kl"])
    assert proof["proved"] and all(check["ok"] for check in proof["checks"].values())
    assert logits["relative_to_largest_logit"] <= (2e-2 if dtype == "bfloat16" else 1e-5)
    assert ("merge_as_peft" in proof["checks"]) == (recipe != "full" and adapter == "merge")
    assert proof["of"]["checkpoint"] == (run / "checkpoints" / "best").resolve().name
    assert proof["files"] == hash_files(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((run / "manifest.json").read_text())["data"] in card and "proved, see PROOF.json" in card
    if adapter == "merge":
        assert_layout(folder, kind)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) >= 2
    generation = json.loads((folder / "generation_config.json").read_text())
    assert [generation[key] for key in ("do_sample", "temperature", "top_p", "top_k")] == [True, 0.7, 0.8, 20]
    assert generation["repetition_penalty"] == 1.05 and generation["eos_token_id"] == [END, TEXT_END]


def test_the_card_of_a_model_without_a_base_names_no_licence_of_one(tmp_path):
    config = compose(["model.init=random"]).config
    card = model_card(tmp_path, config, {"of": {}, "proved": None}, None, is_adapter=False)
    assert "licence of the base" in card
    config = replace(config, model=replace(config.model, path=None, hub_id=None))
    card = model_card(tmp_path, config, {"of": {}, "proved": None}, None, is_adapter=False)
    assert "random weights" in card and "licence" not in card


def assert_layout(folder: Path, kind: str) -> None:
    """Every tensor is one that vLLM and llama.cpp's converter read, and none of theirs is missing."""
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    tables = yaml.safe_load((published.CASES / "served_tensors.yaml").read_text(encoding="utf-8"))
    for server, table in tables.items():
        parts = ["all", kind.partition("_")[0], *(["untied"] if kind.endswith("untied") else [])]
        read = {name.format(layer) for part in parts for name in table[part] for layer in range(2)}
        assert names == read, (server, names ^ read)


@slow
def test_qlora_is_merged_into_the_base_as_it_is_stored(trained, bases, here):
    folder, _ = exported(trained("qwen3", "qlora"))
    names = load_file(folder / "model.safetensors")
    base = load_file(bases("qwen3") / "model.safetensors")
    untouched = [name for name in base if "norm" in name or "embed" in name]
    assert all(torch.equal(names[name], base[name]) for name in untouched)
    assert all(names[name].dtype == torch.bfloat16 for name in names)


def adapter_of_peft(base: Path, folder: Path, **form: Any) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **form)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder)
    return folder


FORMS: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "alpha_pattern": {"up_proj": 5},
        "rank_pattern": {"q_proj": 2},
    },
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


@pytest.mark.parametrize("form", FORMS if LONG else ["patterns"])
@pytest.mark.parametrize("dtype", ["float32", "auto"] if LONG else ["auto"])
def test_an_adapter_of_peft_is_merged_into_its_base_as_peft_computes_it(form, dtype, bases, tmp_path, here):
    base = bases("qwen2_tied")
    adapter = adapter_of_peft(base, tmp_path / "adapter", **FORMS[form])
    words = [f"model.path={base}", f"model.adapter_path={adapter}", "output=merged", f"dtype={dtype}"]
    done = qwlit(["merge", "hardware=cpu", *words], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    proof = json.loads((tmp_path / "merged" / "PROOF.json").read_text())
    logits = proof["checks"]["logits"]["relative_to_largest_logit"]
    print(form, dtype, logits, proof["checks"]["merge_as_peft"])
    assert logits <= (1e-5 if dtype == "float32" else 2e-2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(
        torch, "bfloat16" if dtype == "auto" else dtype
    )


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensor(folder: Path, name: str, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = change(state[name].clone())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def flip_one(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 5] = -weight[3, 5]
    return weight


def swap_two_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens([100, 101])
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("im_start|>assistant", "im_start|>Assistant"))


Q = "model.layers.0.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[str, Any]] = {
    "one flipped weight": ("weights", lambda f: change_tensor(f, Q, flip_one)),
    "another head": ("weights", lambda f: change_tensor(f, "lm_head.weight", lambda w: w.roll(1, 0))),
    "a head that is the embedding": ("head", lambda f: change_json(f / "config.json", tie_word_embeddings=True)),
    "two layers exchanged": (
        "weights",
        lambda f: change_tensor(f, Q, lambda _: load_file(f / "model.safetensors")[Q.replace("0", "1")]),
    ),
    "another base of the rotation": (
        "logits",
        lambda f: change_json(
            f / "config.json", rope_theta=10.0, rope_parameters={"rope_type": "default", "rope_theta": 10.0}
        ),
    ),
    "another end token": ("end of turn", lambda f: change_json(f / "generation_config.json", eos_token_id=[TEXT_END])),
    "another template": ("template", other_template),
    "two tokens exchanged": ("template", swap_two_tokens),
    "a pickle": ("no pickle", lambda f: torch.save({}, f / "extra.bin")),
    "a cut file": (
        "loads",
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
    ),
}
"""Fault -> the check that must find it, and how to plant it in a folder that was just written."""
COMPUTED = {"twice the scale": 2.0, "no adapter": 0.0}
"""Fault -> the factor on the adapter's scale."""


@pytest.mark.parametrize("fault", FAULTS if LONG else ["one flipped weight", "another template"])
def test_a_fault_in_the_folder_fails_the_proof_and_leaves_it_to_be_looked_at(fault, trained, monkeypatch, here):
    check, plant = FAULTS[fault]

    def write_with_fault(config, weights, folder, **options):
        write_model(config, weights, folder, **options)
        plant(folder)

    monkeypatch.setattr("qwlit.run.export.write_model", write_with_fault)
    folder, proof = exported(trained("qwen2_untied", "lora"), code=NotEqual.exit_code)
    assert not proof["proved"] and any(failed.startswith(check) for failed in proof["failed"]), proof["failed"]
    assert "NOT proved" in (folder / "README.md").read_text()


@slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("fault", COMPUTED)
def test_a_wrong_merge_fails_the_proof(fault, dtype, trained, monkeypatch, here):
    scale = SavedAdapter.scale
    monkeypatch.setattr(SavedAdapter, "scale", lambda self, layer: COMPUTED[fault] * scale(self, layer))
    _, proof = exported(trained("qwen2_untied", "lora"), f"dtype={dtype}", code=NotEqual.exit_code)
    assert any(failed.startswith("merge as peft") for failed in proof["failed"]), proof["failed"]
    print(fault, dtype, proof["failed"])


@slow
def test_a_merge_into_the_four_bit_values_fails_the_proof(trained, monkeypatch, here):
    def quantized(*arguments, **options):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weights = base_weights(*arguments, **options)

        def read(name):
            tensor = weights.read(name)
            if "_proj.weight" in name:
                tensor = dequantize_4bit(*quantize_4bit(tensor, blocksize=BLOCK, quant_type="nf4"))
            return tensor

        return type(weights)(weights.shapes, read)

    monkeypatch.setattr("qwlit.run.export.base_weights", quantized)
    _, proof = exported(trained("qwen3", "qlora"), code=NotEqual.exit_code)
    assert any(failed.startswith("merge as peft") for failed in proof["failed"])


def test_a_second_export_into_a_folder_is_refused_while_the_first_writes_it(trained, tmp_path):
    run, output = trained("qwen2_untied", "lora"), tmp_path / "out"
    words = ["export", f"run={run}", f"output={output}", "prove=false"]
    with replacing_folder(output, waits=False) as first:
        (first / "file").write_text("first")
        done = qwlit(words, tmp_path)
        assert not output.exists()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"out is being written by another process ({os.getpid()} on " in done.stderr
    assert [file.name for file in output.iterdir()] == ["file"]


def test_the_end_of_a_training_waits_for_an_export_into_its_folder(tmp_path, capsys):
    def export():
        with replacing_folder(tmp_path / "out", waits=True) as second:
            (second / "second").write_text("")

    thread = threading.Thread(target=export)
    with replacing_folder(tmp_path / "out", waits=False) as first:
        thread.start()
        while "waiting for another process" not in capsys.readouterr().err:
            time.sleep(0.01)
        (first / "first").write_text("")
    thread.join()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["second"]


def test_an_export_replaces_an_earlier_one_whole_and_nothing_else(trained, tmp_path, monkeypatch):
    run = trained("qwen2_untied", "lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    done = qwlit(["export", f"run={run}", f"output={tmp_path / 'mine'}", "prove=false"], tmp_path)
    assert done.returncode == 2 and "is no export" in done.stderr
    done = qwlit(["export", f"run={run}", "prove=false"], tmp_path)
    assert done.returncode == 0 and (run / "export-merged" / "PROOF.json").is_file()
    before = hash_files(run / "export-merged")

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwlit.run.export.model_card", fail)
    with suppress(KeyboardInterrupt):
        qwlit(["export", f"run={run}", "prove=false"], tmp_path)
    assert hash_files(run / "export-merged") == before
    assert not [path for path in run.iterdir() if path.name.startswith(".export")]
    shutil.rmtree(run / "export-merged")


def test_the_base_is_never_replaced_by_its_own_export(trained, tmp_path):
    run = trained("qwen2_untied", "full")
    first = tmp_path / "first"
    assert qwlit(["export", f"run={run}", f"output={first}", "prove=false"], tmp_path).returncode == 0
    done = qwlit(["export", f"model.path={first}", f"output={first}/../first", "prove=false"], tmp_path)
    assert done.returncode == 2 and "is the model that is exported" in done.stderr


def test_logits_that_are_not_a_number_in_one_prompt_fail_the_proof():
    observed = [{"logits": torch.ones(2, 3)}, {"logits": torch.full((2, 3), torch.nan)}]
    proof = Proof(bound=1.0)
    _compare_logits(proof, [{"logits": torch.ones(2, 3)}] * 2, observed)
    assert proof.failed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter=keep", "dtype=float32"], "an adapter stays float32"),
        (["max_shard_size=5"], "give a size such as 500MB"),
        (["adapter=both"], "choose one of merge, keep"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, said, trained, tmp_path):
    done = qwlit(["export", f"run={trained('qwen2_untied', 'lora')}", *words], tmp_path)
    assert done.returncode == 2 and said in done.stderr


@slow
def test_transformers_serve_answers_a_request_from_an_export(trained):
    """With `pip install "transformers[serving]"`, which is no dependency of qwlit."""
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder = trained("qwen3", "full") / "export"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([Path(sys.executable).with_name("transformers"), "serve", folder, "--port", str(port)])
    question = {"model": str(folder), "messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(120):
            with suppress(urllib.error.URLError), urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
                break
            time.sleep(1)
    finally:
        server.terminate()
        server.wait()
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] <= 8
