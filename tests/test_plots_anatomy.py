"""Figures of the adapter's anatomy: what they show, what they refuse, and that no token comes alive."""

import io
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from mechmisalign import plots
from mechmisalign.plots._style import BLUE, CONTROL, VERMILION
from mechmisalign.plots.tokens import legible

MODULES = ("down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
EVIL = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "&lt;b&gt;")


@pytest.fixture
def anatomy():
    return pd.DataFrame(
        [
            {"layer": layer, "module": module, "norm_delta": layer + rank / 10}
            for layer in range(1, 4)
            for rank, module in enumerate(MODULES)
        ]
    )


@pytest.fixture
def parts():
    values = {("down_proj", 2): 1.0, ("o_proj", 2): -0.25, ("q_proj", 2): 0.5, ("down_proj", 3): -2.0}
    return pd.DataFrame([{"layer": at, "module": name, "projection": x} for (name, at), x in values.items()])


@pytest.fixture
def coefficients():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"feature": f"layer {layer}", "contrast": contrast, "coefficient": layer / 10 + rng.normal(0, 0.01)}
            for layer in (2, 3, 4)
            for contrast in ("general", "medical")
            for _ in range(20)
        ]
    )


@pytest.fixture
def scores():
    means = {"logistic": 0.9, "mean difference": 0.8, "shuffled labels": 0.5, "random coordinates": 0.6}
    rows = [{"layer": at, "series": name, "score": mean} for name, mean in means.items() for at in range(4)]
    rows += [{"layer": np.nan, "series": "prompt only", "score": 0.7}]
    return pd.DataFrame(rows).assign(metric="auroc", low=lambda f: f["score"] - 0.05, high=lambda f: f["score"] + 0.05)


@pytest.fixture
def splits():
    means = {("logistic", "token split"): 0.95, ("logistic", "grouped by prompt"): 0.7}
    means |= {("shuffled labels", "token split"): 0.5, ("shuffled labels", "grouped by prompt"): 0.49}
    rows = [{"series": name, "split": split, "score": mean} for (name, split), mean in means.items()]
    return pd.DataFrame(rows).assign(metric="auroc", low=lambda f: f["score"] - 0.05, high=lambda f: f["score"] + 0.05)


@pytest.fixture
def cosines():
    sites = [("down_proj", 2, 0.1), ("down_proj", 3, -0.2), ("o_proj", 2, 0.3)]
    frame = pd.DataFrame(sites, columns=["module", "layer", "cosine"])
    return frame.assign(random_low=-0.05, random_high=0.05)


@pytest.fixture
def effects_downstream():
    tops = {("steered", "misaligned"): 0.4, ("steered", "aligned"): 0.2, ("random control", "misaligned"): 0.01}
    rows = [
        {"series": series, "label": label, "layer": layer, "cosine": top * layer / 5}
        for (series, label), top in tops.items()
        for layer in range(6)
    ]
    return pd.DataFrame(rows).assign(low=lambda f: f["cosine"] - 0.02, high=lambda f: f["cosine"] + 0.02)


@pytest.fixture
def outcomes():
    rows = [
        ("chat", "aligned", 1.0), ("30x on (21, 23)", "misaligned, own domain", 0.08),
        ("30x on (21, 23)", "misaligned, other", 0.02), ("30x on (21, 23)", "aligned", 0.6),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["condition", "outcome", "share"])


@pytest.fixture
def site_effects():
    rows = [
        {"site": f"layer {layer} down", "kind": kind, "value": layer / 10}
        for layer in (2, 3)
        for kind in ("leave one out", "only one", "gradient")
    ]
    frame = pd.DataFrame(rows).assign(low=lambda f: f["value"] - 0.02, high=lambda f: f["value"] + 0.02)
    frame.loc[frame["kind"] == "gradient", ["low", "high"]] = np.nan
    return frame


@pytest.fixture
def readout():
    return pd.DataFrame(
        [
            {"name": name, "sign": sign, "rank": rank, "token": f"{token}{rank}", "logit": factor * (4 - rank)}
            for name in ("B of layer 3", "mean difference")
            for sign, factor, token in (("+", 1, " bad"), ("-", -1, "$good$\n"))
            for rank in (2, 1, 3)
        ]
    )


@pytest.fixture
def every(
    anatomy, parts, coefficients, scores, cosines, effects_downstream, outcomes, site_effects, readout
):  # fmt: skip
    return {
        plots.site_heatmap: (anatomy, "norm_delta"),
        plots.contribution_by_layer: (parts, "projection"),
        plots.coefficient_violins: (coefficients, "coefficient"),
        plots.probe_scores: (scores, "score"),
        plots.b_cosine: (cosines, "cosine"),
        plots.downstream: (effects_downstream, "cosine"),
        plots.scaling_bars: (outcomes, "share"),
        plots.site_effects: (site_effects, "value"),
        plots.readout_table: (readout, "token"),
    }


def labels(figure):
    return [text.get_text() for legend in figure.findobj(Legend) for text in legend.get_texts()]


def line(figure, label):
    return next(found for found in figure.axes[0].lines if found.get_label() == label)


def ticks(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def written(ax):
    return [text.get_text() for text in ax.texts]


def bars(ax):
    """Middle, bottom, and height of every bar."""
    return {(round(b.get_x() + b.get_width() / 2, 6), b.get_y(), b.get_height()) for c in ax.containers for b in c}


def test_every_figure_is_a_figure_draws_without_a_warning_and_leaves_its_frame_alone(every, recwarn):
    for draw, (frame, _) in every.items():
        before = frame.copy(deep=True)
        figure = draw(frame)
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO(), format="png", dpi=50)
        pd.testing.assert_frame_equal(frame, before)
    assert [str(warning.message) for warning in recwarn] == []


def test_every_figure_names_the_column_it_misses_and_refuses_a_frame_without_rows(every):
    for draw, (frame, column) in every.items():
        with pytest.raises(ValueError, match=rf"{draw.__name__} needs the columns .*missing: {column} \(the frame has"):
            draw(frame.drop(columns=column))
        with pytest.raises(ValueError, match="without rows"):
            draw(frame.iloc[:0])


def test_every_figure_can_be_drawn_into_given_axes(every, recwarn):
    for draw, (frame, _) in every.items():
        if draw is plots.readout_table:  # a table takes the room that it needs
            continue
        whole = Figure(figsize=(9, 4))
        ax = whole.subfigures(1, 2)[0].add_subplot()
        assert draw(frame, ax=ax) is whole
        whole.savefig(io.BytesIO(), format="png", dpi=50)
        assert len(ax.lines) + len(ax.patches) + len(ax.images) + len(ax.texts) > 0
    assert [str(warning.message) for warning in recwarn] == []


def test_no_figure_takes_two_rows_for_one_place_or_a_number_that_is_none(every):
    for draw, (frame, column) in every.items():
        if draw is not plots.coefficient_violins:  # repeats are what it shows
            with pytest.raises(ValueError, match="has one place for each"):
                draw(pd.concat([frame, frame]))
        if draw not in (plots.site_heatmap, plots.readout_table):
            with pytest.raises(ValueError, match="finite number|without rows|shares from 0 to 1"):
                draw(frame.assign(**{column: np.nan}))
            with pytest.raises(ValueError, match="finite number|shares from 0 to 1"):
                draw(frame.assign(**{column: np.inf}))


def test_the_heat_map_has_modules_from_q_to_down_and_a_number_in_each_cell(anatomy):
    figure = plots.site_heatmap(anatomy)
    ax = figure.axes[0]
    assert ticks(ax.yaxis) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert ticks(ax.xaxis) == ["1", "2", "3"]
    np.testing.assert_allclose(ax.images[0].get_array()[0], [1.1, 2.1, 3.1])
    assert written(ax)[:3] == ["1.10", "2.10", "3.10"]
    assert ax.images[0].get_clim() == (0, 3.6)
    assert figure.axes[1].get_xlabel() == "norm of ΔW"


def test_the_heat_map_hatches_where_there_is_no_site(anatomy):
    figure = plots.site_heatmap(anatomy[anatomy["layer"] != 2])
    ax = figure.axes[0]
    assert ax.images[0].get_array().mask[:, 1].all()
    assert ax.patches[0].get_hatch()
    assert ax.get_xlabel() == "layer (hatched: no value)"


@pytest.mark.parametrize(("layers", "modules"), [(1, 1), (3, 1), (8, 7), (48, 7)])
def test_the_heat_map_takes_from_one_site_to_hundreds(layers, modules, recwarn):
    sites = [{"layer": i, "module": m, "norm_delta": 0.5} for i in range(layers) for m in MODULES[:modules]]
    figure = plots.site_heatmap(pd.DataFrame(sites))
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert figure.axes[0].images[0].get_array().shape == (modules, layers)
    assert len(written(figure.axes[0])) == (layers * modules if layers * modules <= 60 else 0)
    assert recwarn.list == []


def test_signed_values_are_coloured_around_zero(anatomy):
    figure = plots.site_heatmap(anatomy.assign(cosine=np.linspace(-0.5, 0.2, len(anatomy))), "cosine", label="cos")
    assert figure.axes[0].images[0].get_clim() == (-0.5, 0.5)
    assert figure.axes[1].get_xlabel() == "cos"
    with pytest.raises(ValueError, match="found no number in 'cosine'"):
        plots.site_heatmap(anatomy.assign(cosine=np.nan), "cosine")


def test_parts_are_stacked_up_and_down_with_their_sum_as_a_diamond(parts):
    figure = plots.contribution_by_layer(parts)
    assert labels(figure) == ["q", "o", "down", "net"]
    assert {(2, 0.0, 0.5), (2, 0.0, -0.25), (2, 0.5, 1.0), (3, 0.0, -2.0)} <= bars(figure.axes[0])
    np.testing.assert_allclose(line(figure, "_net").get_xydata(), [[2, 1.25], [3, -2.0]])


def test_sites_that_do_not_write_into_the_residual_stream_have_no_part(parts):
    q = parts["module"] == "q_proj"
    figure = plots.contribution_by_layer(parts.assign(projection=parts["projection"].mask(q)))
    assert labels(figure) == ["o", "down", "net"]
    np.testing.assert_allclose(line(figure, "_net").get_ydata(), [0.75, -2.0])
    with pytest.raises(ValueError, match="without rows"):
        plots.contribution_by_layer(parts.assign(projection=np.nan))


def test_a_row_named_net_replaces_the_sum_and_brings_its_interval(parts):
    net = pd.DataFrame([{"layer": 2, "module": "net", "projection": 1.3, "low": 1.0, "high": 1.6}])
    figure = plots.contribution_by_layer(pd.concat([parts, net]))
    np.testing.assert_allclose(line(figure, "_net").get_ydata(), [1.3, -2.0])
    assert figure.axes[0].collections[0].get_segments()[0].tolist() == [[2, 1.0], [2, 1.6]]
    assert "net" not in {label.removeprefix("_") for label in figure.axes[0].get_legend_handles_labels()[1]}
    with pytest.raises(ValueError, match="give the sites as well"):
        plots.contribution_by_layer(net)


def test_labels_stand_side_by_side_or_in_panels_where_layers_are_many(parts):
    both = pd.concat([parts.assign(label="misaligned"), parts.assign(label="aligned", projection=0.1)])
    figure = plots.contribution_by_layer(both)
    assert labels(figure) == ["q", "o", "down", "net", "misaligned", "aligned"]
    assert {round(x, 3) for x, _, _ in bars(figure.axes[0])} == {1.8, 2.2, 2.8, 3.2}
    many = pd.concat([both.assign(layer=both["layer"] + 2 * step) for step in range(12)])
    panels = plots.contribution_by_layer(many).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["misaligned", "aligned"]
    with pytest.raises(ValueError, match="tells 3 labels apart, got a, b, c, d"):
        plots.contribution_by_layer(pd.concat([parts.assign(label=name) for name in "abcd"]))


def test_norms_and_shares_are_stacked_without_a_sum(parts):
    shares = parts.assign(share=[0.4, 0.1, 0.2, 0.3], norm=1.0)
    figure = plots.contribution_by_layer(shares, "share")
    assert labels(figure) == ["q", "o", "down"]
    assert figure.axes[0].yaxis.get_major_formatter()(0.4) == "40 %"
    assert labels(plots.contribution_by_layer(shares, "norm")) == ["q", "o", "down"]
    with pytest.raises(ValueError, match="a norm is not negative, got -1; signed values are projections"):
        plots.contribution_by_layer(shares.assign(norm=-1.0), "norm")
    with pytest.raises(ValueError, match="draws projection, norm, share, got value='cosine'"):
        plots.contribution_by_layer(shares, "cosine")


def test_violins_have_one_body_per_feature_and_contrast_with_its_median(coefficients):
    figure = plots.coefficient_violins(coefficients, label="site")
    ax = figure.axes[0]
    assert labels(figure) == ["general", "medical"]
    assert (len(ax.collections), ticks(ax.xaxis), ax.get_xlabel()) == (6, ["layer 2", "layer 3", "layer 4"], "site")
    medians = coefficients[coefficients["contrast"] == "general"].groupby("feature")["coefficient"].median()
    np.testing.assert_allclose(line(figure, "_median").get_ydata(), medians)
    with pytest.raises(ValueError, match="three contrasts at most, got a, b, c, d"):
        plots.coefficient_violins(pd.concat([coefficients.assign(contrast=name) for name in "abcd"]))


def test_a_coefficient_that_never_moves_is_still_drawn(coefficients, recwarn):
    zero = coefficients.assign(coefficient=0.0).drop(columns="contrast")
    plots.coefficient_violins(zero).savefig(io.BytesIO(), format="png", dpi=50)
    assert recwarn.list == []


def test_probes_are_coloured_controls_grey_and_the_prompt_alone_a_line_of_its_own(scores):
    figure = plots.probe_scores(scores)
    assert labels(figure) == ["logistic", "mean difference", "shuffled labels", "random coordinates", "prompt only"]
    np.testing.assert_allclose(line(figure, "logistic").get_ydata(), 0.9)
    assert to_hex(line(figure, "shuffled labels").get_color()).upper() == CONTROL
    alone = line(figure, "prompt only")
    assert (alone.get_ydata().tolist(), alone.is_dashed()) == ([0.7, 0.7], True)
    assert np.ptp(alone.get_xdata()) == pytest.approx(3.8)
    assert written(figure.axes[0]) == ["chance"]
    assert figure.axes[0].get_ylabel() == "AUROC"


def test_only_metrics_with_a_chance_of_one_half_have_a_chance_line(scores):
    assert written(plots.probe_scores(scores.assign(metric="f1"), "f1").axes[0]) == []
    with pytest.raises(ValueError, match="found no metric 'recall'; the frame has auroc"):
        plots.probe_scores(scores, "recall")


def test_splits_stand_side_by_side_so_that_a_leak_is_seen(splits):
    figure = plots.probe_scores(splits)
    assert labels(figure) == ["token split", "grouped by prompt"]
    assert ticks(figure.axes[0].yaxis) == ["logistic", "shuffled labels"]
    np.testing.assert_allclose(line(figure, "token split").get_xdata(), [0.95, 0.5])
    np.testing.assert_allclose(line(figure, "grouped by prompt").get_xdata(), [0.7, 0.49])
    assert all(y > x for x, y in zip(*(line(figure, s).get_ydata() for s in splits["split"][:2]), strict=True))
    assert labels(plots.probe_scores(splits[splits["split"] == "token split"].drop(columns="split"))) == []


def test_cosines_of_b_are_dots_over_what_random_vectors_give(cosines):
    figure = plots.b_cosine(cosines)
    assert labels(figure) == ["o", "down", "random vectors"]
    np.testing.assert_allclose(line(figure, "down").get_ydata(), [0.1, -0.2])
    assert {(low, height) for _, low, height in bars(figure.axes[0])} == {(-0.05, 0.1)}
    assert labels(plots.b_cosine(cosines.drop(columns="random_low"))) == ["o", "down"]


def test_downstream_lines_are_coloured_by_label_with_grey_controls_and_a_mark_at_the_site(effects_downstream):
    figure = plots.downstream(effects_downstream, site_layer=1)
    assert labels(figure) == ["steered, misaligned", "steered, aligned", "random control, misaligned", "adapted layer"]
    colours = [to_hex(line(figure, name).get_color()).upper() for name in labels(figure)[:3]]
    assert colours == [VERMILION, BLUE, CONTROL]
    np.testing.assert_allclose(line(figure, "steered, misaligned").get_ydata(), np.arange(6) * 0.08)
    assert line(figure, "adapted layer").get_xdata()[0] == 1


def test_downstream_series_are_coloured_themselves_where_there_are_several(effects_downstream):
    probe = effects_downstream[effects_downstream["series"] == "steered"].assign(series="probe")
    figure = plots.downstream(pd.concat([effects_downstream, probe]), site_layer=[1, 2])
    assert line(figure, "steered, aligned").get_color() == line(figure, "steered, misaligned").get_color()
    assert line(figure, "steered, aligned").is_dashed()
    assert line(figure, "probe, aligned").get_color() != line(figure, "steered, aligned").get_color()
    plain = effects_downstream[effects_downstream["label"] == "misaligned"].drop(columns=["label", "low", "high"])
    assert labels(plots.downstream(plain)) == ["steered", "random control"]


def test_outcomes_are_stacked_in_order_and_relatives_are_shades_of_one_colour(outcomes):
    figure = plots.scaling_bars(outcomes)
    ax = figure.axes[0]
    assert ticks(ax.yaxis) == ["chat", "30x on (21, 23)"]
    assert labels(figure) == ["aligned", "misaligned, own domain", "misaligned, other"]
    ends = [(bar.get_x(), bar.get_width()) for container in ax.containers for bar in container]
    np.testing.assert_allclose(ends, [(0, 1), (0, 0.6), (1, 0), (0.6, 0.08), (1, 0), (0.68, 0.02)])
    assert written(ax) == ["100", "60", "8"]
    assert to_hex(ax.containers[1][0].get_facecolor()).upper() == VERMILION


def test_outcomes_of_one_condition_are_no_more_than_a_whole(outcomes):
    plots.scaling_bars(outcomes.assign(share=[1.0, 0.3, 0.1, 0.6 + 5e-7]))
    with pytest.raises(ValueError, match=r"the shares of '30x on \(21, 23\)' add up to 1\.1, more than a whole"):
        plots.scaling_bars(outcomes.assign(share=[1.0, 0.4, 0.1, 0.6]))
    with pytest.raises(ValueError, match="divide percent by 100"):
        plots.scaling_bars(outcomes.assign(share=40.0))


def test_effects_of_sites_are_dots_with_their_intervals(site_effects):
    figure = plots.site_effects(site_effects, label="change")
    ax = figure.axes[0]
    assert labels(figure) == ["leave one out", "only one", "gradient"]
    assert (ticks(ax.yaxis), ax.get_xlabel()) == (["layer 2 down", "layer 3 down"], "change")
    np.testing.assert_allclose(line(figure, "only one").get_xdata(), [0.2, 0.3])
    reaches = [segment[:, 0] for segment in ax.collections[0].get_segments()]
    np.testing.assert_allclose(reaches, [[0.18, 0.22], [0.28, 0.32]])


def test_effects_without_intervals_are_dots_alone(site_effects):
    figure = plots.site_effects(site_effects.drop(columns=["low", "high"]))
    assert len(figure.axes[0].collections) == 0
    np.testing.assert_allclose(line(figure, "gradient").get_xdata(), [0.2, 0.3])


def test_more_sites_make_a_taller_figure(site_effects):
    many = pd.concat([site_effects.assign(site=site_effects["site"] + f" {i}") for i in range(20)])
    few, all_of_them = (plots.site_effects(frame).get_figheight() for frame in (site_effects, many))
    assert 2 * few < all_of_them < 20 * few


def test_the_readout_lists_tokens_by_rank_with_every_character_to_be_seen(readout):
    figure = plots.readout_table(readout)
    told = written(figure.axes[0])
    assert told[:5] == ["B of layer 3", "promoted by +", "logit", "·bad1", "+3.00"]
    assert told[told.index("promoted by −") + 2 :][:2] == ["$good$↵1", "−3.00"]
    assert "mean difference" in told
    assert len(written(plots.readout_table(readout, top=1).axes[0])) == 2 * (1 + 2 * (2 + 2))
    with pytest.raises(ValueError, match="knows the signs"):
        plots.readout_table(readout.replace("+", "plus"))


def test_a_character_without_a_glyph_is_written_as_its_code(readout, recwarn):
    strange = plots.readout_table(readout.assign(token="\ue123 very long token indeed"))
    strange.savefig(io.BytesIO(), format="png", dpi=50)
    assert written(strange.axes[0])[3] == "\\ue123·very·long…"
    assert recwarn.list == []


class _Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def spans(heatmap):
    return [attrs for tag, attrs in _Elements(heatmap.html).found if tag == "span" and "title" in attrs]


def test_tokens_are_coloured_around_zero_with_text_that_can_be_read():
    heatmap = plots.token_heatmap(["low", "none", "high"], np.array([-2.0, 0.0, 1.0]), title="An answer", label="A·x")
    low, none, high = spans(heatmap)
    assert "background:#053061;color:#FFFFFF" in low["style"]
    assert "background:#f7f6f6;color:#222222" in none["style"]
    assert f"background:{to_hex(colormaps['RdBu_r'](0.75))}" in high["style"]
    assert [found["title"] for found in (low, none, high)] == ["A·x -2", "A·x +0", "A·x +1"]
    assert {"An answer", "low", "none", "high"} <= set(_Elements(heatmap.html).words)
    assert heatmap._repr_html_() == heatmap.html
    assert heatmap.reach == 2.0


def test_a_limit_sets_the_darkest_colour():
    clipped, at_limit = spans(plots.token_heatmap(["a", "b"], [9.0, 1.0], limit=1.0))
    assert clipped["style"] == at_limit["style"]
    assert clipped["title"] == "scalar +9"
    assert spans(plots.token_heatmap(["a"], [0.0]))


@pytest.mark.parametrize("evil", EVIL)
def test_a_malicious_token_title_or_label_is_text_and_nothing_else(evil):
    heatmap = plots.token_heatmap([evil, "ok"], [1.0, -1.0], title=evil, label=evil)
    page = _Elements(heatmap.html)
    assert {tag for tag, _ in page.found} <= {"div", "span"}
    assert {name for _, attrs in page.found for name in attrs} <= {"style", "title"}
    assert page.words.count(evil) == 2
    assert "<script" not in heatmap.html
    assert "<img" not in heatmap.html


def test_whitespace_and_characters_that_hide_can_be_seen():
    assert legible(" word") == " word"
    assert legible("two words") == "two words"
    assert legible(" ") == "·"
    assert legible("end ") == "end·"
    assert legible("a  b\n\t") == "a· b↵→"
    assert legible("\u202eevil\x00") == "\\u202eevil\\u0000"
    assert legible("\ud83d") == "\\ud83d"
    assert "↵</span><br>" in plots.token_heatmap(["\n", "next"], [0.0, 1.0]).html


def test_a_token_heat_map_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="got 2 tokens and 1 values"):
        plots.token_heatmap(["a", "b"], [1.0])
    with pytest.raises(ValueError, match=r"got nan at token 1 \('b'\)"):
        plots.token_heatmap(["a", "b"], [1.0, float("nan")])
    with pytest.raises(ValueError, match="got inf at token 0"):
        plots.token_heatmap(["a"], [float("inf")])
    with pytest.raises(ValueError, match="one token or more, got none"):
        plots.TokenHeatmap((), ())
    with pytest.raises(ValueError, match="above zero, got 0"):
        plots.token_heatmap(["a"], [1.0], limit=0)
