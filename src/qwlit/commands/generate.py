"""`generate`: talk to a trained model, answer one prompt, or answer the prompts of a file."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from qwlit.commands.options import compose_run, own_options, typed_root
from qwlit.core.console import console
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path

if TYPE_CHECKING:
    from rich.console import Console

    from qwlit.config.compose import Composed
    from qwlit.inference.trained_model import TrainedModel
    from qwlit.training.tracking.run_folder import RunFolder

YES_NO = ("true", "false")


def main(arguments: list[str]) -> None:
    options = {"run": None, "prompt": None, "prompts": None, "output": None, "show_thinking": YES_NO}
    own, overrides = own_options(arguments, options)
    if own["prompt"] is not None and own["prompts"] is not None:
        raise ConfigError("prompt and prompts: give one of them, a text or a file")
    if (own["prompts"] is None) != (own["output"] is None):
        raise ConfigError(
            "prompts=FILE and output=FILE.jsonl belong together: where the prompts are, and the answers go"
        )
    model = open_model(own["run"], overrides)
    from qwlit.inference.talk import answer_file, answer_one, describe, talk

    screen, show_thinking = console(), own["show_thinking"] == "true"
    show_notes(model.notes, screen)
    describe(model, screen)
    if own["prompts"] and own["output"]:
        answer_file(model, own["prompts"], resolve_path(own["output"]), screen)
    elif own["prompt"] is not None:
        answer_one(model, own["prompt"], screen, show_thinking=show_thinking)
    else:
        talk(model, screen, show_thinking=show_thinking)


def show_notes(notes: Iterable[str], screen: "Console") -> None:
    """Print what a user should know about the weights."""
    for note in notes:
        screen.print(f"[yellow]note[/]  {escape(note)}")


def open_model(run: str | None, overrides: list[str]) -> "TrainedModel":
    """Load the model that `find_model` finds; it raises what that raises."""
    composed, folder, checkpoint = find_model(run, overrides)
    from qwlit.inference.trained_model import load_model_folder, load_run

    with console().status("loading the model"):
        return load_run(composed, folder, checkpoint) if folder else load_model_folder(composed)


def find_model(run: str | None, overrides: list[str]) -> "tuple[Composed, RunFolder | None, Path | None]":
    """Return the settings for one device of `run=`, its folder, and the checkpoint that is named; or, where the
    settings name a model, these alone.

    Raises:
        ConfigError: there is no such run or model, or its files cannot be used.
    """
    from qwlit.run.verify import find_run

    if run is not None and any((resolve_path(run) / name).is_file() for name in ("config.json", "adapter_config.json")):
        overrides, run = [f"model.path={run}", *overrides], None
    if run is None:
        composed = compose_run(overrides)
        if not composed.typed.keys() & {"model.path", "model.hub_id"}:
            raise ConfigError("name a model: run=NAME for a run, or model.path=FOLDER")
        folder = checkpoint = None
    else:
        path = Path(run)
        is_checkpoint = path.parent.name == "checkpoints"
        folder = find_run(str(path.parent.parent) if is_checkpoint else run, typed_root(overrides), option="run")
        checkpoint = (folder / "checkpoints" / path.name).resolve() if is_checkpoint else None
        if checkpoint and not checkpoint.is_dir():
            others = ", ".join(sorted(other.name for other in (folder / "checkpoints").iterdir()))
            raise ConfigError(f"run={run}: no such checkpoint; there are {others}")
        composed = compose_run([f"config={folder / 'config.yaml'}", *overrides])
        base = composed.config.model.path
        if base and "model.path" not in composed.typed and not resolve_path(base).exists():
            raise ConfigError(f"{folder}: its base model is not at {base}; name its new place with model.path=FOLDER")
    from qwlit.inference.trained_model import for_one_device
    from qwlit.training.determinism import prepare_determinism
    from qwlit.training.tracking.run_folder import RunFolder

    prepare_determinism(composed.config.determinism)
    return for_one_device(composed), RunFolder(folder) if folder else None, checkpoint
