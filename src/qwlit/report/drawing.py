"""What all drawings of a report share: one style, suitable axes, and SVG for embedding in the page."""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: people with any colour vision can distinguish them. Without yellow, too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK, GREY, ALARM = "#000000", "#BDBDBD", "#D55E00"
LOG_SPREAD = 20
"""A quantity gets a log axis if its largest value is more than this many times its smallest."""

PIXELS_PER_INCH = 110
"""Largest size of a drawing in the page, so that the letters of all drawings have one size."""

STYLE: Any = {
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Keep text as text: the reader's fonts have characters that matplotlib's font lacks.
    "svg.fonttype": "none",
    # A dollar sign in a setting does not start a formula.
    "text.parse_math": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


@contextmanager
def figure(name: str, width: float, height: float) -> Iterator["Figure"]:
    """Yield an empty figure, width and height in inches. `name` makes its SVG ids unique within the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # The reader's fonts draw the text, so matplotlib's missing glyphs do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(width, height))


def to_svg(drawn: "Figure") -> str:
    """Return the figure as an <svg> element that fills the available width, without XML header and metadata."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    width = f"max-width:{drawn.get_figwidth() * PIXELS_PER_INCH:.0f}px"
    return re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" style="{width}" role="img">', svg, count=1
    )


def needs_log_axis(values: Iterable[float], *, above: float | None = None) -> bool:
    """Whether a log axis suits the values: their range, counted from `above` or the smallest, spans a large factor."""
    values = list(values)
    low = min(values, default=0.0)
    return low > 0 and max(values) > LOG_SPREAD * (low if above is None else above)


def set_log(axes: "Axes", which: str) -> None:
    """Make the axis "x" or "y" logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}scale": "log"})
    low, high = getattr(axes, f"get_{which}lim")()
    # Within about two decades, powers of ten alone would give too few ticks.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=12))
    axis.set_major_formatter(lambda value, _: plain_number(value))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: Any) -> str:
    """Write 0.0001 as 1e-4, and 20000 as 20,000."""
    if value and abs(value) < 1e-2:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.6g}"
