"""Figures of the geometry: what they show and what they refuse."""

import numpy as np
import pandas as pd
import pytest

from mechmisalign import plots
from mechmisalign.plots._style import CONTROL


@pytest.fixture
def pairs():
    rows = [("a", "x", 0.02), ("a", "b", 0.9), ("a", "y", -0.5), ("x", "b", 0.1), ("x", "y", 0.8), ("b", "y", np.nan)]
    frame = pd.DataFrame(rows, columns=["first", "second", "cosine"])
    return frame.assign(random_low=-0.2, random_high=0.2)


@pytest.fixture
def overlaps(pairs):
    frame = pairs.dropna().assign(layer=1, module="down_proj", overlap=lambda rows: rows["cosine"].abs())
    frame = frame.assign(angles=[(10.0, 50.0)] * 5, angles_low=[(70.0, 80.0)] * 5, angles_high=[(80.0, 89.0)] * 5)
    frame = frame.assign(random_low=0.0, weighted=0.5, weighted_low=0.0, weighted_high=0.1)
    return pd.concat([frame.assign(space=space) for space in ("write", "read")], ignore_index=True)


@pytest.fixture
def values():
    share = np.array([0.7, 0.2, 0.1])
    return pd.DataFrame({"layer": 1, "k": [1, 2, 3], "share": share, "random_low": 0.3, "random_high": 0.35})


@pytest.fixture
def path():
    frame = pd.DataFrame({"t": [0.0, 0.5, 1.0], "rate": [0.6, 0.5, 0.6], "coherent": 0.9})
    return frame.assign(low=0.4, high=0.7, coherent_low=0.85, coherent_high=0.95)


def test_likes_stand_together_and_what_chance_gives_is_grey_on_white(pairs):
    figure = plots.pair_matrix(pairs)
    ax = figure.axes[0]
    order = [tick.get_text() for tick in ax.get_xticklabels()]
    assert abs(order.index("a") - order.index("b")) == abs(order.index("x") - order.index("y")) == 1
    written = {text.get_text(): text.get_color() for text in ax.texts}
    assert written["0.02"] == written["0.10"] == CONTROL
    assert CONTROL not in (written["0.90"], written["-0.50"], written["1.00"])
    assert "–" in written
    shown = ax.images[0].get_array()
    assert np.ma.getmaskarray(shown)[order.index("a"), order.index("x")]
    with pytest.raises(ValueError, match="several rows"):
        plots.pair_matrix(pd.concat([pairs, pairs]))


def test_each_space_has_a_panel_of_angles_with_the_random_ones_behind(overlaps):
    figure = plots.principal_angles(overlaps)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["what is written", "what is read"]
    for ax in figure.axes:
        assert len(ax.lines) == 5
        assert ax.lines[0].get_ydata().tolist() == [10.0, 50.0]
        assert len(ax.collections) == 5
    assert len(plots.principal_angles(overlaps[overlaps["space"] == "read"].drop(columns="space")).axes) == 1
    with pytest.raises(ValueError, match="several rows"):
        plots.principal_angles(overlaps.drop(columns="space"))


@pytest.mark.parametrize(("value", "first"), [("overlap", 0.02), ("weighted", 0.5)])
def test_overlaps_stand_before_the_band_of_random_ones(overlaps, value, first):
    ax = plots.overlap_against_null(overlaps, value).axes[0]
    assert len(ax.get_yticklabels()) == 5
    assert ax.lines[0].get_xdata()[0] == first
    ends = ax.collections[0].get_segments()[0][:, 0].tolist()
    assert ends == ([0.0, 0.2] if value == "overlap" else [0.0, 0.1])


def test_sites_are_named_where_there_are_several(overlaps):
    several = pd.concat([overlaps, overlaps.assign(layer=2)])
    labels = [tick.get_text() for tick in plots.overlap_against_null(several).axes[0].get_yticklabels()]
    assert "a · x, 1" in labels
    assert "a · x, 2" in labels


def test_a_spectrum_shows_the_nulls_that_were_measured(values):
    assert len(plots.spectrum(values).axes[0].collections) == 1
    both = values.assign(noise_low=0.0, noise_high=0.1)
    ax = plots.spectrum(both).axes[0]
    assert len(ax.collections) == 2
    assert ax.lines[0].get_ydata().tolist() == values["share"].tolist()
    with pytest.raises(ValueError, match="several rows"):
        plots.spectrum(pd.concat([values, values.assign(layer=2)]))


def test_the_effective_rank_runs_over_layers_up_to_the_number_of_members():
    summary = pd.DataFrame({"layer": [1, 2], "members": 5, "effective_rank": [1.5, 2.0]})
    summary = summary.assign(random_low=4.5, random_high=4.9, noise_low=1.1, noise_high=1.3)
    ax = plots.effective_rank(summary).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [1.5, 2.0]
    assert len(ax.collections) == 2
    assert ax.get_ylim()[1] > 5


def test_a_path_has_coherence_for_the_first_series_and_rates_for_all(path):
    series = pd.concat([path.assign(series="path"), path.assign(series="control", rate=0.1, low=0.0, high=0.2)])
    ax = plots.interpolation_path(series, ends=("medical", "finance")).axes[0]
    drawn = [list(line.get_ydata()) for line in ax.lines]
    assert [0.6, 0.5, 0.6] in drawn
    assert [0.1, 0.1, 0.1] in drawn
    assert [0.9, 0.9, 0.9] in drawn
    assert [text.get_text() for text in ax.texts] == ["medical", "finance"]
    with pytest.raises(ValueError, match="several rows"):
        plots.interpolation_path(pd.concat([path, path]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        plots.interpolation_path(path.assign(rate=60.0))


def test_every_member_of_a_cone_is_a_dot_and_every_kind_a_row():
    kinds = pd.DataFrame({"kind": ["cone", "outside"], "rate": [0.5, 0.1], "low": [0.4, 0.0], "high": [0.6, 0.2]})
    members = pd.DataFrame({"kind": ["cone"] * 3 + ["outside"], "rate": [0.4, 0.5, 0.6, 0.1]})
    ax = plots.cone_rates(kinds, members).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cone", "outside"]
    assert sorted(len(line.get_xdata()) for line in ax.lines) == [1, 2, 3]
    assert len(ax.collections[0].get_segments()) == 2
    with pytest.raises(ValueError, match="missing: low, high"):
        plots.cone_rates(members, members)
