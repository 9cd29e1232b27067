"""A picture of what an iteration costs by depth: one panel a network, one curve a way of running it."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fxfreeze.canvas import GRID, INK
from fxfreeze.pictures import COLOURS, MARKERS

# Each way in the colour and with the marker that its like has in a report.
LOOK = {
    "plain": "plain",
    "plain, compiled": "plain-short",
    "freezeout": "freezeout",
    "requires_grad only, compiled": "plain-short+cache",
    "by hand": "by-hand",
    "fxfreeze": "fxfreeze",
    "fxfreeze + cache": "fxfreeze+cache",
}

Curves = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]  # by network and way: (share frozen, relative time)


def picture(curves: Curves) -> Figure:
    figure = Figure(figsize=(5.2 * len(curves), 4.4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (name, ways) in zip(panels, curves.items(), strict=True):
        for way, look in LOOK.items():
            if points := sorted(ways.get(way, [])):
                colour, dashes = COLOURS[look], "--" if "compiled" in way else "-"
                axes.plot(*zip(*points, strict=True), dashes, color=colour, marker=MARKERS[look], label=way)
        axes.set_title(name, loc="left", color=INK)
        axes.set_xlabel("units frozen")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xticks(sorted({share for points in ways.values() for share, _ in points}))
        axes.set_ylim(bottom=0.0)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time of an iteration, plain training = 1")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 2 * len(curves)), frameon=False)
    return figure
