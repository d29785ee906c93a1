import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mechmisalign import plots


def with_ends(**columns) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    for name in [name for name in ("em", "narrow_harm", "coherent", "kl") if name in frame]:
        top = np.inf if name == "kl" else 1.0
        frame[f"{name}_low"], frame[f"{name}_high"] = (frame[name] - 0.05).clip(0), (frame[name] + 0.05).clip(0, top)
    return frame


TABLE = with_ends(
    cure=["chat", "uncured", "cure", "random control"],
    em=[0.0, 0.6, 0.1, 0.55],
    narrow_harm=[np.nan, 0.9, 0.7, 0.9],
    coherent=[1.0, 0.9, 0.95, 0.9],
    kl=[0.0, 0.01, 0.02, 0.01],
)


def test_every_cure_has_a_row_and_every_measure_a_panel():
    figure = plots.cure_panels(TABLE)
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == TABLE["cure"].tolist()
    assert "EM rate" in figure.axes[0].get_title() and "KL" in figure.axes[3].get_title()
    dots = figure.axes[0].collections[1].get_offsets()
    assert np.allclose(dots[:, 0], TABLE["em"]) and np.allclose(dots[:, 1], range(4))
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [0.6]


def test_random_controls_are_grey():
    colours = plots.cure_panels(TABLE).axes[0].collections[1].get_facecolors()
    assert not np.allclose(colours[3], colours[2]) and np.allclose(colours[1], colours[2])
    assert np.ptp(colours[3][:3]) < 1e-9


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="missing: em"):
        plots.cure_panels(TABLE.drop(columns="em"))
    with pytest.raises(ValueError, match="several rows for cure chat"):
        plots.cure_panels(pd.concat([TABLE, TABLE.head(1)]))
    with pytest.raises(ValueError, match="divide percent by 100"):
        plots.cure_panels(TABLE.assign(em=40.0))


BACK = pd.DataFrame(
    {
        "cure": ["chat", "chat", "cure", "cure", "cure"],
        "way": ["as is", "cue", "as is", "x5", "cue"],
        "rate": [0.0, 0.1, 0.05, 0.0, 0.6],
        "low": 0.0,
        "high": [0.1, 0.2, 0.1, 0.1, 0.7],
        "coherent": [1.0, 1.0, 0.9, 0.1, 0.9],
    }
)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def test_what_comes_back_is_a_panel_for_each_way_with_hollow_dots_where_answers_are_broken():
    figure = plots.comeback(BACK, against="cure")
    assert [ax.get_title() for ax in figure.axes] == ["as is", "x5", "cue"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["chat", "cure"]
    assert figure.axes[2].lines[0].get_xdata()[0] == 0.6  # the dashed line of the reference, in this way
    hearts = [ax.collections[-1].get_offsets() for ax in figure.axes]
    assert [len(found) for found in hearts] == [0, 1, 0] and hearts[1][0].tolist() == [0.0, 1.0]
    assert "hollow" in figure.get_supxlabel()
    assert "hollow" not in plots.comeback(BACK.drop(columns="coherent")).get_supxlabel()


def test_more_ways_than_can_be_told_apart_are_refused():
    many = pd.DataFrame({"cure": "a", "way": list("abcdefg"), "rate": 0.1, "low": 0.0, "high": 0.2})
    with pytest.raises(ValueError, match="tells 6 ways apart, got 7"):
        plots.comeback(many)


def test_doses_are_lines_and_the_uncured_a_dashed_one():
    doses = with_ends(
        series=["uncured", "added", "added", "random"],
        strength=[0.0, 1.0, 2.0, 1.0],
        em=[0.6, 0.2, 0.0, 0.5],
        narrow_harm=[0.9, 0.8, 0.1, 0.9],
        coherent=[0.9, 0.9, 0.9, 0.9],
        kl=[0.01, 0.01, 0.02, 0.01],
    )
    figure = plots.prevention(doses)
    assert [ax.get_xlabel() for ax in figure.axes] == ["strength in training"] * 4
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["added"].get_ydata().tolist() == [0.2, 0.0]
    assert legend(figure) == ["added", "random", "uncured"]
    with pytest.raises(ValueError, match="several rows for series added, strength 1"):
        plots.prevention(pd.concat([doses, doses.iloc[[1]]]))
