"""The look that all pictures share."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["GRID", "INK", "styled_figure"]

INK, GRID = "#333333", "#e4e4e0"


def styled_figure(
    height: float, *, rows: int = 1, columns: int = 1, ratios: tuple[int, ...] | None = None, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a page and `height` inches, and its axes in one style."""
    figure = Figure(figsize=(9.6, height), layout="constrained")
    grid = figure.subplots(
        rows,
        columns,
        sharex=sharex,
        squeeze=False,
        height_ratios=ratios if rows > 1 else None,
        width_ratios=ratios if columns > 1 else None,
    )
    axes = list(grid.flat)
    for each in axes:
        each.grid(color=GRID, linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color("#aaaaaa")
        each.tick_params(color="#aaaaaa", labelcolor=INK, labelsize=9)
        each.xaxis.label.set_color(INK)
    return figure, axes
