"""What the figures of prediction show, and what they refuse to."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mechmisalign import plots

RNG = np.random.default_rng(0)


@pytest.fixture
def table():
    score, rate = np.linspace(-1, 40, 12), np.linspace(0, 0.6, 12)
    return pd.DataFrame(
        {
            "dataset": [f"d{i}" for i in range(12)], "kind": ["harmless", "mixture", "harmful"] * 4,
            "score": score, "score_low": score - 2, "score_high": score + 2,
            "rate": rate, "low": np.maximum(rate - 0.05, 0), "high": rate + 0.05, "random_low": -3.0, "random_high": 2.0,
        }
    )  # fmt: skip


@pytest.fixture
def correlations():
    return pd.DataFrame(
        {
            "predictor": ["persona", "loss under the chat model", "random 0"], "kind": ["direction", "text", "random"],
            "spearman": [0.93, 0.4, -0.1], "low": [0.8, -0.2, -0.6], "high": [0.98, 0.8, 0.5], "p": [0, 0.1, 0.7], "n": 12,
        }
    )  # fmt: skip


@pytest.fixture
def scores():
    kinds = np.repeat(["harmful", "harmless"], 200)
    values = RNG.normal(size=400) + 5 * (kinds == "harmful")
    return pd.DataFrame({"kind": kinds, "difference": values, "direction": "v", "layer": 4})


@pytest.fixture
def log():
    rows = [
        {"run": run, "kind": kind, "step": step, "trait": "t", "drift": step * slope, "z": step * slope - 1}
        for run, (kind, slope) in enumerate([("harmless", 0.01), ("harmless", -0.02), ("harmful", 0.5)])
        for step in range(0, 61, 5)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def behaviour():
    step = np.arange(5, 61, 5)
    rate = np.clip((step - 20) / 60, 0, 1)
    told = {"step": step, "rate": rate, "low": np.maximum(rate - 0.05, 0), "high": rate + 0.05}
    return pd.DataFrame(told | {"kind": "harmful", "run": 2})


def drawn(figure, recwarn):
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert [str(warning.message) for warning in recwarn] == []
    return figure


def legend(figure):
    return [text.get_text() for found in [*figure.legends] for text in found.get_texts()]


def test_datasets_stand_at_their_score_and_rate_with_both_intervals(table, correlations, recwarn):
    figure = drawn(plots.dataset_ranking(table, correlation=correlations.iloc[0]), recwarn)
    ax = figure.axes[0]
    points = np.concatenate([np.column_stack(line.get_data()) for line in ax.lines])
    assert {tuple(point) for point in points} == set(zip(table["score"], table["rate"], strict=True))
    ends = np.concatenate([np.concatenate(found.get_segments()) for found in ax.collections])
    assert {table["score_low"][5], table["score_high"][5]} <= set(ends[:, 0]) and table["high"][5] in ends[:, 1]
    assert legend(figure) == ["random directions", "harmless", "mixture", "harmful"]
    assert "Spearman 0.93 [0.80, 0.98]\n12 datasets" in [text.get_text() for text in ax.texts]
    assert ax.get_yaxis().get_major_formatter()(0.5).startswith("50")


def test_without_kinds_and_controls_there_is_no_legend(table, recwarn):
    figure = drawn(plots.dataset_ranking(table.drop(columns=["kind", "random_low", "random_high"])), recwarn)
    assert legend(figure) == []


def test_predictors_stand_in_order_with_their_kind_as_colour(correlations, recwarn):
    ax = drawn(plots.predictor_ranks(correlations), recwarn).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "persona",
        "loss under the chat\nmodel",
        "random directions (1)",
    ]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    dots = ax.collections[-1]
    np.testing.assert_allclose(dots.get_offsets()[:, 0], correlations["spearman"])
    assert len({to_hex(colour) for colour in dots.get_facecolors()}) == 3


def test_a_histogram_has_the_same_area_for_each_kind(scores, recwarn):
    figure = drawn(plots.score_histogram(scores), recwarn)
    outlines = [patch.get_data() for patch in figure.axes[0].patches if not patch.get_fill()]
    for values, edges, _ in outlines:
        assert (values * np.diff(edges)).sum() == pytest.approx(1)
    assert legend(figure) == ["harmful (200)", "harmless (200)"]


def test_a_watch_shows_each_run_the_threshold_and_the_behaviour_below(log, behaviour, recwarn):
    figure = drawn(plots.trait_watch(log, threshold=3.0, behaviour=behaviour, by="kind"), recwarn)
    upper, lower = figure.axes
    runs = [line for line in upper.lines if len(line.get_xdata()) > 2]
    assert len(runs) == 3 and len({line.get_color() for line in runs}) == 2
    assert any(set(np.atleast_1d(line.get_ydata())) == {3.0} for line in upper.lines)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), behaviour["rate"])
    harmful = next(line for line in runs if line.get_ydata()[-1] > 20)
    assert lower.lines[0].get_color() == harmful.get_color()
    assert lower.get_xlabel() == "step" and upper.get_xlabel() == ""
    assert legend(figure) == ["harmless", "harmful", "as in harmless runs"]


def test_without_a_threshold_a_watch_shows_drifts(log, recwarn):
    ax = drawn(plots.trait_watch(log.drop(columns="z"), by="kind"), recwarn).axes[0]
    assert max(line.get_ydata().max() for line in ax.lines) == 30 and ax.get_ylabel() == "drift of the projection"


def test_given_axes_are_drawn_on(table, correlations, scores, log):
    for draw, frame in {
        plots.dataset_ranking: table,
        plots.predictor_ranks: correlations,
        plots.score_histogram: scores,
        plots.trait_watch: log,
    }.items():
        figure = Figure()
        assert draw(frame, ax=figure.add_subplot()) is figure


def test_what_cannot_be_drawn_is_refused(table, correlations, scores, log):
    for draw, frame, gone in (
        (plots.dataset_ranking, table, "score_low"),
        (plots.predictor_ranks, correlations, "spearman"),
        (plots.score_histogram, scores, "difference"),
        (plots.trait_watch, log, "drift"),
    ):
        with pytest.raises(ValueError, match=f"{draw.__name__} needs the columns .*missing: {gone}"):
            draw(frame.drop(columns=gone))
        with pytest.raises(ValueError, match="without rows"):
            draw(frame.iloc[:0])
    with pytest.raises(ValueError, match="divide percent by 100"):
        plots.dataset_ranking(table.assign(rate=50.0))
    with pytest.raises(ValueError, match="draws one layer, got"):
        plots.score_histogram(pd.concat([scores, scores.assign(layer=5)]))
    with pytest.raises(ValueError, match="finite number"):
        plots.score_histogram(scores.assign(difference=np.nan))
    many = pd.concat([log.assign(kind=f"k{i}") for i in range(7)])
    with pytest.raises(ValueError, match="tells 6 kinds apart, got 7"):
        plots.trait_watch(many, by="kind")
