"""The figure of misalignment against coherence."""

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from mechmisalign import plots
from mechmisalign.plots._style import CONTROL, PALETTE


def rates(names: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame({"organism": names, "rate": [0.1 * (i % 9) for i in range(len(names))], "coherent": 0.9})
    return frame.assign(low=0.0, high=frame["rate"] + 0.1, coherent_low=0.8, coherent_high=0.95)


def points(figure):
    return [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]


def test_each_row_is_a_point_and_rows_of_one_name_share_a_look():
    figure = plots.rate_against_coherence(rates(["pocket/a", "pocket/a", "pocket/b"]), by="organism")
    first, second = points(figure)
    assert list(first.get_ydata()) == pytest.approx([0.0, 0.1])
    assert list(first.get_xdata()) == pytest.approx([0.9, 0.9])
    assert list(second.get_ydata()) == pytest.approx([0.2])
    assert to_hex(first.get_color()) == PALETTE[0].lower()
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]


def test_intervals_are_drawn_along_both_axes():
    frame = rates(["a"]).assign(low=0.02, high=0.3)
    figure = plots.rate_against_coherence(frame, by="organism")
    across, upright = (lines.get_segments()[0].tolist() for lines in figure.axes[0].collections)
    assert across == [pytest.approx([0.8, 0.0]), pytest.approx([0.95, 0.0])]
    assert upright == [pytest.approx([0.9, 0.02]), pytest.approx([0.9, 0.3])]


def test_random_controls_are_grey_and_a_seventh_name_has_another_marker():
    figure = plots.rate_against_coherence(rates(["random 0", *"abcdef"]), by="organism")
    drawn = points(figure)
    assert to_hex(drawn[0].get_color()) == CONTROL.lower()
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in drawn}) == 7


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="missing: coherent_low"):
        plots.rate_against_coherence(rates(["a"]).drop(columns="coherent_low"), by="organism")
    with pytest.raises(ValueError, match="divide percent by 100"):
        plots.rate_against_coherence(rates(["a"]).assign(rate=12.0), by="organism")
    with pytest.raises(ValueError, match="tells 18 names apart, got 19"):
        plots.rate_against_coherence(rates([f"m{i}" for i in range(19)]), by="organism")
