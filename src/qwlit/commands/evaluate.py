"""`evaluate`: loss, accuracy and quality of the answers of trained models, on any rows."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwlit.commands.generate import open_model, show_notes
from qwlit.commands.options import own_options, typed_number
from qwlit.core.console import console
from qwlit.core.disk import disk_line
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path, write_json_atomic
from qwlit.core.lists import read_list
from qwlit.core.streams import write_json

if TYPE_CHECKING:
    from qwlit.config.settings import GenerationSettings
    from qwlit.inference.evaluate import Evaluation, Question
    from qwlit.inference.temperature import Quality

GRID = [round(0.1 * tenths, 1) for tenths in range(1, 14)]
"""0.1 to 1.3: the temperatures of `temperatures=default`."""
MODES = ("non_thinking", "thinking")
OPTIONS = {
    **dict.fromkeys(("run", "metrics", "prompts", "temperatures", "repeats", "modes", "folder")),
    "output": ("text", "json"),
}
FILE = "evaluation.json"


def main(arguments: list[str]) -> None:
    own, overrides = own_options(arguments, OPTIONS)
    asked = _question(own, overrides)
    names: list[str | None] = [*read_list(own["run"])] if own["run"] else [None]
    if len(set(names)) < len(names):
        raise ConfigError(f"run={own['run']}: a run is in the list twice; name each once")
    screen = console(stderr=own["output"] == "json")
    folder = resolve_path(own["folder"] or "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    from qwlit.inference.evaluate import compare, evaluate

    found: dict[str, Evaluation] = {}
    for name in names:
        model = open_model(name, overrides)
        label = name or model.origin
        screen.print(f"\n[bold]{escape(model.origin)}[/]")
        show_notes(model.notes, screen)
        found[label] = evaluate(model, asked, screen)
        _show(found[label], screen)
        for picture in _draw(found[label], folder, label):
            screen.print(f"  {escape(str(picture))}")
        if model.checkpoint and Path(str(name)).parent.name != model.checkpoint.parent.name:
            _keep_in_run(found[label], model.checkpoint, screen)
        del model
    results: dict[str, Any] = {"models": {label: evaluation.as_json() for label, evaluation in found.items()}}
    if len(found) > 1:
        differences = compare(found)
        results["differences"] = [difference.as_json() for difference in differences]
        for difference in differences:
            screen.print(f"\n[bold]{escape(difference.describe())}[/]")
    from qwlit.training.tracking.run_folder import jsonable

    results = jsonable(results)
    write_json_atomic(folder / FILE, results)
    screen.print(f"\n{escape(str(folder / FILE))}")
    if own["output"] == "json":
        write_json(json.dumps(results, indent=1, ensure_ascii=False))


def _keep_in_run(evaluation: "Evaluation", checkpoint: Path, screen: Console) -> None:
    """Write the newest evaluation of a run into its folder, where `report` finds it."""
    from qwlit.training.tracking.run_folder import jsonable

    file = checkpoint.parents[1] / FILE
    try:
        write_json_atomic(file, jsonable({"checkpoint": checkpoint.name, **evaluation.as_json()}))
    except OSError as error:
        screen.print(f"  [yellow]note[/]  `report` will not show this: {escape(disk_line(error))}")


def _question(own: dict[str, str | None], overrides: list[str]) -> "Question":
    """Return what is asked, with everything checked that can be before a model is loaded."""
    from qwlit.inference.evaluate import Question
    from qwlit.inference.scorers import find_scorer

    metrics = read_list(own["metrics"]) if own["metrics"] else []
    if own["temperatures"] and not metrics:
        raise ConfigError("temperatures: name what to measure at each of them, such as metrics=exact_match")
    for option in ("prompts", "repeats", "modes"):
        if own[option] and not metrics:
            raise ConfigError(f"{option} is for the metrics of answers; add metrics=exact_match or another one")
    modes = read_list(own["modes"]) if own["modes"] else []
    if wrong := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(f"modes={wrong[0]}: choose among {', '.join(MODES)}")
    typed = [word for word in overrides if word.startswith("generation")]
    return Question(
        scorers={name: find_scorer(name) for name in metrics},
        most_prompts=typed_number(own, "prompts") or 100,
        repeats=typed_number(own, "repeats") or (3 if own["temperatures"] else 1),
        temperatures=_temperatures(own["temperatures"]),
        modes={mode: _settings(mode, typed) for mode in modes},
        typed_path="data.path" in {word.partition("=")[0] for word in overrides},
    )


def _temperatures(typed: str | None) -> list[float]:
    if typed is None:
        return []
    if typed == "default":
        return GRID
    try:
        grid = [float(item) for item in read_list(typed)]
    except ValueError:
        grid = []
    if not grid or not all(0 <= temperature < 100 for temperature in grid):
        raise ConfigError(f"temperatures={typed}: give numbers such as [0.1,0.7,1.3], or default for 0.1 to 1.3")
    return grid


def _settings(mode: str, typed: list[str]) -> "GenerationSettings":
    from qwlit.config.compose import compose

    others = [word for word in typed if word.startswith("generation.")]
    return compose([f"generation={mode}", *others]).config.generation


def _show(evaluation: "Evaluation", screen: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "samples", "tokens", "loss", "perplexity", "bits/byte", "accuracy"):
        table.add_column(column, justify="left" if not column else "right")
    for group, results in evaluation.groups.items():
        for name, result in results.items():
            bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
            numbers = (f"{result.loss:.4f}", f"{result.perplexity:,.3f}", bits, f"{result.accuracy:.2%}")
            label = name if group == "all" else f"{group} {name}"
            table.add_row(escape(label), f"{result.samples:,}", f"{result.tokens:,}", *numbers)
    screen.print(table)
    for mode, metrics in evaluation.quality.items():
        for metric, curve in metrics.items():
            screen.print(f"\n[bold]{escape(metric)}[/], {mode}, {evaluation.num_prompts} prompts")
            for point in curve:
                screen.print(f"  {_describe(point)}")


def _describe(point: "Quality") -> str:
    cut = f", {point.cut:.0%} of the answers cut" if point.cut else ""
    return f"temperature {point.temperature:<4g} {point.score:.4f}  (95 %: {point.low:.4f} to {point.high:.4f}){cut}"


def _draw(evaluation: "Evaluation", folder: Path, label: str) -> list[Path]:
    """Draw a curve for each metric that was measured at several temperatures; return the files."""
    from qwlit.report.temperature import draw_temperature_curves

    files = []
    for metric in next(iter(evaluation.quality.values()), {}):
        curves = {mode: metrics[metric] for mode, metrics in evaluation.quality.items()}
        if max(map(len, curves.values())) > 1:
            name = re.sub(r"[^\w.-]+", "-", f"{label}-{metric}").strip("-.")
            files.append(folder / f"temperature-{name}.png")
            draw_temperature_curves(curves, metric, files[-1])
    return files
