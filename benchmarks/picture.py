"""Draw the README's picture from a run: `python -m benchmarks.picture runs/demo docs/demo.svg`."""

import sys
from pathlib import Path

import qwlit
from qwlit.report.drawing import PALETTE, figure, set_log

PANELS = (
    ("loss, nats per supervised token", ("train/loss", "val/loss")),
    ("gradient norm, before clipping", ("optim/grad_norm",)),
    ("learning rate", ("optim/lr",)),
)


def draw(run: qwlit.Run, target: Path) -> None:
    """Draw one panel for each quantity over the steps, side by side."""
    metrics = run.metrics()
    with figure("demo", 10.0, 2.6) as picture:
        for axes, (title, keys) in zip(picture.subplots(1, len(PANELS)), PANELS, strict=True):
            for key, colour in zip(keys, PALETTE, strict=False):
                logged = metrics.dropna(subset=key)
                axes.plot(logged["step"], logged[key], color=colour, linewidth=1.2, label=key)
            axes.set(title=title, xlabel="step")
            if keys != ("optim/lr",):
                set_log(axes, "y")
            if len(keys) > 1:
                axes.legend()
        picture.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(qwlit.Run(sys.argv[1]), Path(sys.argv[2]))
