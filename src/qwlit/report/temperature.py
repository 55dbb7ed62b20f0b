"""Draw the quality of answers against the temperature."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qwlit.inference.temperature import Quality
from qwlit.report.drawing import PALETTE, figure


def draw_temperature_curves(curves: Mapping[str, Sequence[Quality]], metric: str, file: Path) -> None:
    """Write a PNG or SVG with a line and its 95 % band for each curve, such as one with and one without thinking."""
    with figure(f"temperature-{metric}", 6.4, 3.6) as picture:
        axes = picture.add_subplot(xlabel="temperature", ylabel=metric)
        for colour, (name, curve) in zip(PALETTE, curves.items(), strict=False):
            temperatures = [point.temperature for point in curve]
            axes.plot(temperatures, [point.score for point in curve], color=colour, marker="o", label=name)
            axes.fill_between(
                temperatures, [p.low for p in curve], [p.high for p in curve], color=colour, alpha=0.15, linewidth=0
            )
        # Above the axes, where no curve can be.
        note = "95 % band: bootstrap over the prompts"
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(curves), 4), title=note, title_fontsize=8
        )
        picture.savefig(file, dpi=150)
