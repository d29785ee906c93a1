"""Figures of training dynamics: what they show, and what they refuse."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from mechmisalign import dynamics, plots
from mechmisalign.dynamics import Principal, Transition
from mechmisalign.plots._style import CONTROL, PALETTE

STEPS = np.arange(0, 60, 5)


def found(step: float, signal: str = "rotation") -> Transition:
    return Transition(signal, step, step - 4, step + 6, 0.01, 0.5, step, np.array([float(step)]))


MISSED = Transition("growth", np.nan, np.nan, np.nan, 0.4, 0.1, 20.0, np.array([20.0]))


@pytest.fixture
def cosines():
    rows = [{"step": step, "spacing": s, "cosine": -1 + s / 20} for s in (5, 10) for step in STEPS]
    return pd.DataFrame(rows)


@pytest.fixture
def norms():
    return pd.DataFrame(
        [
            {"site": site, "step": step, "quantity": kind, "norm": 3.0 * step}
            for site in ("1.down_proj",)
            for kind in ("A", "B", "dW")
            for step in STEPS
        ]
    )


@pytest.fixture
def rates():
    frame = pd.DataFrame([{"step": step, "scale": k, "rate": step / 100 / k} for k in (1.0, 5.0) for step in STEPS])
    return frame.assign(low=frame["rate"] * 0.8, high=frame["rate"] + 0.1, coherent=0.9)


def test_the_sign_of_the_local_cosine_is_written_beside_it(cosines):
    ax = plots.local_cosines(cosines, at=found(30)).axes[0]
    assert {text.get_text(): text.xy[1] for text in ax.texts} == {"turns back": 1, "right angle": 0, "straight": -1}
    assert ax.get_ylim()[0] < -1 < 1 < ax.get_ylim()[1]
    assert [line.get_ydata()[0] for line in ax.lines[:2]] == pytest.approx([-0.75, -0.5])
    shade = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (shade.x0, shade.x1) == pytest.approx((26, 36))


def test_norms_are_relative_to_their_largest_and_a_line_for_each_site(norms):
    ax = plots.norms_by_step(norms).axes[0]
    assert [line.get_ydata()[-1] for line in ax.lines] == [1, 1, 1]
    assert len({to_hex(line.get_color()) for line in ax.lines}) == 3
    two = pd.concat([norms, norms.assign(site="2.down_proj")])
    assert len(plots.norms_by_step(two).axes[0].lines) == 6


def test_the_plane_shows_each_step_and_what_the_components_explain():
    scores = pd.DataFrame({"step": STEPS, "pc1": STEPS * 1.0, "pc2": np.sin(STEPS / 10)})
    figure = plots.path_plane(Principal(scores, np.array([0.91, 0.07])), at=found(30))
    ax = figure.axes[0]
    assert ax.collections[0].get_offsets().data.tolist() == scores[["pc1", "pc2"]].to_numpy().tolist()
    assert ax.get_xlabel() == "PC1 (91 % of the variance)"
    assert "turn at 30" in [text.get_text() for text in ax.texts]
    assert figure.axes[1].get_ylabel() == "training step"
    unmarked = plots.path_plane(Principal(scores, np.array([0.91, 0.07])), at=MISSED)
    assert [text.get_text() for text in unmarked.axes[0].texts] == ["0", "55"]


def test_similarity_draws_a_line_for_each_series():
    frame = pd.DataFrame({"step": [*STEPS, *STEPS], "cosine": 0.5, "series": ["A"] * 12 + ["B"] * 12})
    assert len(plots.similarity_to_end(frame).axes[0].lines) == 2


def test_behaviour_shows_scales_coherence_and_onsets(rates):
    onsets = [found(40, "EM at scale 1"), found(20, "EM at scale 5")]
    ax = plots.behaviour_over_steps(rates, onsets=onsets).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["scale 1"].get_ydata()[-1] == pytest.approx(0.55)
    dots = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1]
    assert dots == [40, 20]
    assert sum(line.get_linestyle() == "--" for line in ax.lines) == 2
    with pytest.raises(ValueError, match="1 onsets for 2 scales"):
        plots.behaviour_over_steps(rates, onsets=onsets[:1])


def test_the_transition_figure_puts_all_signals_over_one_axis(rates, cosines, norms):
    similarity = pd.DataFrame({"step": STEPS, "cosine": np.linspace(0, 1, 12)})
    log = pd.DataFrame({"step": STEPS, "grad_norm": 0.5})
    curves = {"cosine": cosines, "behaviour": rates, "similarity": similarity, "norms": norms}
    figure = plots.transition(curves, [found(20, "EM at scale 5"), MISSED, found(40)], log=log)
    *panels, rows = figure.axes
    assert len(panels) == 5
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert panels[0].get_ylabel() == "EM rate"
    for ax in panels:
        assert [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2] == [20, 40]
    assert [label.get_text() for label in rows.get_yticklabels()] == ["EM at scale 5", "growth", "rotation"]
    assert [text.get_text() for text in rows.texts] == ["none (p = 0.40)"]
    assert to_hex(rows.texts[0].get_color()) == CONTROL.lower()
    assert [to_hex(line.get_color()) for line in rows.lines] == [PALETTE[0].lower(), PALETTE[1].lower()]


def test_figures_of_a_real_run_are_drawn():
    followed = dynamics.Trajectory.load("pocket/checkpoints")
    path = followed.path("B")
    told = dynamics.transition(path, permutations=19, resamples=20)
    for figure in (
        plots.local_cosines(dynamics.local_cosine(path), at=told),
        plots.path_plane(dynamics.principal(path), at=told),
        plots.norms_by_step(dynamics.site_norms(followed)),
        plots.similarity_to_end(dynamics.similarity(path)),
        plots.transition({"cosine": dynamics.local_cosine(path)}, [told]),
    ):
        figure.canvas.draw()


def test_what_cannot_be_drawn_is_refused(cosines, rates):
    with pytest.raises(ValueError, match="missing: cosine"):
        plots.local_cosines(cosines.drop(columns="cosine"))
    with pytest.raises(ValueError, match="several rows for series , spacing 5"):
        plots.local_cosines(pd.concat([cosines, cosines]))
    with pytest.raises(ValueError, match="divide percent by 100"):
        plots.behaviour_over_steps(rates.assign(rate=50.0))
    with pytest.raises(ValueError, match=r"got \['angles'\]"):
        plots.transition({"angles": cosines}, [])
    with pytest.raises(ValueError, match="got no curves"):
        plots.transition({}, [])


@pytest.mark.parametrize("held", [False, True])
def test_the_log_of_a_run_is_drawn_with_a_panel_for_what_it_has(held):
    steps = np.arange(1, 6)
    log = pd.DataFrame(
        {"step": steps, "response_loss": 1 / steps, "kl": steps * 0.01 if held else np.nan, "grad_norm": 0.1}
    )
    panels = plots.training_log(log).axes
    assert len(panels) == (3 if held else 2)
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), 1 / steps)
    with pytest.raises(ValueError, match="grad_norm"):
        plots.training_log(log.drop(columns="grad_norm"))
