"""Sentences of the report, each against a case in which its opposite holds."""

import pandas as pd
import pytest

from mechmisalign.studies import watch
from mechmisalign.studies.cure_chapter import told_reason
from mechmisalign.studies.difference_tables import told_ablation
from mechmisalign.studies.watch_chapter import told_against


def against(words, random=(0.4, 0.3, 0.5)) -> pd.DataFrame:
    return pd.DataFrame([words, random], index=[watch.WORDS, watch.RANDOM], columns=["difference", "low", "high"])


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((0.324, 0.25, 0.4), "the monitor tells the answers apart better"),
        ((-0.05, -0.08, -0.02), "the words of the answers tell them apart better"),
        ((0.001, -0.004, 0.006), "adds nothing to reading them"),
        ((0.03, -0.02, 0.08), "it cannot be said whether"),
    ],
)
def test_what_a_monitor_adds_comes_from_the_paired_difference(difference, said):
    told = told_against(against(difference))
    assert said in told and "random direction" not in told
    others = {"adds nothing", "better than their words", "tell them apart better than", "cannot be said"} - {said}
    assert sum(other in told for other in others) <= 1


def test_a_monitor_that_does_not_beat_a_random_direction_is_told():
    assert "random direction (+0.010 [−0.050, +0.070])" in told_against(against((0.3, 0.2, 0.4), (0.01, -0.05, 0.07)))


def difference(value: float, low: float, high: float, p: float) -> dict[str, float]:
    return {"difference": value, "low": low, "high": high, "p_max": p}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (difference(-0.3, -0.45, -0.1, 0.001), "more than taking so much of the update away explains"),
        (difference(0.3, 0.1, 0.45, 0.001), "nothing speaks for this direction"),
        (difference(0.0, -0.05, 0.05, 1.0), "does as much, to 10 points"),
        (difference(-0.1, -0.3, 0.1, 0.2), "cannot be said"),
    ],
)
def test_whether_a_cure_is_more_than_a_smaller_update_comes_from_the_paired_difference(found, said):
    told = told_reason(found)
    assert said in told and "points" in told
    assert ("does as much, to" in told) == (said == "does as much, to 10 points")


def test_ablations_that_break_the_answers_are_named_beside_the_count():
    scopes = pd.DataFrame({"estimator": ["a", "b"], "scope": "single", "difference": -0.3, "p_max": 0.01})
    rates = scopes.assign(coherent=[0.9, 0.2])
    assert told_ablation(scopes, rates).endswith("coherent under b, single.")
    assert "coherent" not in told_ablation(scopes, rates.assign(coherent=0.9))
