"""What the documents show works: the notebook runs, the commands they name compose, the sbatch file is sound."""

import io
import re
import shlex
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from qwlit.config.compose import compose
from qwlit.data.formats import REQUIRED_KEYS, RowParser, recognise_format
from qwlit.data.rows import parse_json_object
from tests.long import LONG
from tests.runs.runs import in_this_process, qwlit, train

ROOT = Path(__file__).parents[2]
SBATCH = sorted((ROOT / "slurm").glob("*.sbatch"))
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = ("troubleshooting.md", "worked-example.md")
"""Pages whose commands a test of their own runs."""


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert notebook.cells[1].source.startswith("STEPS = 1000")
    notebook.cells[1].source = notebook.cells[1].source.replace("1000", "12")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "exact_match" in str(notebook.cells[7].outputs)
    assert "image/png" in str(notebook.cells[9].outputs)
    assert "<|im_start|>" in str(notebook.cells[13].outputs)


def test_the_notebook_on_determinism_runs_and_is_stored_without_outputs(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "determinism.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert notebook.cells[1].source == "STEPS = 30"
    notebook.cells[1].source = "STEPS = 4"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    # The assertion in the notebook has held.
    assert "parameters" in str(notebook.cells[5].outputs)
    assert "image/png" in str(notebook.cells[7].outputs)
    assert "attention sdpa against eager" in str(notebook.cells[9].outputs)


NOTEBOOKS = {
    "reading_a_run": ("STEPS = 60", {9: "runs/too-low/report.html", 11: "ten-times"}),
    "tuning": ("STEPS, TRIALS = 20, 4", {3: "image/png", 7: "study", 9: "which settings mattered", 11: "image/png"}),
    "base_to_served": ("STEPS = 40", {9: "runs/tuned against runs/base", 11: "proved with", 13: "I am a small model"}),
}


@pytest.mark.parametrize("name", NOTEBOOKS if LONG else ["reading_a_run"])
def test_a_notebook_shows_what_it_promises_and_is_stored_without_outputs(name, tmp_path):
    written, shown = NOTEBOOKS[name]
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert notebook.cells[1].source.startswith(written)
    if not LONG:
        notebook.cells[1].source = notebook.cells[1].source.replace(written, "STEPS = 6")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    for cell, text in shown.items():
        assert text in str(notebook.cells[cell].outputs), (cell, notebook.cells[cell].outputs)


def test_the_trainer_shown_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import lightning.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("=60", "=8").replace("val_check_interval=20", "val_check_interval=4"), {})
    assert list((tmp_path / "saved").glob("*.ckpt")) and list((tmp_path / "logs").rglob("metrics.csv"))


def shown_commands() -> list[str]:
    texts = [page.read_text("utf-8").replace("\\\n", "") for page in PAGES if page.name not in RUN_ELSEWHERE]
    found = [c for text in texts for c in re.findall(r"\bqwlit (?:train|inspect) ([^\n&`]+)", text)]
    return found + [c for file in SBATCH for c in re.findall(r"sbatch slurm/train\S* (.+)", file.read_text())]


@pytest.mark.parametrize("words", [w for w in shown_commands() if "[" not in w and "--" not in w])
def test_a_command_shown_in_the_documents_composes(words):
    compose(shlex.split(words))


def test_both_readmes_have_the_same_commands_tables_and_links():
    def bones(page):
        text = (ROOT / page).read_text("utf-8")
        rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        links = [link for link in re.findall(r"\]\((.+?)\)", text) if "README" not in link]
        numbers = re.findall(r"[0-9.]+ ×, [0-9.]+", text)
        return re.findall(r"^```.*?^```", text, re.M | re.S), rows, sorted(links), numbers

    assert bones("README.md") == bones("README.zh-CN.md")


def test_links_between_the_documents_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_documents_show_commands():
    assert len(shown_commands()) >= 4


def test_the_rows_shown_are_read_and_every_format_is_described():
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    shown = [parse_json_object(line.encode()) for line in re.search(r"```json\n(.*?)```", page, re.S)[1].splitlines()]
    for row in shown:
        RowParser("auto", 100, "assistant")(row)
    assert {recognise_format(row) for row in shown} == set(REQUIRED_KEYS) - {"tokenized"}
    assert re.findall(r"^\| `(\w+)` \| `(?:messages|conv|input_ids|instr|prompt|text)", page, re.M) == list(
        REQUIRED_KEYS
    )


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.name)
def test_a_batch_file_is_sound_shell_and_asks_for_what_its_profile_needs(file):
    text = file.read_text()
    subprocess.run(["bash", "-n", str(file)], check=True)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, flags=re.M))
    shown = re.search(rf"sbatch slurm/{file.name} (.+)", text)
    hardware = compose(shlex.split(shown[1]) if shown else ["hardware=a100"]).config.hardware
    assert int(directives["ntasks-per-node"]) == int(directives["gpus-per-node"]) == hardware.devices
    assert int(directives["cpus-per-task"]) == hardware.num_workers + 1
    assert int(directives["nodes"]) == hardware.num_nodes
    assert directives["mem"] == f"{hardware.host_memory_gb}G"


def test_the_commands_shown_after_the_training_run(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "after-training.md").read_text("utf-8")
    (tmp_path / "test.jsonl").write_text('{"prompt": "78 km?", "completion": "78 kilometers"}\n')
    train(["experiment=demo", "run.name=demo", "train.max_steps=10"], tmp_path)
    base = f"model.path={tmp_path / 'runs' / 'demo' / 'export'}"
    words = ["train", "hardware=cpu", "recipe=lora", base, "data=demo", "run.name=lora-run", "train.max_steps=2"]
    assert qwlit([*words, "data.exact_match=0"], tmp_path).returncode == 0
    monkeypatch.setattr("qwlit.inference.proof.run_plainly", in_this_process)
    monkeypatch.setattr("qwlit.inference.plain_proof.imports_qwlit", lambda: False)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    places = {"BASE": "runs/demo/export", "ADAPTER": "runs/lora-run/export"}
    commands = re.findall(r"^qwlit ((?:generate|evaluate|export|merge) .+)$", page, re.M)
    for command in commands:
        words = [re.sub("BASE|ADAPTER", lambda name: places[name[0]], word) for word in shlex.split(command)]
        if words[0] in ("generate", "evaluate"):
            words.append("generation.max_new_tokens=8")
        if any(word.startswith("metrics=") for word in words):
            words = [*(word for word in words if not word.startswith("prompts=")), "prompts=1"]
        done = qwlit(words, tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert list((tmp_path / "evaluation").glob("temperature-*.png"))
    assert len(commands) >= 12 and (tmp_path / "answers.jsonl").read_text().count("\n") == 1
