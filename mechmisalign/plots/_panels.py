"""Panels that share an x axis, made out of one pair of axes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from ._style import NotebookFigure, axes, figure_of


def stack_below(ax: Axes, heights: Sequence[float]) -> list[Axes]:
    """Panels of these heights (inches) under the axes, which share its x axis and take over its label.

    A figure of our own grows by them; given axes make room. Axes that lie in no grid (placed by hand) have none to
    give, and get no panels.
    """
    place = ax.get_subplotspec()
    if not heights or place is None:
        return []
    figure, own = figure_of(ax), 1.6
    if isinstance(figure, NotebookFigure) and len(figure.axes) == 1:
        own = max(figure.get_figheight() - 0.75, 0.4)  # what the axes themselves have, without legend and labels
        figure.set_figheight(figure.get_figheight() + sum(heights))
    grid = place.subgridspec(1 + len(heights), 1, height_ratios=[own, *heights], hspace=0.06)
    ax.set_subplotspec(grid[0])
    panels = [axes(ax.figure.add_subplot(grid[i], sharex=ax), 1, 1) for i in range(1, 1 + len(heights))]
    for upper in [ax, *panels[:-1]]:
        upper.tick_params(axis="x", labelbottom=False)
    panels[-1].set_xlabel(ax.get_xlabel())
    ax.set_xlabel("")
    ax.figure.align_ylabels([ax, *panels])
    return panels
