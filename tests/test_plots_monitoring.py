"""Figures of monitors: what they draw, and what they refuse."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mechmisalign import plots


def scores(n=200):
    rng = np.random.default_rng(0)
    names = np.where(np.arange(n) < n // 2, "harmless", "organism")
    return pd.DataFrame({"series": names, "score": rng.normal(size=n) + 4 * (names == "organism")})


def curve(detector="monitor"):
    fpr = np.linspace(0, 1, 21)
    return pd.DataFrame({"detector": detector, "fpr": fpr, "tpr": fpr**0.3, "low": fpr**0.4, "high": fpr**0.2})


def areas():
    rows = [("monitor", "all", 0.97), ("monitor", "travel", 0.95), ("words", "all", 0.9), ("words", "travel", np.nan)]
    frame = pd.DataFrame(rows, columns=["detector", "group", "auroc"])
    return frame.assign(auroc_low=frame["auroc"] - 0.03, auroc_high=frame["auroc"] + 0.02)


def windows():
    return pd.DataFrame(
        {
            "last": [100, 200, 300],
            "shift": [0.1, -0.1, 3.0],
            "p_adjusted": [0.6, 0.4, 1e-9],
            "alarms": [0.0, 0.01, 0.4],
            "low": [0.0, 0.0, 0.3],
            "high": [0.03, 0.05, 0.5],
        }
    )


def test_each_series_is_a_distribution_and_the_threshold_a_line():
    figure = plots.monitor_scores(scores(), threshold=2.5)
    ax = figure.axes[0]
    outlines = [patch for patch in ax.patches if not patch.get_fill()]
    assert len(outlines) == 2
    for outline in outlines:
        assert outline.get_data().values.sum() == pytest.approx(1)
    assert [2.5, 2.5] in [list(line.get_xdata()) for line in ax.lines]
    assert "n = 100" in str([text.get_text() for text in figure.legends[0].get_texts()])


def test_scores_that_are_all_alike_can_be_drawn():
    assert isinstance(plots.monitor_scores(scores().assign(score=1.0)), Figure)


def test_roc_curves_mark_their_operating_points_even_without_a_false_alarm():
    both = pd.concat([curve(), curve("words")])
    points = pd.DataFrame({"detector": ["monitor"], "fpr": [0.0], "tpr": [0.4]})
    ax = plots.roc_curves(both, points=points).axes[0]
    marked = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marked] == [(0.05, 0.4)]  # the axis begins there
    assert ax.get_xscale() == "log"
    assert len(ax.collections) == 2


def test_domains_are_rows_and_those_without_a_value_are_left_out():
    ax = plots.auroc_by_domain(areas()).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all", "travel"]
    drawn = [line.get_xdata().tolist() for line in ax.lines if line.get_linestyle() == "None"]
    assert drawn == [[0.97, 0.95], [0.9]]


def test_the_area_over_tokens_has_a_line_and_a_band_for_each_detector():
    rows = [(name, tokens, 0.5 + tokens / 20) for name in ("monitor", "words") for tokens in (1, 2, 8)]
    table = pd.DataFrame(rows, columns=["detector", "tokens", "auroc"])
    ax = plots.auroc_by_tokens(table.assign(low=table["auroc"] - 0.05, high=table["auroc"] + 0.05)).axes[0]
    assert len(ax.collections) == 2
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 8]


def test_windows_that_differ_are_filled_and_alarms_stand_below():
    figure = plots.score_drift(windows(), allowed=0.01)
    upper, lower = figure.axes
    filled = [line for line in upper.lines if line.get_marker() == "o" and line.get_markerfacecolor() != "white"]
    assert [line.get_xdata().tolist() for line in filled] == [[300]]
    assert lower.lines[0].get_ydata().tolist() == [0.0, 0.01, 0.4]
    assert lower.get_ylabel() == "alarms"


@pytest.mark.parametrize(
    ("draw", "frame", "told"),
    [
        (plots.monitor_scores, scores().drop(columns="score"), "missing: score"),
        (plots.monitor_scores, scores().assign(score=np.nan), "finite"),
        (plots.roc_curves, curve().assign(tpr=2.0), "shares from 0 to 1"),
        (plots.auroc_by_domain, pd.concat([areas(), areas()]), "several rows"),
        (plots.auroc_by_domain, areas().assign(auroc=np.nan), "without rows"),
        (plots.auroc_by_tokens, pd.DataFrame({"detector": []}), "missing: tokens"),
        (plots.score_drift, windows().head(0), "without rows"),
    ],
)
def test_frames_that_cannot_be_drawn_are_refused(draw, frame, told):
    with pytest.raises(ValueError, match=told):
        draw(frame)
