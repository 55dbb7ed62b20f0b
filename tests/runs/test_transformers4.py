"""transformers 4 reads what `train` leaves: the same logits, the same ids, and it stops.

Takes a minute to install an environment of its own, so it runs only with QWLIT_LONG=1; QWLIT_TRANSFORMERS4 names the
python of one that is there already.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.long import LONG
from tests.published import CONFIGS, published_folder
from tests.runs.runs import qwlit
from tests.tiny import save_folder, tiny_causal_lm

PYTHON = os.environ.get("QWLIT_TRANSFORMERS4")
pytestmark = pytest.mark.skipif(not (LONG or PYTHON), reason="installs transformers 4: QWLIT_LONG=1")
VERSION = "4.57.*"
CHAT = [{"role": "user", "content": "2 + 2? 二加二？"}, {"role": "assistant", "content": "4"}]
READER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
folder, chat = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(chat)
with torch.no_grad():
    logits = model.float()(torch.tensor([ids])).logits
print(json.dumps({
    "ids": ids, "prompt": tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True),
    "eos": [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id],
    "rope_theta": model.config.rope_theta, "logits": logits[0, :, :50].tolist(),
    "stops": len(model.generate(torch.tensor([ids]), max_new_tokens=5)[0]) > len(ids),
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    if PYTHON:
        return PYTHON
    place = tmp_path_factory.mktemp("transformers4")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    versions = [f"torch=={torch.__version__.partition('+')[0]}", f"transformers=={VERSION}", "peft"]
    subprocess.run([place / "bin" / "pip", "install", "--quiet", *versions], check=True)
    return str(place / "bin" / "python")


def read_by_4(python: str, folder: Path) -> dict:
    done = subprocess.run([python, "-c", READER, folder, json.dumps(CHAT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def chats(folder: Path) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(16)), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", CONFIGS)
def test_it_reads_the_export_of_every_published_configuration(name, python, real_tokenizer_folder, tmp_path):
    folder = published_folder(name, tmp_path / "model", real_tokenizer_folder)
    # As transformers 5 saves it, with what transformers 4 cannot read.
    AutoTokenizer.from_pretrained(folder, extra_special_tokens=["<|mine|>"]).save_pretrained(folder)
    asked = [f"model.path={folder}", f"data.path={chats(tmp_path)}", "run.name=a", "train.max_steps=2", "hardware=cpu"]
    done = qwlit(["train", *asked, "optim.lr=1e-3", "preflight.allow=[full_lr]"], tmp_path)
    assert done.returncode == 0, done.stderr
    export = tmp_path / "runs" / "a" / "export"
    by_4 = read_by_4(python, export)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    assert by_4["ids"] == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert by_4["prompt"] == tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert by_4["eos"] == [151645, 151645, [151645, 151643]]
    assert by_4["rope_theta"] == model.config.rope_parameters["rope_theta"] == 1_000_000
    with torch.no_grad():
        logits = model.float()(torch.tensor([by_4["ids"]])).logits[0, :, :50]
    torch.testing.assert_close(torch.tensor(by_4["logits"]), logits, atol=1e-5, rtol=1e-5)


def test_it_reads_the_export_of_a_model_from_scratch(python, tmp_path):
    words = ["experiment=demo", "hardware=cpu", "run.name=a", "train.max_steps=3", "data.exact_match=0"]
    done = qwlit(["train", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    by_4 = read_by_4(python, tmp_path / "runs" / "a" / "export")
    assert by_4["rope_theta"] == 10_000 and by_4["eos"][0] == by_4["eos"][1] == by_4["eos"][2][0]


def test_its_peft_reads_the_export_of_an_adapter(python, tmp_path):
    base = save_folder(tiny_causal_lm("qwen3", tied=False, spread=1.0), tmp_path / "base")
    rows = "".join(json.dumps({"input_ids": [i, 7, i], "labels": [i, 7, i]}) + "\n" for i in range(32))
    (tmp_path / "rows.jsonl").write_text(rows)
    asked = [f"model.path={base}", "data.path=rows.jsonl", "recipe=lora", "run.name=a", "train.max_steps=3"]
    done = qwlit(["train", *asked, "hardware=cpu", "optim.lr=1e-2"], tmp_path)
    assert done.returncode == 0, done.stderr
    reader = (
        "import sys, json, torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(json.dumps(m(torch.arange(9)[None]).logits[0].tolist()))"
    )
    export = tmp_path / "runs" / "a" / "export"
    done = subprocess.run([python, "-c", reader, base, export], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    from peft import PeftModel

    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), export)
    with torch.no_grad():
        expected = ours(torch.arange(9)[None]).logits[0]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-5, rtol=1e-4)
