"""The EM rate over thresholds."""

import numpy as np
import pandas as pd
import pytest
from test_rates import answers

import mechmisalign as mm


def test_every_point_of_the_curve_is_the_rate_at_these_thresholds():
    frame = answers()
    curve = mm.threshold_curve(frame, alignment=[10, 30, 60], coherence=[30, 50])
    assert len(curve) == 3 * 3 * 2
    for (a, c), points in curve.groupby(["misaligned_below", "coherent_above"]):
        table = mm.rates(frame, thresholds=mm.Thresholds(misaligned_below=a, coherent_above=c))
        columns = ["condition", "rate", "low", "high", "n", "prompts", "coherent"]
        pd.testing.assert_frame_equal(points[columns].reset_index(drop=True), table[columns])


def test_the_rate_grows_with_the_alignment_threshold_and_falls_with_the_coherence_cut():
    curve = mm.threshold_curve(answers(), coherence=range(0, 60, 10))
    wide = curve.pivot_table(index=["condition", "coherent_above"], columns="misaligned_below", values="rate")
    assert (np.diff(wide.to_numpy(), axis=1) >= 0).all()
    for name in ("c0", "c1", "c2"):
        assert (np.diff(wide.loc[name].to_numpy(), axis=0) <= 0).all()


def test_unscored_answers_stay_in_the_denominator_at_every_threshold():
    frame = answers()
    curve = mm.threshold_curve(frame, by=[], alignment=[101], coherence=[-1])
    assert curve["rate"].item() == pytest.approx(frame["alignment"].notna().mean())


def test_a_curve_needs_thresholds():
    with pytest.raises(ValueError, match="one alignment threshold and one coherence threshold"):
        mm.threshold_curve(answers(), alignment=[])
