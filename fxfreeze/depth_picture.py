"""The picture of a profile: a staircase down which an iteration goes as units freeze."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from fxfreeze.canvas import INK, styled_figure
from fxfreeze.iterations import Iteration

# Okabe and Ito's colours, from the bottom of a bar up; forward passes are blue, what freezing does away with is warm.
PARTS = {
    "data": ("data", "#BBBBBB"),
    "prefix": ("frozen prefix", "#0072B2"),
    "suffix": ("live forward", "#56B4E9"),
    "backward": ("backward", "#E69F00"),
    "optimizer": ("optimizer", "#882255"),
}
_LONGEST = 18  # letters of a unit's name under a bar


def by_depth(iterations: Sequence[Iteration], units: Sequence[str], conditions: str) -> Figure:
    """Milliseconds of an iteration's parts, stacked, a bar a depth, quartiles and the prediction upon them.

    units: their names; conditions: of the measurement, in a line.
    """
    figure, (axes,) = styled_figure(4.8)
    places = range(len(iterations))
    below = [0.0] * len(places)
    for part, (label, colour) in PARTS.items():
        heights = [getattr(each.measured, part) * 1e3 for each in iterations]
        if any(heights):
            axes.bar(places, heights, bottom=below, width=0.86, color=colour, label=label)
            below = [a + b for a, b in zip(below, heights, strict=True)]
    lows, highs = zip(*(each.quartiles for each in iterations), strict=True)
    axes.vlines(places, [low * 1e3 for low in lows], [high * 1e3 for high in highs], color="#888888", linewidth=1)
    predicted = [each.predicted.total * 1e3 for each in iterations]
    edges = [i - 0.5 for i in (*places, len(places))]
    axes.stairs(predicted, edges, baseline=None, color=INK, linewidth=1.6, linestyle="--", label="predicted from FLOPs")
    axes.set_xticks(places, [_name(units, each.depth) for each in iterations], rotation=30, ha="right")
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(0, 1.1 * max(*below, *predicted))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("units frozen, and the last of them")
    axes.set_title("Milliseconds of an iteration", loc="left")
    axes.set_title(conditions, loc="right", fontsize=8, color=INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=6)
    return figure


def _name(units: Sequence[str], depth: int) -> str:
    if not depth:
        return "0"
    name = units[depth - 1]
    return f"{depth}  {name}" if len(name) <= _LONGEST else f"{depth}  ...{name[-_LONGEST:]}"
