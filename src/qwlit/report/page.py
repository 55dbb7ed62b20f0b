"""report.html: the ledger as one file that loads nothing else. A reader can open, mail and keep it."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path, write_text_atomic
from qwlit.report.comparability import comparable
from qwlit.report.compare import Ledger
from qwlit.report.curves import PANELS, draw_curves
from qwlit.report.drawing import BLACK, GREY, PALETTE
from qwlit.report.importance import FEWEST_RUNS, Importance
from qwlit.report.single import describe
from qwlit.report.slices import draw_slices
from qwlit.report.table import columns

FILE = "report.html"
TEMPLATE = "qwlit:report.html.jinja"


def write_page(ledger: Ledger, warnings: list[str], importance: Importance | None, path: Path) -> None:
    """Write the page atomically: a reader never sees half of it.

    Raises:
        ConfigError: `path` cannot be written.
    """
    text = build_page(ledger, warnings, importance)
    try:
        write_text_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another place with page=FILE") from None


def build_page(ledger: Ledger, warnings: list[str], importance: Importance | None) -> str:
    """Fill the template. Autoescape turns every text of the user's into text, whatever it contains."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resolve_path(TEMPLATE).read_text(encoding="utf-8"))
    several = ledger.sweep.name if ledger.sweep else ledger.home.absolute().name or "runs"
    colours = _colours(ledger)
    drawings = [(panel, draw_curves(panel, ledger.runs, colours)) for panel in PANELS]
    searched = len(ledger.runs) >= FEWEST_RUNS and bool(ledger.searched) and comparable(ledger.runs)
    page = template.render(
        title=several if len(ledger.runs) > 1 else ledger.runs[0].name,
        headline=headline(ledger),
        warnings=warnings,
        columns=columns(ledger),
        runs=ledger.runs,
        colours=colours,
        grey=GREY,
        metric=ledger.metric.name,
        importance=importance if searched else None,
        slices=_slices(ledger, importance) if searched else None,
        curves=[(panel, svg) for panel, svg in drawings if svg],
        details=describe(ledger.runs[0]) if len(ledger.runs) == 1 else None,
    )
    return f"{page}\n"


def headline(ledger: Ledger) -> str:
    """Say in one line how many runs there are, and which one is best by which metric."""
    number, metric = len(ledger.runs), ledger.metric.name
    what = f"{number} {'trial' if ledger.sweep else 'run'}{'s' * (number > 1)}"
    if number == 1:
        return f"{what}, {ledger.runs[0].status}"
    best = f"best by {metric}: {ledger.best.name}" if ledger.best else f"no run has {metric} yet"
    return f"{what}; {best}; differences (Δ) are to {ledger.baseline.name}"


def _colours(ledger: Ledger) -> dict[str, str]:
    """Give the baseline black and each of the best runs a colour. The others are grey."""
    if len(ledger.runs) == 1:
        return {ledger.runs[0].name: PALETTE[0]}
    others = [run.name for run in ledger.runs if run is not ledger.baseline]
    colours = {ledger.baseline.name: BLACK, **dict(zip(others, PALETTE, strict=False))}
    return {run.name: colours[run.name] for run in ledger.runs if run.name in colours}


def _slices(ledger: Ledger, importance: Importance | None) -> str | None:
    """Draw the metric against each searched setting, the most important setting first."""
    keys = [*importance.shares] if importance else []
    return draw_slices(ledger, keys + [key for key in ledger.searched if key not in keys])
