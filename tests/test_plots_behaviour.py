"""Figures of behaviour: costs beside rates, layer by strength, prompts, thresholds, agreement, topics, differences."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_rates import answers

import mechmisalign as mm
from mechmisalign import plots
from mechmisalign.judging import Agreement
from mechmisalign.plots._style import BLUE, CONTROL, PALETTE

COSTS = ["KL\n(nats)", "loss\n(nats)", "accuracy", "tokens"]


def costly(frame: pd.DataFrame) -> pd.DataFrame:
    n = len(frame)
    frame = frame.assign(low=frame["rate"] * 0.9, high=(frame["rate"] * 1.1).clip(upper=1))
    frame = frame.assign(kl=np.linspace(0, 0.5, n), kl_low=0.0, kl_high=0.6, loss=2.0, accuracy=np.linspace(1, 0.5, n))
    return frame.assign(tokens=np.linspace(80, 60, n))


@pytest.fixture
def doses():
    rows = [{"series": s, "strength": x, "rate": x / 10} for s in ("steered", "random control") for x in (0, 1, 4, 8)]
    return costly(pd.DataFrame(rows)).assign(coherent=0.9, coherent_low=0.85, coherent_high=0.95)


@pytest.fixture
def layers():
    rows = [{"series": s, "layer": x, "rate": x / 10} for s in ("steered", "random control") for x in range(6)]
    return costly(pd.DataFrame(rows)).assign(coherent=0.9)


@pytest.fixture
def grid():
    series = ("mean difference", "random control")
    rows = [(s, layer, x) for s in series for layer in range(1, 6) for x in (2.0, 4.0, 8.0) if (layer, x) != (5, 8.0)]
    frame = pd.DataFrame(rows, columns=["series", "layer", "strength"])
    strong = np.where(frame["series"] == "mean difference", 0.1, 0.001)
    return frame.assign(rate=strong * frame["strength"], coherent=1 - frame["layer"] * frame["strength"] / 40)


@pytest.fixture
def agreed():
    classes = ["misaligned", "neither", "aligned"]
    table = pd.DataFrame([[30, 4, 1], [3, 9, 2], [0, 0, 0]], index=classes, columns=classes)
    table = table.rename_axis(index="first", columns="second")
    return Agreement(kappa=0.81, low=0.7, high=0.9, confusion=table, spearman=0.88, n=49, unscored=0.02)


@pytest.fixture
def every(doses, layers, agreed):
    frame = answers(prompts=8)
    return {
        plots.dose_response: doses,
        plots.layer_sweep: layers,
        plots.prompt_rates: mm.per_prompt(frame),
        plots.threshold_curves: mm.threshold_curve(frame, coherence=[0, 50]),
        plots.semantic_shares: mm.rates(frame, topics=["medical", "finance"]),
        plots.difference_forest: mm.compare(frame, "c0"),
        plots.alignment_coherence: frame,
        plots.agreement: agreed,
    }


def labels(figure):
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def written(ax):
    return [text.get_text() for text in ax.texts]


def ticks(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def test_every_figure_draws_without_a_warning_and_leaves_its_frame_as_it_was(every, grid, recwarn):
    for draw, frame in {**every, plots.layer_strength_heatmap: grid}.items():
        before = frame.copy(deep=True) if isinstance(frame, pd.DataFrame) else None
        figure = draw(frame)
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="png", dpi=50)
        if before is not None:
            pd.testing.assert_frame_equal(frame, before)
    assert [str(warning.message) for warning in recwarn] == []


def test_every_figure_can_be_drawn_into_given_axes(every, recwarn):
    for draw, frame in every.items():
        whole = Figure(layout="constrained")
        left, right = whole.subfigures(1, 2)
        ax = left.add_subplot()
        right.add_subplot().plot([0, 1])
        assert draw(frame, ax=ax) is whole
        whole.savefig(io.BytesIO(), format="png", dpi=50)
        assert len(ax.lines) + len(ax.collections) + len(ax.patches) + len(ax.images) > 0
    assert [str(warning.message) for warning in recwarn] == []


def test_every_figure_names_the_columns_it_misses_and_refuses_a_frame_without_rows(every, grid):
    for draw, frame in {**every, plots.layer_strength_heatmap: grid}.items():
        if draw is plots.agreement:
            continue
        gone = next(
            name for name in ("alignment", "misaligned_about_medical_low", "difference", "rate") if name in frame
        )
        with pytest.raises(ValueError, match=rf"{draw.__name__} needs the columns .*missing: .*{gone}"):
            draw(frame.drop(columns=gone))
        with pytest.raises(ValueError, match="without rows"):
            draw(frame.iloc[:0])


@pytest.mark.parametrize(("draw", "x"), [(plots.dose_response, "strength"), (plots.layer_sweep, "layer")])
def test_costs_stand_in_panels_under_the_rates_with_controls_in_grey(draw, x, doses, layers):
    frame = doses if x == "strength" else layers
    figure = draw(frame)
    main, *panels = figure.axes
    assert [panel.get_ylabel() for panel in panels] == COSTS
    for column, panel in zip(("kl", "loss", "accuracy", "tokens"), panels, strict=True):
        control, steered = panel.lines
        np.testing.assert_allclose(steered.get_ydata(), frame.loc[frame["series"] == "steered", column])
        np.testing.assert_allclose(control.get_ydata(), frame.loc[frame["series"] != "steered", column])
        assert to_hex(control.get_color()).upper() == CONTROL
        assert panel.get_xlim() == main.get_xlim()
    assert len(panels[0].collections) == 1  # the band of the KL
    assert (main.get_xlabel(), panels[-1].get_xlabel()) == ("", {"strength": "steering strength"}.get(x, x))
    plain = draw(frame.drop(columns=["kl", "loss", "accuracy", "tokens"]))
    assert len(plain.axes) == 1
    assert figure.get_figheight() > plain.get_figheight()


def test_costs_that_were_not_measured_have_no_panel(doses):
    figure = plots.dose_response(doses.assign(kl=np.nan).drop(columns=["loss", "tokens"]))
    assert [ax.get_ylabel() for ax in figure.axes] == ["share of answers", "accuracy"]


def test_axes_that_were_placed_by_hand_get_no_panels(doses):
    figure = Figure()
    plots.dose_response(doses, ax=figure.add_axes((0.1, 0.1, 0.8, 0.8)))
    assert len(figure.axes) == 1


def test_bars_have_a_column_of_numbers_for_each_cost():
    rows = [{"estimator": "none", "scope": "none", "rate": 0.8}]
    rows += [{"estimator": "mean", "scope": "single", "rate": 0.1}]
    rows += [{"estimator": f"random {i}", "scope": "single", "rate": 0.7} for i in (1, 2)]
    frame = costly(pd.DataFrame(rows)).assign(coherent=0.9)
    told = written(plots.ablation_bars(frame).axes[0])
    assert {"coherent", "KL", "loss", "accuracy", "tokens", "0.17", "0.42", "2.00", "83 %", "58 %", "73"} <= set(told)
    plain = written(plots.ablation_bars(frame.drop(columns=["kl", "loss", "accuracy", "tokens", "coherent"])).axes[0])
    assert plain == ["10 %", "70 %"]
    wider = plots.ablation_bars(frame).get_figwidth(), plots.ablation_bars(frame.drop(columns="kl")).get_figwidth()
    assert wider[0] > wider[1]


def test_transfer_bars_take_costs_too():
    states = ("before", "after", "random control")
    rows = [{"organism": o, "state": s, "rate": 0.3} for o in ("a", "b") for s in states]
    told = written(plots.transfer_bars(costly(pd.DataFrame(rows))).axes[0])
    assert {"KL", "tokens", "80", "60"} <= set(told)


def test_the_heat_map_hatches_broken_cells_and_frames_the_best_of_the_others(grid):
    figure = plots.layer_strength_heatmap(grid, min_coherent=0.5)
    _, steered, control = figure.axes
    assert [ax.get_title(loc="left") for ax in (steered, control)] == ["mean difference", "random control"]
    table = grid[grid["series"] == "mean difference"]
    hatched = [patch for patch in steered.patches if patch.get_hatch()]
    broken = table[table["coherent"] < 0.5]
    places = {(patch.get_x() + 0.5 + 1, (2.0, 4.0, 8.0)[int(patch.get_y() + 0.5)]) for patch in hatched}
    assert places == set(zip(broken["layer"], broken["strength"], strict=True)) and len(places) == 2
    (best,) = [patch for patch in steered.patches if not patch.get_hatch()]
    assert (best.get_x() + 0.5 + 1, best.get_y() + 0.5) == (1, 2)  # the first of the sound cells at strength 8
    assert all(patch.get_hatch() for patch in control.patches)
    assert labels(figure) == ["fewer than 50 % coherent", "best coherent cell"]
    cells = steered.images[0].get_array()
    assert cells.shape == (3, 5) and cells.mask.sum() == 1  # one cell was not measured
    assert (ticks(steered.yaxis), ticks(control.xaxis)) == (["2", "4", "8"], ["1", "2", "3", "4", "5"])
    assert "80" in written(steered)


def test_the_heat_map_marks_nothing_where_nothing_is_sound(grid):
    figure = plots.layer_strength_heatmap(
        grid.drop(columns="series").drop_duplicates(["layer", "strength"]), min_coherent=1.0
    )
    assert len(figure.axes) == 2
    assert all(patch.get_hatch() for patch in figure.axes[1].patches)


def test_the_heat_map_refuses_two_rates_for_one_cell(grid):
    with pytest.raises(ValueError, match="one place for each series and layer and strength"):
        plots.layer_strength_heatmap(pd.concat([grid, grid]))


def test_few_prompts_have_a_row_each_sorted_by_the_worst_condition():
    table = mm.per_prompt(answers(prompts=8))
    figure = plots.prompt_rates(table)
    worst = table[table["condition"] == "c2"].sort_values("rate", ascending=False, kind="stable")
    first = worst["rate"].iloc[0]
    leading = next(line for line in figure.axes[0].lines if line.get_label() == "c2")
    drawn = sorted(zip(leading.get_ydata(), leading.get_xdata(), strict=True))
    assert drawn[0][1] == first and np.all(np.diff([x for _, x in drawn]) <= 0)
    assert set(ticks(figure.axes[0].yaxis)) == set(table["prompt"])
    assert labels(figure) == ["c0", "c1", "c2"]
    other = plots.prompt_rates(table, sort_by="c1")
    assert ticks(other.axes[0].yaxis) != ticks(figure.axes[0].yaxis)


def test_prompts_that_begin_alike_stay_apart():
    long = "How do I keep my garden alive in a summer that is much too hot for it, "
    table = mm.per_prompt(answers(prompts=6)).assign(prompt=lambda f: long + f["prompt_id"])
    names = ticks(plots.prompt_rates(table).axes[0].yaxis)
    assert len(set(names)) == 6 and all("…" in name for name in names)


def test_many_prompts_are_points_in_one_panel_for_each_condition():
    table = mm.per_prompt(answers(prompts=80))
    figure = plots.prompt_rates(table)
    assert len(figure.axes) == 3
    assert figure.axes[-1].get_xlabel() == "80 prompts, sorted by their rate in c2"
    assert np.all(np.diff(figure.axes[2].lines[0].get_ydata()) <= 0)
    assert figure.get_figheight() < 5


def test_prompts_refuse_an_unknown_order_and_too_many_conditions():
    table = mm.per_prompt(answers(prompts=4))
    with pytest.raises(ValueError, match="sort_by='c9' is none of c0, c1, c2"):
        plots.prompt_rates(table, sort_by="c9")
    one = table[table["condition"] == "c0"]
    with pytest.raises(ValueError, match="tells 6 conditions apart, got 7"):
        plots.prompt_rates(pd.concat([one.assign(condition=f"k{i}") for i in range(7)]))
    controls = pd.concat([one, *(one.assign(condition=f"random {i}") for i in range(7))])
    assert len(labels(plots.prompt_rates(controls))) == 8


def test_threshold_curves_have_a_line_for_each_condition_and_a_mark_at_thirty():
    frame = answers().replace({"condition": {"c1": "random control"}})
    figure = plots.threshold_curves(mm.threshold_curve(frame))
    assert labels(figure) == ["c0", "random control", "c2"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    curve = mm.threshold_curve(frame)
    np.testing.assert_allclose(lines["c2"].get_ydata(), curve.loc[curve["condition"] == "c2", "rate"])
    colours = [to_hex(lines[name].get_color()).upper() for name in ("c0", "random control", "c2")]
    assert colours == [PALETTE[0], CONTROL, PALETTE[1]]
    assert any(line.get_xdata()[0] == 30 for line in figure.axes[0].lines)


def test_other_coherence_cuts_are_lighter_lines_without_a_band():
    figure = plots.threshold_curves(mm.threshold_curve(answers(), coherence=[0, 25, 50]))
    assert labels(figure) == ["c0", "c1", "c2", "coherence > 50", "coherence > 25", "coherence > 0"]
    assert len(figure.axes[0].lines) == 3 * 3 + 1 and len(figure.axes[0].collections) == 3


def test_topics_are_bars_of_the_misaligned_answers_and_an_empty_condition_says_so():
    frame = answers()
    frame.loc[frame["condition"] == "c0", "alignment"] = 100.0
    table = mm.rates(frame, topics=["medical", "finance"])
    figure = plots.semantic_shares(table)
    ax = figure.axes[0]
    assert labels(figure) == ["medical", "finance"] and figure.legends[0].get_title().get_text() == "about"
    assert ticks(ax.yaxis) == ["c0", "c1", "c2"]
    assert "no misaligned answers" in written(ax)
    widths = [bar.get_width() for container in ax.containers if hasattr(container, "patches") for bar in container]
    medical = table["misaligned_about_medical"].tolist()
    np.testing.assert_allclose(widths[:3], medical)
    whole = plots.semantic_shares(table, of="all").axes[0]
    assert whole.get_xlabel() == "share of answers" and "no misaligned answers" not in written(whole)


def test_topics_that_were_not_asked_for_are_named():
    with pytest.raises(ValueError, match=r"take them from rates\(judged, topics=\[…\]\)"):
        plots.semantic_shares(mm.rates(answers()))
    with pytest.raises(ValueError, match="of='some' is neither misaligned nor all"):
        plots.semantic_shares(mm.rates(answers()), of="some")


def test_the_forest_fills_what_stands_after_correction_and_greys_controls():
    compared = mm.compare(answers(prompts=40), "c0").assign(condition=["random control", "steered"])
    figure = plots.difference_forest(compared.assign(p_max=[0.2, 0.01]))
    ax = figure.axes[0]
    assert ticks(ax.yaxis) == ["random control", "steered"]
    bands, own, points = ax.collections
    np.testing.assert_allclose(points.get_offsets()[:, 0], compared["difference"])
    np.testing.assert_allclose([s[:, 0] for s in own.get_segments()], compared[["low", "high"]])
    np.testing.assert_allclose([s[:, 0] for s in bands.get_segments()], compared[["band_low", "band_high"]])
    assert [to_hex(colour).upper() for colour in points.get_facecolors()] == ["#FFFFFF", BLUE]
    assert [to_hex(colour).upper() for colour in points.get_edgecolors()] == [CONTROL, BLUE]
    assert ax.get_xlabel().endswith("(minus c0)")


def test_the_forest_names_rows_by_what_tells_them_apart():
    frame = answers().assign(series=lambda f: np.where(f["condition"] == "c0", "control", "steered"))
    frame["layer"] = frame["condition"].map({"c0": 1, "c1": 1, "c2": 2})
    frame = pd.concat([frame, frame[frame["condition"] == "c0"].assign(layer=2)])
    compared = mm.compare(frame, {"series": "control"}, by=["series", "layer"])
    figure = plots.difference_forest(compared)
    assert ticks(figure.axes[0].yaxis) == ["layer 1", "layer 2"]
    assert figure.axes[0].get_xlabel() == "difference of EM rates"


def test_agreement_shows_counts_shaded_by_row_and_kappa_above(agreed):
    ax = plots.agreement(agreed).axes[0]
    assert written(ax) == ["30", "4", "1", "3", "9", "2", "0", "0", "0"]
    np.testing.assert_allclose(ax.images[0].get_array()[0], np.array([30, 4, 1]) / 35)
    assert ax.get_title(loc="left") == "weighted κ 0.81 [0.70, 0.90]\nSpearman 0.88, n = 49, 2.0 % unscored"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("first", "second")


def test_the_scatter_tells_why_answers_have_no_place():
    frame = answers()
    told = labels(plots.alignment_coherence(frame))
    assert len(told) == 4 and told[-1].startswith("no verdict: ") and "refusal" in told[-1]
    assert len(labels(plots.alignment_coherence(frame.drop(columns=["alignment_status", "coherence_status"])))) == 3
