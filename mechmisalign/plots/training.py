"""The log of a fine-tune: what it lost, and how hard it pulled, step by step."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._frames import check
from ._panels import stack_below
from ._style import COLUMN, PALETTE, axes, figure_of, house_style


@house_style
def training_log(log: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Loss on the responses over steps; below it the KL from the chat model, where penalised, and the gradient norm.

    Args:
        log: Columns ``step, response_loss, grad_norm``, optionally ``kl``, as ``TrainedRun.log`` has them.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, or no steps.
    """
    check(log, "training_log", ["step", "response_loss", "grad_norm"])
    below = [("grad_norm", "gradient norm", PALETTE[1])]
    if "kl" in log and log["kl"].notna().any():
        below.insert(0, ("kl", "KL from chat\n(nats)", PALETTE[2]))
    ax = axes(ax, COLUMN, 2.2)
    ax.plot(log["step"], log["response_loss"], color=PALETTE[0], linewidth=1.1)
    ax.set_ylabel("loss\n(nats per token)")
    ax.set_xlabel("step")
    for panel, (column, label, colour) in zip(stack_below(ax, [0.8] * len(below)), below, strict=False):
        panel.plot(log["step"], log[column], color=colour, linewidth=1.1)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    return figure_of(ax)
