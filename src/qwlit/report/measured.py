"""What the plan of a run said beside what the run measured, and the lengths of its training samples."""

from collections.abc import Callable
from statistics import mean

from qwlit.core.metric import number_or_none
from qwlit.data.samples import PERCENTS
from qwlit.report.drawing import PALETTE, figure, needs_log_axis, plain_number, set_log, to_svg
from qwlit.report.evaluated import mapping
from qwlit.report.runs import RunRecord
from qwlit.report.single import TextTable
from qwlit.report.table import UNKNOWN, duration

SHOWN_PERCENTS = (0, 5, 25, 50, 75, 95, 100)
KINDS = {"tokens": "tokens", "supervised_tokens": "supervised tokens"}
ROWS = ("read", "accepted", "too_long", "quarantined", "truncated", "split", "duplicates")


def against_plan(run: RunRecord) -> TextTable:
    """Return a line for each quantity that `plan` estimates; runs of earlier versions have no plan in manifest.json."""
    plan, results = mapping(run.manifest, "plan"), run.results
    expected = {name: number_or_none(value) for name, value in plan.items()}
    seconds, tokens = expected.get("seconds"), expected.get("tokens")
    mfus = [value for _, value in run.series.get("throughput/mfu", ())]
    quantities: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
        ("peak memory of a device, GiB", expected.get("memory_gib"), results.peak_memory_gib, "{:.2f}".format),
        ("steps", expected.get("steps"), results.steps, "{:,.0f}".format),
        ("time", seconds, results.wall_seconds, duration),
        ("tokens/s", tokens / seconds if tokens and seconds else None, results.tokens_per_second, "{:,.0f}".format),
        ("MFU", expected.get("mfu") if seconds else None, mean(mfus) if mfus else None, "{:.1%}".format),
    ]
    lines = [
        [
            name,
            *(UNKNOWN if value is None else text(value) for value in (planned, measured)),
            f"{measured / planned:.2f}" if planned and measured is not None else UNKNOWN,
        ]
        for name, planned, measured, text in quantities
        if planned is not None or measured is not None
    ]
    if not plan:
        note = "manifest.json of this run has no plan"
    elif seconds:
        note = "the planned time is that of the steps alone; the measured time has loading, validation and export, too"
    else:
        note = "no planned time: the peak of this device is not known"
    return TextTable(["", "plan", "measured", "measured / plan"], lines, note)


def lengths(run: RunRecord) -> TextTable | None:
    """Return the percentiles of the training samples' lengths; None where manifest.json has none."""
    found = _percentiles(run)
    if not found:
        return None
    lines = [
        [f"{KINDS[kind]} of a sample", *(f"{values[PERCENTS.index(percent)]:,.0f}" for percent in SHOWN_PERCENTS)]
        for kind, values in found.items()
    ]
    return TextTable(["", "least", *(f"{p}\u00a0%" for p in SHOWN_PERCENTS[1:-1]), "most"], lines, "")


def draw_lengths(run: RunRecord) -> str | None:
    """Draw how many of the training samples have at most so many tokens, as SVG."""
    found = _percentiles(run)
    if not found:
        return None
    with figure("lengths", 6.4, 2.6) as picture:
        axes = picture.add_subplot(xlabel="tokens", ylabel="samples with at most so many")
        for colour, (kind, values) in zip(PALETTE, found.items(), strict=False):
            axes.plot(values, PERCENTS, color=colour, label=KINDS[kind])
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.xaxis.set_major_formatter(lambda value, _: plain_number(value))
        if needs_log_axis(value for values in found.values() for value in values):
            set_log(axes, "x")
        axes.legend(loc="lower right")
        return to_svg(picture)


def data_in_words(run: RunRecord) -> list[str]:
    """Return a line about the training samples, and one about the rows they come from."""
    samples, rows = mapping(run.manifest, "samples"), mapping(run.summary, "rows")
    said = []
    number = number_or_none(samples.get("number"))
    tokens, supervised = (number_or_none(mapping(samples, kind).get("sum")) for kind in KINDS)
    if number and tokens and supervised is not None:
        said.append(
            f"{number:,.0f} training samples with {tokens:,.0f} tokens, {supervised / tokens:.1%} of them supervised."
        )
    counts = {name: count for name in ROWS if (count := number_or_none(rows.get(name)))}
    if counts:
        rejected = " (reasons in quarantine.jsonl)" if "quarantined" in counts else ""
        told = ", ".join(f"{count:,.0f} {name.replace('_', ' ')}" for name, count in counts.items())
        said.append(f"Rows of training and validation data: {told}{rejected}.")
    return said


def _percentiles(run: RunRecord) -> dict[str, list[float]]:
    """Return the percentiles PERCENTS of each kind of tokens; empty if one is missing."""
    samples = mapping(run.manifest, "samples")
    found = {}
    for kind in KINDS:
        values = mapping(samples, kind).get("percentiles")
        numbers = [number_or_none(value) for value in values] if isinstance(values, list) else []
        if len(numbers) == len(PERCENTS) and None not in numbers:
            found[kind] = [number for number in numbers if number is not None]
    return found if len(found) == len(KINDS) else {}
