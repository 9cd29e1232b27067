"""The pictures of a report, each a matplotlib figure drawn from the rows of one or more trials."""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fxfreeze.canvas import INK, styled_figure
from fxfreeze.compare import Row, Trial

# Okabe and Ito's palette: told apart by colour-blind readers, and dark enough for thin lines on white.
COLOURS = {
    "plain": "#444444",
    "freezeout": "#0072B2",
    "fxfreeze": "#D55E00",
    "fxfreeze+cache": "#882255",
    "fxfreeze+int8": "#999933",
    "plain-short": "#009E73",
    "plain-short+cache": "#56B4E9",
    "by-hand": "#CC79A7",
}
MARKERS = {
    "plain": "s",
    "freezeout": "^",
    "fxfreeze": "o",
    "fxfreeze+cache": "P",
    "fxfreeze+int8": "*",
    "plain-short": "D",
    "plain-short+cache": "X",
    "by-hand": "v",
}
ORIGINS = {
    "forward": ("computed", "#D5D5CF"),
    "disk": ("from disk", "#9E9AC8"),
    "ram": ("from RAM", "#6A51A3"),
    "device": ("from the device", "#3F007D"),
}
DEPTHS = colormaps["viridis_r"]
SMOOTHING_STEPS = 15
MOST_FIGURES = 24  # side by side over the bars of a picture


def accuracy_against_time(trials: Sequence[Trial]) -> Figure:
    """Validation accuracy over training seconds, a curve per row and seed, and the test accuracy where each ends."""
    figure, (curves, ends) = styled_figure(4.5, columns=2, ratios=(3, 2))
    for trial in trials:
        for name, row in trial.rows.items():
            drift = row.raw_seconds / row.seconds
            seconds = [evaluation.seconds / drift for evaluation in row.record.evaluations]
            values = [evaluation.accuracy for evaluation in row.record.evaluations]
            colour, marker = COLOURS[name], MARKERS[name]
            label = name if trial is trials[0] else None
            dashes = "--" if name.endswith("+cache") else "-"
            (line,) = curves.plot(seconds, values, color=colour, ls=dashes, linewidth=1.6, label=label)
            line.set(marker=marker, markevery=[-1], markersize=7)
            ends.plot(row.seconds, row.test, color=colour, marker=marker, ms=8, linestyle="", alpha=0.85)
    last = [
        evaluation.accuracy for trial in trials for row in trial.rows.values() for evaluation in row.record.evaluations
    ]
    curves.set_ylim(bottom=max(0.0, statistics.quantiles(last, n=10)[0] - 0.05) if len(last) > 1 else 0.0)
    curves.set_title("Validation accuracy while training", loc="left")
    ends.set_title("Test accuracy at the end", loc="left")
    for axes in (curves, ends):
        axes.set_xlabel("training time, seconds (evaluation excluded)")
        axes.set_xlim(0, 1.08 * max(row.seconds for trial in trials for row in trial.rows.values()))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    ends.margins(y=0.3)
    ends.set_ylim(top=min(ends.get_ylim()[1], 1.005))
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=4)
    return figure


def staircase(rows: Sequence[Row]) -> Figure:
    """Time of an iteration over the steps of each row, above the number of units that the freezing rows have frozen."""
    figure, (times, depths) = styled_figure(5.2, rows=2, ratios=(3, 2), sharex=True)
    for row in rows:
        smooth = [value * 1e3 for value in running_median(row.record.step_seconds)]
        times.plot(smooth, color=COLOURS[row.name], linewidth=1.4, label=row.name)
        if row.units:
            style = {"fxfreeze": "--", "fxfreeze+cache": ":"}.get(row.name, "-")
            depths.step(
                range(row.steps), row.record.depths, where="post", color=COLOURS[row.name], label=row.name, ls=style
            )
    times.set_title("Milliseconds an iteration", loc="left")
    ordinary = sorted(value * 1e3 for row in rows for value in row.record.step_seconds)
    times.set_ylim(0, 1.2 * ordinary[int(0.98 * (len(ordinary) - 1))])  # a machine that stood still for once
    times.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=len(rows))
    depths.set_title("Units frozen", loc="left")
    depths.yaxis.set_major_locator(MaxNLocator(integer=True))
    depths.set_xlabel("step")
    depths.set_xlim(left=0)
    return figure


def learning_rates(row: Row) -> Figure:
    """Each unit's learning rate over the steps of `row`."""
    figure, (axes,) = styled_figure(3.6)
    steps = [step for step, _ in row.rates]
    last = len(row.units) - 1
    for index in range(last + 1):
        axes.plot(steps, [rates[index] for _, rates in row.rates], color=DEPTHS(index / last), linewidth=1.5)
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), DEPTHS), ax=axes, pad=0.02, aspect=15)
    bar.set_ticks([0, last], labels=[f"first: {row.units[0]}", f"head: {row.units[-1]}"])
    bar.outline.set_visible(False)
    axes.set_title(f"Learning rate of each of the {len(row.units)} units ({row.name})", loc="left")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return figure


def origins(epochs: Sequence[dict[str, Any]]) -> Figure:
    """Bars of an epoch's samples by where they came from, and how fast stores were read."""
    figure, (axes,) = styled_figure(3.2)
    below = [0] * len(epochs)
    width = 0.8 * min(1.0, len(epochs) / 6)  # one or two bars are no wall
    for origin, (label, colour) in ORIGINS.items():
        counts = [epoch["samples"].get(origin, 0) for epoch in epochs]
        if any(counts):
            axes.bar(range(1, len(epochs) + 1), counts, bottom=below, color=colour, label=label, width=width)
            below = [a + b for a, b in zip(below, counts, strict=True)]
    fastest = max((epoch["bandwidth"] or 0 for epoch in epochs), default=0)
    unit, name = next((each for each in ((1e9, "GB/s"), (1e6, "MB/s")) if fastest >= each[0]), (1e3, "kB/s"))
    for number, epoch in list(enumerate(epochs, 1))[:: math.ceil(len(epochs) / MOST_FIGURES)]:
        if epoch["bandwidth"]:
            text = f"{_short(epoch['bandwidth'] / unit)}{'*' if epoch['cold'] else ''}"
            axes.annotate(text, (number, below[number - 1]), ha="center", va="bottom", color=INK, fontsize=8)
    axes.set_title(f"Samples by origin{f'; {name} of reading' if fastest else ''}", loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, len(epochs) + 0.5)
    axes.set_ylim(top=1.12 * max(below))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=len(ORIGINS))
    return figure


def _short(value: float) -> str:
    """With as many places as a small value needs to be told from none."""
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}" if value >= 0.01 else "<0.01"


def savings(figures: Sequence[tuple[str, float, str]]) -> Figure:
    """Bars of (label, share of plain training's cost per step that is saved, colour)."""
    figure, (axes,) = styled_figure(0.9 + 0.42 * len(figures))
    labels = [label for label, _, _ in figures]
    values = [value for _, value, _ in figures]
    bars = axes.barh(labels, values, color=[colour for _, _, colour in figures], height=0.62)
    axes.bar_label(bars, labels=[f"{value:.1%}" for value in values], padding=4, color=INK)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    low, high = min(0.0, *values), max(0.05, *values)
    room = 0.1 * (high - low)  # for the figures beside the bars
    axes.set_xlim(low - (room if low < 0 else 0), high + room)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title("Saved of a plain step, mean over the training", loc="left")
    return figure


def running_median(values: Sequence[float]) -> list[float]:
    """Medians of windows of `SMOOTHING_STEPS`, cut at the ends: a hiccup of the machine leaves no spike."""
    half = SMOOTHING_STEPS // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def as_svg(figure: Figure) -> str:
    """The figure as an SVG document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
