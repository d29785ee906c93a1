import numpy as np
import pandas as pd
import pytest

from mechmisalign.studies import splits, steps


def asked(n: int, domains: int = 4) -> pd.DataFrame:
    return pd.DataFrame({"prompt_id": [f"p{i}" for i in range(n)], "domain": [f"d{i % domains}" for i in range(n)]})


@pytest.mark.parametrize("n", [8, 31, 60])
def test_halves_are_even_in_all_and_in_each_domain_and_come_from_the_seed(n):
    prompts = asked(n)
    found = splits.halves(prompts, 0)
    table = found.table.merge(prompts)
    assert table["prompt_id"].tolist() == prompts["prompt_id"].tolist() and found.name == "report"
    assert not found.choice & found.report and len(found.choice | found.report) == n
    assert abs(len(found.choice) - len(found.report)) <= 1
    counts = table.groupby(["domain", "split"]).size().unstack(fill_value=0)
    assert (counts["choice"] - counts["report"]).abs().max() <= 1
    pd.testing.assert_frame_equal(found.table, splits.halves(prompts, 0).table)
    assert splits.halves(prompts.sample(frac=1, random_state=1), 0).choice == found.choice
    assert n == 8 or splits.halves(prompts, 1).choice != found.choice


def test_variants_of_one_question_stay_together():
    prompts = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in range(40)], "question_id": [f"q{i % 20}" for i in range(40)]}
    )
    table = splits.halves(prompts, 0).table.merge(prompts)
    assert (table.groupby("question_id")["split"].nunique() == 1).all() and table["split"].nunique() == 2


def test_few_prompts_are_not_divided():
    found = splits.halves(asked(7), 0)
    assert set(found.table["split"]) == {"both"} and found.name == "both"
    assert found.choice == found.report == set(asked(7)["prompt_id"])


def winners(rng, halves: splits.Halves, cells: int, prompts: int, samples: int) -> tuple[float, float]:
    """What is reported of the best of many cells that are all alike, each with its own luck at each prompt."""
    chances = rng.beta(0.6, 1.4, (cells, prompts))  # 0.3 in the mean of all prompts, for every cell
    first, fresh = (rng.binomial(samples, chances) / samples for _ in range(2))
    chosen = halves.table["prompt_id"].isin(halves.choice).to_numpy()
    sweep = pd.DataFrame({"series": steps.MEAN_DIFFERENCE, "layer": range(cells), "strength": 1.0, "coherent": 1.0})
    by_prompts, _ = steps.best_cell(sweep.assign(rate=first[:, chosen].mean(1)), 0.8)
    by_samples, _ = steps.best_cell(sweep.assign(rate=first.mean(1)), 0.8)
    return float(fresh[by_prompts, ~chosen].mean()), float(fresh[by_samples].mean())


def test_nothing_is_gained_by_choosing_where_all_cells_are_alike():
    """Fresh samples of the same prompts, as before, keep a good part of the winner's curse."""
    rng, halves = np.random.default_rng(0), splits.halves(asked(40), 0)
    found = np.array([winners(rng, halves, 48, 40, 4) for _ in range(600)])
    gained = found.mean(0) - 0.3
    assert abs(gained[0]) < 0.01 and gained[1] > 0.05
