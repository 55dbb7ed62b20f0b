"""`diff`: the first step and quantity in which two runs differ, the module in it, and what may explain it."""

import json
import struct
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from qwlit.commands.options import own_options
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, Interrupted, NotEqual, QwlitError

if TYPE_CHECKING:
    from qwlit.run.difference import RunDifference
    from qwlit.run.locate import Place, Replay

OPTIONS = {"a": None, "b": None, "run.root": None, "replay": ("true", "false"), "output": ("text", "json")}


def main(arguments: list[str]) -> None:
    from qwlit.run.difference import compare_runs
    from qwlit.run.verify import find_run
    from qwlit.training.tracking.run_folder import jsonable

    own, rest = own_options(arguments, OPTIONS)
    if rest:
        raise ConfigError(f"{' '.join(rest)}: diff takes no settings; give two runs, diff a=RUN b=RUN")
    if not (own["a"] and own["b"]):
        raise ConfigError("give two runs, diff a=RUN b=RUN")
    paths = [find_run(str(own[name]), own["run.root"] or "runs", option=name) for name in ("a", "b")]
    found = compare_runs(*paths)
    is_json, place, remarks = own["output"] == "json", None, list[str]()
    if not is_json:
        _print_steps(paths, found)
    if found.difference and found.difference.quantity == "samples":
        from qwlit.run.difference import differing_samples

        remarks = differing_samples(paths, found.difference.step)
    elif found.difference and own["replay"] == "true":
        place, remarks = _locate(paths, found.difference.step, quiet=is_json)
    if is_json:
        print(json.dumps(jsonable(_as_json(paths, found, place, remarks)), ensure_ascii=False, indent=2))
    else:
        _print_place(place, [*remarks, *(f"not the same: {entry}" for entry in found.circumstances)])
    if found.difference:
        step = min(place.step, found.difference.step) if place else found.difference.step
        raise NotEqual(f"{' and '.join(map(str, paths))} differ from step {step} on")


def _locate(paths: list[Path], step: int, *, quiet: bool) -> tuple["Place | None", list[str]]:
    from qwlit.run.locate import locate
    from qwlit.tuning.short_run import failed, run_shortly

    screen = console(stderr=quiet)

    def train(replay: "Replay", steps: tuple[int, int], reference: "Replay | None") -> None:
        log, environment = replay.root / "log", replay.environment(steps, reference)
        title, number = f"replay of {replay.run.name}", steps[1] - replay.start
        code = run_shortly(replay.overrides, replay.folder, log, number, title, screen, environment=environment)
        if code != Interrupted.exit_code or not any(replay.root.glob("records-*.json")):
            raise failed(f"{replay.run} cannot be replayed up to step {steps[1]}", code, log)

    with tempfile.TemporaryDirectory(prefix="qwlit-diff-") as scratch:
        try:
            place, remarks = locate(paths, step, Path(scratch), train)
        except QwlitError as error:
            return None, [str(error)]
    return place, remarks if place else [*remarks, f"the replays of both runs are equal up to step {step}"]


def _print_steps(paths: list[Path], found: "RunDifference") -> None:
    screen = console()
    screen.print(f"[bold]{escape(str(paths[0]))}[/] and [bold]{escape(str(paths[1]))}[/]")
    how = "to the bit" if found.to_the_bit else "in the logged numbers (without trace.jsonl in both, not to the bit)"
    if found.difference is None:
        screen.print(f"  equal {how}, over {found.compared_steps} steps, up to step {found.last_equal_step}")
        return
    screen.print(f"  first difference  step {found.difference.step}, {found.difference.quantity}")
    for path, value in zip(paths, found.difference.values, strict=True):
        shown = "not finite" if value is None else str(value)
        # A trace that somebody has edited may have no bits there.
        with suppress(ValueError, TypeError, struct.error):
            if found.difference.quantity in ("loss_sum", "grad_norm"):
                # Nine digits tell every two float32 apart.
                shown = f"{struct.unpack('>f', bytes.fromhex(value))[0]:.9g} (bits {value})"
        screen.print(f"    {escape(str(path))}: {shown}", highlight=False)
    screen.print(f"  where             {found.meaning}")
    screen.print(f"  compared          {how}; equal up to step {found.last_equal_step or 0}")


def _print_place(place: "Place | None", remarks: list[str]) -> None:
    screen = console()
    lines = []
    if place:
        lines.append(f"replayed          step {place.step}: {place.phase}")
        micro = "" if place.micro_batch is None else f", micro-batch {place.micro_batch}"
        lines.append(f"first apart       {place.text}{micro}, rank {place.rank}")
        if isinstance(place.size, str):
            lines.append(f"size              {place.size}")
        else:
            size = place.size
            lines.append(
                f"size              {size.largest:.3g} ({size.relative:.2g} of the largest value), {size.elements:,} of"
                f" {size.of:,} elements differ"
            )
            at = f", token {size.token} of {size.sample}" if size.sample else ""
            lines.append(f"place             {[*size.index]}: {size.values[0]!r} against {size.values[1]!r}{at}")
    for line in [*lines, *(f"note              {remark}" for remark in remarks)]:
        screen.print(f"  {escape(line)}", highlight=False)


def _as_json(paths: list[Path], found: "RunDifference", place: "Place | None", remarks: list[str]) -> dict[str, Any]:
    return {
        "runs": [*map(str, paths)],
        "equal": found.difference is None,
        **asdict(found),
        "place": asdict(place) if place else None,
        "remarks": remarks,
    }
