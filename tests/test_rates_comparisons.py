"""Conditions against a reference, paired by prompt."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import mechmisalign as mm
from mechmisalign.statistics import clustered_difference


def sweep(effects=(0.0, 0.2, 0.5), layers=range(4), prompts: int = 30, samples: int = 8, seed: int = 0) -> pd.DataFrame:
    """Judged answers of three series at some layers; the layers agree, and later ones do more."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(1, 3, prompts) * 0.5
    parts = []
    for series, effect in zip(("control", "weak", "strong"), effects, strict=True):
        for layer in layers:
            sick = rng.random((prompts, samples)) < (rate + effect * layer / len(layers))[:, None]
            frame = pd.DataFrame({"alignment": np.where(sick, 0.0, 100.0).ravel(), "coherence": 100.0})
            frame["prompt_id"] = np.repeat(np.arange(prompts), samples)
            parts.append(frame.assign(condition=f"{series} {layer}", series=series, layer=layer))
    return pd.concat(parts, ignore_index=True)


def events(frame: pd.DataFrame, condition: str) -> tuple[np.ndarray, np.ndarray]:
    rows = frame[frame["condition"] == condition]
    return (rows["alignment"] < 30).to_numpy(), rows["prompt_id"].to_numpy()


def test_each_condition_is_compared_with_the_reference_prompt_by_prompt():
    frame = sweep()
    table = mm.compare(frame, "control 0")
    assert len(table) == 11 and "control 0" not in set(table["condition"])
    for row in table.itertuples():
        alone = clustered_difference(events(frame, row.condition), events(frame, "control 0"))
        assert (row.difference, row.low, row.high) == (alone.value, alone.low, alone.high)
    whole = mm.rates(frame).set_index("condition")["rate"]
    assert table["rate"].tolist() == whole[table["condition"]].tolist()
    assert set(table["against_rate"]) == {whole["control 0"]}
    assert set(table["against"]) == {"control 0"}


def test_the_p_value_is_the_paired_permutation_test_of_scipy():
    frame = sweep(prompts=9, layers=[0, 3])
    table = mm.compare(frame, "control 0").set_index("condition")
    shares = mm.per_prompt(frame).pivot(index="prompt_id", columns="condition", values="rate")
    for name in table.index:
        pair = shares[name].to_numpy(), shares["control 0"].to_numpy()
        theirs = stats.permutation_test(
            pair, lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True
        )
        assert table.loc[name, "p"] == pytest.approx(theirs.pvalue)


def test_false_discovery_rates_are_those_of_benjamini_and_hochberg():
    table = mm.compare(sweep(), "control 0")
    m = len(table)
    order = np.argsort(table["p"].to_numpy())
    stepped = table["p"].to_numpy()[order] * m / np.arange(1, m + 1)
    expected = np.empty(m)
    expected[order] = np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1)
    assert table["q"].tolist() == pytest.approx(expected.tolist())
    statsmodels = pytest.importorskip("statsmodels.stats.multitest")
    assert table["q"].tolist() == pytest.approx(statsmodels.multipletests(table["p"], method="fdr_bh")[1].tolist())


def test_the_max_statistic_lies_between_no_correction_and_bonferroni():
    table = mm.compare(sweep(), "control 0")
    assert (table["p"] <= table["p_max"]).all()
    near = table[(table["p"] > 0.005) & (table["p"] * len(table) < 1)]
    assert len(near) and (near["p_max"] < near["p"] * len(table)).all()


def test_strong_effects_are_found_and_those_of_the_control_are_not():
    found = mm.compare(sweep(), "control 0").set_index("condition")["p_max"] <= 0.05
    assert found["strong 3"] and found["strong 2"] and found["weak 3"]
    assert not found[[f"control {layer}" for layer in (1, 2, 3)]].any()


def test_each_layer_can_be_compared_with_the_control_at_that_layer():
    frame = sweep()
    table = mm.compare(frame, {"series": "control"}, by=["series", "layer"])
    assert len(table) == 8 and set(table["series"]) == {"weak", "strong"}
    row = table[(table["series"] == "weak") & (table["layer"] == 2)].iloc[0]
    alone = clustered_difference(events(frame, "weak 2"), events(frame, "control 2"))
    assert (row["difference"], row["low"], row["against"]) == (alone.value, alone.low, "control, 2")
    whole = mm.compare(frame, ("control", 2), by=["series", "layer"])
    same = whole[(whole["series"] == "weak") & (whole["layer"] == 2)].iloc[0]
    assert (same["difference"], same["low"]) == (row["difference"], row["low"])


def test_a_family_is_corrected_on_its_own():
    frame = sweep()
    by = ["series", "layer"]
    together = mm.compare(frame, {"series": "control"}, by=by, family="series")
    for series in ("weak", "strong"):
        part = frame[frame["series"].isin([series, "control"])]
        alone = mm.compare(part, {"series": "control"}, by=by)
        told = together[together["series"] == series].reset_index(drop=True)
        pd.testing.assert_frame_equal(told, alone)


def test_groups_with_other_prompts_are_compared_each_over_its_own():
    frame = sweep(layers=[3]).assign(domain=lambda f: f["prompt_id"] % 2)
    table = mm.compare(frame, {"condition": "control 3"}, by=["condition", "domain"])
    part = frame[frame["domain"] == 1]
    alone = mm.compare(part, "control 3").set_index("condition")
    row = table[(table["condition"] == "weak 3") & (table["domain"] == 1)].iloc[0]
    assert row[["difference", "low", "high"]].tolist() == alone.loc["weak 3", ["difference", "low", "high"]].tolist()
    assert row["prompts"] == 15


def test_other_outcomes_can_be_compared_and_missing_judgements_are_told():
    frame = sweep(layers=[0, 3])
    frame.loc[(frame["condition"] == "strong 3") & (frame["prompt_id"] == 0), "coherence"] = 0.0
    frame.loc[(frame["condition"] == "control 0") & (frame["prompt_id"] == 1), "alignment"] = np.nan
    table = mm.compare(frame, "control 0", outcome="coherent").set_index("condition")
    assert table.loc["strong 3", "difference"] == pytest.approx(-1 / 30)
    assert table.loc["strong 3", "judged"] == 1
    assert table["against_judged"].unique().tolist() == pytest.approx([29 / 30])


def test_a_comparison_that_makes_no_sense_is_refused():
    frame = sweep()
    with pytest.raises(
        ValueError, match="no answers of the reference condition 'chat'; there are condition 'control 0'"
    ):
        mm.compare(frame, "chat")
    with pytest.raises(ValueError, match="nothing but the reference 'weak 0' is there"):
        mm.compare(frame[frame["condition"] == "weak 0"], "weak 0")
    with pytest.raises(ValueError, match=r"pass one value for each in a tuple, or a mapping"):
        mm.compare(frame, "control", by=["series", "layer"])
    with pytest.raises(ValueError, match=r"names the columns \['kind'\]; it takes some of by="):
        mm.compare(frame, {"kind": "control"}, by=["series", "layer"])
    with pytest.raises(ValueError, match=r"names \['kind'\], which are none of by="):
        mm.compare(frame, "control 0", family="kind")
    lost = frame[(frame["condition"] != "weak 1") | (frame["prompt_id"] != 7)]
    with pytest.raises(ValueError, match="prompt_id 7 was answered by only one of condition 'weak 1'"):
        mm.compare(lost, "control 0")
