"""What misaligned answers are about: has the narrow subject leaked into them?"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._bars import bars_height, draw_bars, rate_axis
from ._frames import check, check_unique
from ._style import COLUMN, PALETTE, axes, figure_of, house_style, legend_above, short_names

_PREFIXES = {"misaligned": "misaligned_about_", "all": "about_"}
_ENDS = ("_low", "_high", "_unscored")


@house_style
def semantic_shares(
    rates: pd.DataFrame, *, of: str = "misaligned", by: str = "condition", ax: Axes | None = None
) -> Figure:
    """The share of misaligned answers about each topic, by condition or organism (2506.11613, figure 4).

    An answer can be about several topics or none, so shares need not add up. A condition without misaligned answers
    says so.

    Args:
        rates: The column of ``by``, and ``misaligned_about_<topic>`` with ``_low, _high`` for each topic, as
            :func:`mechmisalign.rates` returns for ``topics=…``.
        of: ``misaligned`` answers, or ``all`` (columns ``about_<topic>``).
        by: The column with one value per row.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: If there are no topics or more than six, a column is missing, or several rows for one condition.
    """
    if of not in _PREFIXES:
        raise ValueError(f"of={of!r} is neither {' nor '.join(_PREFIXES)}")
    prefix = _PREFIXES[of]
    topics = [
        column.removeprefix(prefix)
        for column in map(str, rates.columns)
        if column.startswith(prefix) and not column.endswith(_ENDS)
    ]
    if not 1 <= len(topics) <= len(PALETTE):
        raise ValueError(
            f"semantic_shares draws one to {len(PALETTE)} topics, found {len(topics)} columns {prefix}<topic>; "
            "take them from rates(judged, topics=[…])"
        )
    shares = [f"{prefix}{topic}{end}" for topic in topics for end in ("", "_low", "_high")]
    check(rates, "semantic_shares", [by, *shares], shares)
    check_unique(rates, "semantic_shares", [by])
    names = short_names(rates[by].astype(str))
    bars = pd.concat(
        [
            pd.DataFrame({by: rates[by].astype(str).map(names), "topic": topic, **_interval(rates, f"{prefix}{topic}")})
            for topic in topics
        ],
        ignore_index=True,
    )
    ax = axes(ax, COLUMN, bars_height(bars, by) + 0.15)
    draw_bars(ax, bars, by, "topic", {topic: PALETTE[i] for i, topic in enumerate(topics)})
    for row, empty in enumerate(
        bars.groupby(by, sort=False, observed=True)["rate"].apply(lambda found: found.isna().all())
    ):
        if empty:
            ax.annotate("no misaligned answers", (0, row), (3, 0), textcoords="offset points", va="center", fontsize=6)
    rate_axis(ax, bars, "share of misaligned answers" if of == "misaligned" else "share of answers")
    legend_above(ax, title="about")
    return figure_of(ax)


def _interval(rates: pd.DataFrame, column: str) -> dict[str, pd.Series]:
    return {"rate": rates[column], "low": rates[f"{column}_low"], "high": rates[f"{column}_high"]}
