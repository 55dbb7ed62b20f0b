"""`verify`: train the same steps several times in fresh processes, and certify that they are equal to the bit."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from qwlit.commands.options import compose_run, own_options, typed_number, typed_root
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, Interrupted, NotEqual

if TYPE_CHECKING:
    from qwlit.training.tracking.run_folder import RunFolder

REPEATS, STEPS = 3, 20
OWN_NAMES = ("repeat-", "certificate.")
"""How the names in the folder of a verification begin."""


def main(arguments: list[str]) -> None:
    own, overrides = own_options(arguments, {"repeats": None, "steps": None, "run": None})
    steps = typed_number(own, "steps") or STEPS
    earlier = None
    if own["run"] is not None:
        from qwlit.run.verify import find_run

        earlier = find_run(own["run"], typed_root(overrides), option="run")
        if not (earlier / "trace.jsonl").is_file():
            raise ConfigError(
                f"run={own['run']}: it has no trace.jsonl to compare with; train it with determinism=reproducible or"
                " trace.every_steps=1"
            )
    repeats = typed_number(own, "repeats", least=1 if earlier else 2) or (1 if earlier else REPEATS)
    if earlier:
        overrides = [f"config={earlier / 'config.yaml'}", f"run.name={earlier.name}", *overrides]
    _verify(overrides, steps, repeats, earlier)


def _verify(overrides: list[str], steps: int, repeats: int, earlier: Path | None) -> None:
    from qwlit.core.files import read_json, resolve_path, write_json_atomic, write_text_atomic
    from qwlit.run.verify import certify, differing_entries
    from qwlit.training.tracking.run_folder import RunFolder
    from qwlit.tuning.short_run import prepare_folder

    config = compose_run(overrides).config
    folder = RunFolder(resolve_path(config.run.root) / f"{config.run.name}-verify")
    prepare_folder(folder, OWN_NAMES, "verification")
    for number in range(1, repeats + 1):
        _train(overrides, steps, folder, number, has_trace=earlier is not None)
    repeated = [folder.path / f"repeat-{number}" for number in range(1, repeats + 1)]
    certificate = certify([*([earlier] if earlier else []), *repeated])
    write_json_atomic(folder.path / "certificate.json", certificate.as_json())
    write_text_atomic(folder.path / "certificate.txt", certificate.text())
    screen = console()
    screen.print(escape(certificate.text()), highlight=False)
    screen.print(f"  {escape(str(folder.path / 'certificate.json'))}")
    first = earlier or repeated[0]
    changed = differing_entries(read_json(first / "manifest.json"), read_json(repeated[-1] / "manifest.json"))
    for entry in changed:
        screen.print(f"  [yellow]not as in {escape(str(first))}[/]: {escape(entry)}")
    if difference := certificate.difference:
        remedy = "; set determinism=reproducible" if config.determinism == "fast" and not changed else ""
        raise NotEqual(f"not equal: step {difference.step} differs in {difference.quantity}{remedy}")


def _train(overrides: list[str], steps: int, folder: "RunFolder", number: int, *, has_trace: bool) -> None:
    """Train the first steps in a process of its own.

    Args:
        has_trace: the settings are those of a run with a trace.

    Raises:
        QwlitError: the training ended before these steps.
    """
    from qwlit.training.step_boundary import STOP_AFTER
    from qwlit.training.tracking.run_folder import RunFolder
    from qwlit.tuning.short_run import failed, run_shortly

    run, log = RunFolder(folder.path / f"repeat-{number}"), folder.path / f"repeat-{number}.log"
    own = [
        "trace.every_steps=1",
        # With run=, weights are hashed at the steps at which that run has hashed them.
        *([] if has_trace else [f"trace.weights_every_steps={steps}"]),
        "logging.every_steps=1",
        "logger.use=[]",
        "data.exact_match=0",
        f"run.root={folder.path}",
        f"run.name={run.path.name}",
    ]
    code = run_shortly(
        [*overrides, *own], run, log, steps, f"repeat {number}", console(), environment={STOP_AFTER: str(steps)}
    )
    if code not in (0, Interrupted.exit_code):
        raise failed(f"repeat {number} did not train {steps} steps", code, log)
