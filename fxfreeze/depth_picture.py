"""The picture of a profile: a staircase down which an iteration goes as units freeze."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fxfreeze.canvas import INK, styled_figure
from fxfreeze.imports import ChoiceError
from fxfreeze.iterations import Iteration

__all__ = ["COLOURS", "by_depth", "check_picture"]

# Okabe and Ito's, by part, from the bottom of a bar up; forward passes are blue, what freezing does away with is warm.
COLOURS = {
    "data": "#BBBBBB",
    "prefix": "#0072B2",
    "suffix": "#56B4E9",
    "backward": "#E69F00",
    "optimizer": "#882255",
}
_ENDINGS = (".png", ".svg", ".pdf")
_LONGEST = 18  # letters of a unit's name under a bar


def check_picture(path: str | Path, what: str = "path") -> None:
    """Raises ChoiceError for a file that is not to end in a picture's name. what: names the argument or the option."""
    if Path(path).suffix.lower() not in _ENDINGS:
        raise ChoiceError(f"{what} {path} is no picture that is drawn here: end its name in .png, .svg or .pdf")


def by_depth(iterations: Sequence[Iteration], units: Sequence[str], conditions: str, subject: str = "") -> Figure:
    """Milliseconds of an iteration's parts, stacked, a bar a depth, the middle half and the prediction upon them.

    units: their names; conditions: of the measurement, in a line; subject: what was trained.
    """
    figure, (axes,) = styled_figure(4.8)
    places = range(len(iterations))
    below = [0.0] * len(places)
    for part, colour in COLOURS.items():
        heights = [getattr(each.measured, part) * 1e3 for each in iterations]
        if any(heights):
            axes.bar(places, heights, bottom=below, width=0.86, color=colour, label=part)
            below = [a + b for a, b in zip(below, heights, strict=True)]
    lows, highs = zip(*((low * 1e3, high * 1e3) for low, high in (each.quartiles for each in iterations)), strict=True)
    axes.vlines(places, lows, highs, color="#888888", linewidth=1, label="middle half of the rounds")
    predicted = [each.predicted.total * 1e3 for each in iterations]
    edges = [i - 0.5 for i in (*places, len(places))]
    axes.stairs(predicted, edges, baseline=None, color=INK, linewidth=1.6, linestyle="--", label="predicted from FLOPs")
    axes.set_xticks(places, [_name(units, each.depth) for each in iterations], rotation=30, ha="right")
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(0, 1.1 * max(*below, *predicted, *highs))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("units frozen, and the last of them")
    axes.set_title(f"Milliseconds of an iteration{f' of {subject}' if subject else ''}", loc="left", pad=20)
    axes.text(0, 1.015, conditions, transform=axes.transAxes, fontsize=8, color=INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=7, fontsize=8)
    return figure


def _name(units: Sequence[str], depth: int) -> str:
    if not depth:
        return "0"
    name = units[depth - 1]
    return f"{depth}  {name}" if len(name) <= _LONGEST else f"{depth}  ...{name[-_LONGEST:]}"
