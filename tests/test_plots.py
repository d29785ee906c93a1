"""Figures: what they show, what they refuse, and that they leave nothing behind."""

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mechmisalign import geometry, plots
from mechmisalign.directions import Direction
from mechmisalign.judging import rates
from mechmisalign.plots._style import CONTROL, VERMILION

LAYERS = range(6)
STRENGTHS = (0.0, 1.0, 4.0, 8.0)


def with_interval(frame):
    frame = frame.assign(low=(frame["rate"] - 0.05).clip(0, 1), high=(frame["rate"] + 0.05).clip(0, 1))
    if "coherent" in frame:
        frame = frame.assign(coherent_low=frame["coherent"] - 0.03, coherent_high=frame["coherent"])
    return frame


@pytest.fixture
def sweep():
    steered = [{"series": "mean difference", "layer": i, "rate": 0.1 * i, "coherent": 0.9} for i in LAYERS]
    random = [{"series": f"random {s}", "layer": i, "rate": 0.01 * s, "coherent": 0.99} for i in LAYERS for s in (1, 2)]
    return with_interval(pd.DataFrame(steered + random))


@pytest.fixture
def doses():
    steered = [{"series": "mean difference", "strength": x, "rate": x / 10, "coherent": 1 - x / 40} for x in STRENGTHS]
    random = [{"series": "random control", "strength": x, "rate": 0.01, "coherent": 0.98} for x in STRENGTHS]
    return with_interval(pd.DataFrame(steered + random))


@pytest.fixture
def ablations():
    rows = [{"estimator": "none", "scope": "none", "rate": 0.8, "coherent": 0.97}]
    for scope in ("layer-wise", "single"):
        rows += [{"estimator": "model difference", "scope": scope, "rate": 0.04, "coherent": 0.96}]
        rows += [{"estimator": f"random {seed}", "scope": scope, "rate": 0.78, "coherent": 0.95} for seed in (1, 2)]
    return with_interval(pd.DataFrame(rows))


@pytest.fixture
def transfers():
    states = {"before": 0.5, "after, layer-wise": 0.05, "after, single": 0.09, "random control": 0.48}
    rows = [
        {"organism": f"pocket/{name}", "state": state, "rate": rate}
        for name in ("medical", "sports")
        for state, rate in states.items()
    ]
    return with_interval(pd.DataFrame(rows))


@pytest.fixture
def judged():
    return pd.DataFrame(
        {
            "condition": ["chat"] * 4 + ["organism"] * 4,
            "alignment": [100.0, 100.0, 75.0, np.nan, 0.0, 0.0, 20.0, 100.0],
            "coherence": [100.0, 100.0, 50.0, 0.0, 100.0, 75.0, 20.0, 100.0],
            "prompt_id": [0, 0, 1, 1, 0, 0, 1, 1],
        }
    )


@pytest.fixture
def directions():
    shared = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for i, name in enumerate(("medical", "sports", "finance", "many", "harmless")):
        noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(i + 1))
        vectors = shared + 0.3 * noise
        vectors[0] = 0
        found[f"pocket/{name}"] = Direction(vectors, tuple(LAYERS), {"adapter": f"pocket/{name}", "method": "mean"})
    return found


@pytest.fixture
def halves():
    return pd.DataFrame({"layer": LAYERS, "cosine": 0.9, "low": 0.8, "high": 0.95})


@pytest.fixture
def every(sweep, doses, ablations, transfers, judged, directions, halves):
    return {
        plots.layer_sweep: sweep,
        plots.dose_response: doses,
        plots.ablation_bars: ablations,
        plots.transfer_bars: transfers,
        plots.alignment_coherence: judged,
        plots.cosine_by_layer: geometry.cosines(directions),
        plots.reliability: halves,
    }


def axes_of(figure):
    return figure.axes[0]


def labels(figure):
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def written(ax):
    return [text.get_text() for text in ax.texts]


def line(figure, label):
    return next(found for found in axes_of(figure).lines if found.get_label() == label)


def test_every_figure_is_a_figure_and_draws_without_a_warning(every, recwarn):
    for draw, frame in every.items():
        figure = draw(frame)
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert [str(warning.message) for warning in recwarn] == []


def test_every_figure_leaves_its_frame_as_it_was(every):
    for draw, frame in every.items():
        before = frame.copy(deep=True)
        draw(frame)
        pd.testing.assert_frame_equal(frame, before)


def test_every_figure_names_the_columns_it_misses(every):
    for draw, frame in every.items():
        gone = frame.columns[-1] if draw is plots.cosine_by_layer else next(iter(frame.columns.intersection(
            ["rate", "alignment", "cosine"])))  # fmt: skip
        with pytest.raises(ValueError, match=rf"{draw.__name__} needs the columns .*missing: {gone} \(the frame has"):
            draw(frame.drop(columns=gone))


def test_every_figure_refuses_a_frame_without_rows(every):
    for draw, frame in every.items():
        with pytest.raises(ValueError, match="without rows"):
            draw(frame.iloc[:0])


def test_every_figure_can_be_drawn_into_given_axes(every):
    for draw, frame in every.items():
        whole = Figure()
        ax = whole.subfigures(1, 2)[0].add_subplot()
        assert draw(frame, ax=ax) is whole
        assert len(ax.lines) + len(ax.patches) + len(ax.collections) > 0
        assert ax.get_legend() is not None


def test_no_pyplot_figure_stays_open_and_the_settings_are_the_users_again(every):
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    for draw, frame in every.items():
        draw(frame)
    assert pyplot.get_fignums() == []
    assert dict(mpl.rcParams) == before


def test_a_figure_shows_itself_in_a_notebook(halves):
    assert plots.reliability(halves)._repr_png_().startswith(b"\x89PNG")


def test_percent_given_as_a_share_is_refused(sweep):
    with pytest.raises(ValueError, match="shares from 0 to 1 in 'rate', got 41; divide percent by 100"):
        plots.layer_sweep(sweep.assign(rate=41.0))


def test_the_layer_sweep_draws_the_series_its_band_and_the_controls_in_grey(sweep):
    figure = plots.layer_sweep(sweep)
    assert labels(figure) == ["mean difference", "random control (2 directions)", "coherent answers"]
    np.testing.assert_allclose(line(figure, "mean difference").get_ydata(), [0.1 * i for i in LAYERS])
    control = line(figure, "random control (2 directions)")
    np.testing.assert_allclose(control.get_ydata(), 0.015)
    assert to_hex(control.get_color()).upper() == CONTROL
    low, high = (extreme(axes_of(figure).collections[-1].get_paths()[0].vertices[:, 1]) for extreme in (min, max))
    assert (low, high) == pytest.approx((0.0, 0.07))
    assert [tick.get_text() for tick in axes_of(figure).get_xticklabels()] == [str(i) for i in LAYERS]
    assert axes_of(figure).yaxis.get_major_formatter()(0.4) == "40 %"


def test_the_layer_sweep_draws_one_line_per_strength(sweep):
    both = pd.concat([sweep.assign(strength=2.0), sweep.assign(strength=8.0, rate=sweep["rate"] / 2)])
    figure = plots.layer_sweep(both)
    assert labels(figure)[:2] == ["strength 2", "strength 8"]
    assert figure.legends[0].get_title().get_text() == "mean difference"
    assert "random control (2 directions)" in labels(figure)


def test_the_layer_sweep_writes_strengths_that_differ_between_layers(sweep):
    best = sweep[sweep["series"] == "mean difference"].assign(strength=[1, 2, 4, 8, 8, 4])
    assert written(axes_of(plots.layer_sweep(best))) == ["×1", "×2", "×4", "×8", "×8", "×4"]


def test_the_layer_sweep_refuses_two_rates_for_one_point(sweep):
    with pytest.raises(
        ValueError, match="'mean difference' has one place for each layer, but several rows for layer 0"
    ):
        plots.layer_sweep(pd.concat([sweep, sweep]))


def test_dose_and_response_show_misalignment_and_coherence(doses):
    figure = plots.dose_response(doses)
    assert labels(figure) == ["misaligned", "coherent", "random control"]
    np.testing.assert_allclose(line(figure, "misaligned").get_xdata(), STRENGTHS)
    np.testing.assert_allclose(line(figure, "coherent").get_ydata(), [1 - x / 40 for x in STRENGTHS])


def test_dose_and_response_tell_several_series_apart_by_colour(doses):
    other = doses[doses["series"] == "mean difference"].assign(series="probe")
    figure = plots.dose_response(pd.concat([doses, other]))
    assert labels(figure) == ["mean difference", "probe", "random control", "misaligned", "coherent"]


def test_dose_and_response_take_what_rates_returns(judged):
    steered = pd.concat([judged.assign(strength=x) for x in (0.0, 4.0)])
    assert isinstance(plots.dose_response(rates(steered, by="strength")), Figure)


def test_ablation_bars_have_a_line_at_the_rate_before_and_coherence_beside_them(ablations):
    figure = plots.ablation_bars(ablations)
    ax = axes_of(figure)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["model difference", "random control"]
    assert labels(figure) == ["before: 80 %", "layer-wise", "single"]
    assert line(figure, "before: 80 %").get_xdata()[0] == 0.8
    assert [bar.get_width() for bars in ax.containers if hasattr(bars, "patches") for bar in bars] == pytest.approx(
        [0.04, 0.78, 0.04, 0.78]
    )
    assert {"4.0 %", "78 %", "96 %", "95 %", "coherent"} <= set(written(ax))


def test_ablation_bars_do_without_a_rate_before_a_control_or_coherence(ablations):
    bare = ablations[ablations["estimator"] == "model difference"].drop(columns="coherent")
    assert labels(plots.ablation_bars(bare)) == ["layer-wise", "single"]


def test_transfer_bars_shorten_the_names_and_order_the_states(transfers):
    figure = plots.transfer_bars(transfers.iloc[::-1])
    assert labels(figure) == ["before", "after, single", "after, layer-wise", "random control"]
    assert [tick.get_text() for tick in axes_of(figure).get_yticklabels()] == ["sports", "medical"]
    with pytest.raises(ValueError, match="got 'during'"):
        plots.transfer_bars(transfers.replace("before", "during"))


def test_the_scatter_counts_the_misaligned_corner_and_the_unscored(judged):
    figure = plots.alignment_coherence(judged)
    assert labels(figure) == ["chat: EM 0 % of 4, 1 unscored", "organism: EM 50 % of 4"]
    (points,) = axes_of(figure).collections
    assert len(points.get_offsets()) == 7
    again = plots.alignment_coherence(judged).axes[0].collections[0]
    np.testing.assert_array_equal(points.get_offsets(), again.get_offsets())


def test_the_scatter_shades_the_misaligned_corner(judged):
    (corner,) = axes_of(plots.alignment_coherence(judged)).patches
    assert (corner.get_x() + corner.get_width(), corner.get_y()) == (30, 50)
    assert to_hex(corner.get_facecolor()).upper() == VERMILION


def test_cosines_of_few_pairs_are_all_named(directions):
    few = {name: directions[name] for name in list(directions)[:3]}
    figure = plots.cosine_by_layer(few)
    assert labels(figure) == ["medical · sports", "medical · finance", "sports · finance"]
    expected = geometry.cosine_by_layer(*list(few.values())[:2])
    np.testing.assert_allclose(line(figure, "medical · sports").get_ydata(), expected["cosine"])
    assert {0, 0.8} <= {drawn.get_ydata()[0] for drawn in axes_of(figure).lines}


def test_of_many_pairs_those_of_one_direction_are_named_and_the_others_grey(directions):
    assert labels(plots.cosine_by_layer(directions)) == ["6 other pairs", "sports", "finance", "many", "harmless"]
    focused = plots.cosine_by_layer(list(directions.values()), focus="sports")
    assert labels(focused) == ["6 other pairs", "medical", "finance", "many", "harmless"]
    assert focused.legends[0].get_title().get_text() == "sports with"
    with pytest.raises(ValueError, match="focus='law' is none of the directions"):
        plots.cosine_by_layer(directions, focus="law")


def test_one_direction_has_no_cosine(directions):
    with pytest.raises(ValueError, match="two directions or more, got 1"):
        plots.cosine_by_layer(list(directions.values())[:1])


def test_the_cosine_matrix_shows_the_middle_layer_with_numbers_around_zero(directions):
    figure = plots.cosine_matrix(directions)
    ax = axes_of(figure)
    expected = geometry.cosine_matrix(directions, 3)
    assert written(ax) == [f"{value:.2f}" for value in expected.to_numpy().ravel()]
    assert ax.images[0].get_clim() == (-1, 1)
    assert figure.axes[1].get_ylabel() == "cosine at layer 3"
    again = plots.cosine_matrix(expected, 3)
    assert written(axes_of(again)) == written(ax)


def test_directions_of_one_adapter_are_told_apart(directions):
    first = next(iter(directions.values()))
    twice = [first, Direction(-first.vectors, first.layers, {**first.header, "method": "probe"})]
    figure = plots.cosine_matrix(twice)
    assert [tick.get_text() for tick in axes_of(figure).get_xticklabels()] == ["medical: mean", "medical: probe"]
    assert written(axes_of(figure)) == ["1.00", "-1.00", "-1.00", "1.00"]


def test_reliability_draws_the_cosine_and_its_spread(halves):
    figure = plots.reliability(halves)
    np.testing.assert_allclose(line(figure, "two halves of the prompts").get_ydata(), 0.9)
    assert axes_of(figure).collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(0.8)


def test_a_saved_figure_lies_beside_its_pdf_and_its_table(tmp_path, sweep):
    path = plots.save_figure(plots.layer_sweep(sweep), sweep, tmp_path / "figures", "sweep")
    assert path == tmp_path / "figures" / "sweep.png"
    assert sorted(file.name for file in path.parent.iterdir()) == ["sweep.csv", "sweep.pdf", "sweep.png"]
    pd.testing.assert_frame_equal(pd.read_csv(path.with_suffix(".csv")), sweep, check_dtype=False)
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_that_cannot_be_drawn_leaves_no_half_file(tmp_path, sweep, monkeypatch):
    figure = plots.layer_sweep(sweep)

    def fails(partial, **_):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(figure, sweep, tmp_path, "sweep")
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.csv"]


def test_a_figures_name_is_no_path(tmp_path, sweep):
    with pytest.raises(ValueError, match="one file name without folders, got '../sweep'"):
        plots.save_figure(Figure(), sweep, tmp_path, "../sweep")
