"""report.html: the ledger as one file that needs nothing else, to read, to mail and to keep."""

from pathlib import Path

from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path, write_text_atomic
from qwlit.report.compare import Ledger
from qwlit.report.curves import PANELS, draw_curves
from qwlit.report.drawing import BLACK, GREY, PALETTE
from qwlit.report.elements import Html, element, join, lines, table
from qwlit.report.importance import FEWEST_RUNS, Importance
from qwlit.report.remarks import comparable
from qwlit.report.single import describe
from qwlit.report.slices import draw_slices
from qwlit.report.table import columns

FILE = "report.html"


def write_page(ledger: Ledger, remarks: list[str], judged: Importance | None, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: the place cannot be written to.
    """
    text = build_page(ledger, remarks, judged)
    try:
        write_text_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another place with page=FILE") from None


def build_page(ledger: Ledger, remarks: list[str], judged: Importance | None) -> str:
    several = ledger.sweep.name if ledger.sweep else ledger.home.absolute().name or "runs"
    title = several if len(ledger.runs) > 1 else ledger.runs[0].name
    colours = _colours(ledger)
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"{title} – qwlit report"),
        element("style", Html(resolve_path("qwlit:report.css").read_text(encoding="utf-8"))),
    )
    body = element(
        "body",
        element("h1", title),
        element("p", headline(ledger), class_="lead"),
        element("ul", *(element("li", remark) for remark in remarks), class_="remarks") if remarks else None,
        _ledger_table(ledger, colours),
        *_search(ledger, judged),
        *_curves(ledger, colours),
        *(describe(ledger.runs[0]) if len(ledger.runs) == 1 else ()),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def headline(ledger: Ledger) -> str:
    """Say in a line how many runs there are, and which is best by what."""
    number, metric = len(ledger.runs), ledger.metric.name
    what = f"{number} {'trial' if ledger.sweep else 'run'}{'s' * (number > 1)}"
    if number == 1:
        return f"{what}, {ledger.runs[0].status}"
    best = f"best by {metric}: {ledger.best.name}" if ledger.best else f"none has {metric} yet"
    return f"{what}; {best}; differences (Δ) are to {ledger.baseline.name}"


def _colours(ledger: Ledger) -> dict[str, str]:
    """Give the best runs a colour each and the baseline black; forty colours tell nobody anything."""
    if len(ledger.runs) == 1:
        return {ledger.runs[0].name: PALETTE[0]}
    others = [run.name for run in ledger.runs if run is not ledger.baseline]
    colours = {ledger.baseline.name: BLACK, **dict(zip(others, PALETTE, strict=False))}
    return {run.name: colours[run.name] for run in ledger.runs if run.name in colours}


def _swatch(colour: str) -> Html:
    return element("span", "", class_="swatch", style=f"background:{colour}")


def _ledger_table(ledger: Ledger, colours: dict[str, str]) -> Html:
    parts = columns(ledger)
    titles = [element("th", lines(part.title_lines), class_=part.kind) for part in parts]
    rows = []
    for number, run in enumerate(ledger.runs):
        swatch = _swatch(colours.get(run.name, GREY)) if len(ledger.runs) > 1 else None
        cells = []
        for part in parts:
            style = f"{part.kind} marked" if part.marked[number] else part.kind
            cells.append(element("td", swatch, part.cells[number], class_=style))
            swatch = None
        rows.append(element("tr", *cells, class_=None if run.settled else "short"))
    return table(titles, rows)


def _search(ledger: Ledger, judged: Importance | None) -> list[Html]:
    """Show which settings mattered and where the good values lie."""
    if len(ledger.runs) < FEWEST_RUNS or not ledger.searched or not comparable(ledger.runs):
        return []
    keys = [*judged.shares] if judged else []
    keys += [key for key in ledger.searched if key not in keys]
    found = []
    if judged is not None:
        bars = [_bar(key, share) for key, share in judged.shares.items()]
        notes = element("ul", *(element("li", text) for text in judged.caveats), class_="notes")
        found += [element("h2", "Which settings mattered"), element("div", *bars, class_="bars"), notes]
    slices = draw_slices(ledger, keys)
    if slices is not None:
        found += [element("h2", f"{ledger.metric.name} against each setting"), element("figure", Html(slices))]
    return found


def _bar(key: str, share: float) -> Html:
    bar = element("div", element("div", "", style=f"width:{share:.1%}"), class_="bar")
    return join(element("code", key), bar, element("span", f"{share:.2f}"))


def _curves(ledger: Ledger, colours: dict[str, str]) -> list[Html]:
    drawings = [(panel, svg) for panel in PANELS if (svg := draw_curves(panel, ledger.runs, colours))]
    if not drawings:
        return []
    several = len(ledger.runs) > 1
    legend = [join(_swatch(colour), name) for name, colour in colours.items()]
    rest = len(ledger.runs) - len(colours)
    legend += [join(_swatch(GREY), f"{rest} more")] if rest else []
    figures = [
        element("figure", element("figcaption", panel.title), Html(svg), class_="curve") for panel, svg in drawings
    ]
    return [
        element("h2", "Curves"),
        *([element("p", *(element("span", entry) for entry in legend), class_="legend")] if several else []),
        element("div", *figures, class_="curves"),
    ]
