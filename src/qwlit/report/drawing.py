"""What all pictures of a report share: one style, axes that suit the numbers, and SVG that can stand in a page."""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; their yellow is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK, GREY, ALARM = "#000000", "#BDBDBD", "#D55E00"
LOG_SPREAD = 20
"""A quantity whose largest value is more than so many times its smallest is shown on a log axis."""

WIDEST = 110
"""Pixels an inch of a picture takes in the page at most, so that letters are of one size."""

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
    # Text stays text: the reader's own fonts have the characters that matplotlib's lack.
    "svg.fonttype": "none",
    # A dollar sign in a setting is a dollar sign.
    "text.parse_math": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


@contextmanager
def figure(name: str, width: float, height: float) -> Iterator["Figure"]:
    """Yield an empty figure, width and height in inches; `name` keeps its ids apart from other figures' in the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        # Missing from matplotlib's font is not missing from the reader's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(width, height))


def to_svg(drawn: "Figure") -> str:
    """Return the figure as an element of a page: as wide as there is room, without a file's head and metadata."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    width = f"max-width:{drawn.get_figwidth() * WIDEST:.0f}px"
    return re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" style="{width}" role="img">', svg, count=1
    )


def spreads(values: Iterable[float], *, above: float | None = None) -> bool:
    """Whether the values are better told apart by factors; `above`: counted from there, not from the smallest."""
    values = list(values)
    low = min(values, default=0.0)
    return low > 0 and max(values) > LOG_SPREAD * (low if above is None else above)


def set_log(axes: "Axes", which: str) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}scale": "log"})
    low, high = getattr(axes, f"get_{which}lim")()
    # Within two decades the powers of ten alone would leave the axis bare.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def plain_number(value: Any) -> str:
    """Write 0.0001 as 1e-4, and 20000 as 20,000."""
    if value and abs(value) < 1e-2:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.6g}"
