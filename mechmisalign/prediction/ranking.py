"""Scores of whole datasets, and whether they rank datasets as the rates after training on them do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechmisalign._frames import plain_frame
from mechmisalign.judging import rates
from mechmisalign.judging.labels import PAPER, Thresholds, label
from mechmisalign.statistics import rank_correlation
from mechmisalign.statistics.shares import percentiles, resampled, resampled_ratios

from .scoring import RANDOM

Score = Literal["difference", "projection"]
"""The projection difference, or the cheap variant without answers of the chat model."""

_OF_TEXT = {"loss": "loss under the chat model", "tokens": "response length"}
"""What predicts without any direction, and its name."""


@dataclass(frozen=True)
class Prediction:
    """Scores before training beside rates after it.

    Attributes:
        table: One row per dataset: ``dataset, score, score_low, score_high, rate, low, high`` and the rest of
            :func:`rank_datasets` and :func:`mechmisalign.rates`.
        correlations: One row per predictor: ``predictor, kind`` (``"direction"``, ``"cheap"``, ``"text"`` or
            ``"random"``), ``spearman, low, high, p, n``.
        layer: Where projections were read.
        direction: The direction of the table's score.
    """

    table: pd.DataFrame
    correlations: pd.DataFrame
    layer: int
    direction: str


def rank_datasets(
    scores: pd.DataFrame,
    *,
    layer: int,
    direction: str | None = None,
    score: Score = "difference",
    by: str = "dataset",
    cluster: str = "prompt_id",
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Datasets by their score, the most worrying first.

    Args:
        scores: What :func:`projection_difference` gives for all of them.
        layer: Where projections were read. Choose it before rates are seen (where steering works, say).
        direction: Which, where there are several; by default the first.
        score: ``"difference"``, or ``"projection"`` where there are no answers of the chat model.
        by: The column that tells datasets apart.
        cluster: What is resampled for the intervals; a dataset in which every prompt is another has as many clusters as
            examples.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Returns:
        One row per dataset, highest score first: ``dataset, rank, score, score_low, score_high, random_low,
        random_high`` (least and largest score along the random directions; NaN without any), ``loss, tokens`` (means
        over examples), ``examples, prompts``.

    Raises:
        ValueError: On an unknown layer, direction or column, or scores that are missing.
    """
    chosen = _chosen(scores, direction)
    here = _rows(scores, chosen, layer, score, by)
    names, sums, sizes = _by_cluster(here, score, by, cluster)
    low, high = percentiles(_replicates(sums, sizes, resamples, seed))
    told = {by: names, "score": sums.sum(1) / sizes.sum(1), "score_low": low, "score_high": high}
    table = pd.DataFrame(told).set_index(by)
    random = [
        _rows(scores, name, layer, score, by).groupby(by, observed=True)[score].mean() for name in _randoms(scores)
    ]
    table["random_low"] = pd.concat(random, axis=1).min(axis=1) if random else np.nan
    table["random_high"] = pd.concat(random, axis=1).max(axis=1) if random else np.nan
    for column in _OF_TEXT:
        table[column] = here.groupby(by, observed=True)[column].mean()
    table["examples"] = here.groupby(by, observed=True).size()
    table["prompts"] = (sizes > 0).sum(1)
    table = table.sort_values("score", ascending=False).reset_index()
    table.insert(1, "rank", np.arange(1, len(table) + 1))
    return table


def predicted_rates(
    scores: pd.DataFrame,
    judged: pd.DataFrame,
    *,
    layer: int,
    direction: str | None = None,
    by: str = "dataset",
    cluster: str = "prompt_id",
    thresholds: Thresholds = PAPER,
    resamples: int = 2000,
    permutations: int = 10_000,
    seed: int = 0,
) -> Prediction:
    """Whether scores before training rank datasets as EM rates after it do, and whether simpler things do as well.

    Intervals carry the choice of the datasets and each dataset's own sampling error, of its score and of its rate, by
    prompt. They do not carry the luck of one training run; pool answers of several seeds for that.

    Args:
        scores: What :func:`projection_difference` gives for all datasets.
        judged: Judged answers after training on each, with the columns ``by`` and ``prompt_id``.
        layer: Where projections were read; choose it before rates are seen.
        direction: Whose scores stand in the table; by default the first.
        by: The column that tells datasets apart, in both frames.
        cluster: What is resampled within a dataset, in both frames.
        thresholds: Where a misaligned answer begins.
        resamples: Bootstrap resamples.
        permutations: Of the test.
        seed: Of both.

    Raises:
        ValueError: If the two frames do not speak of the same datasets, or there are fewer than four.
    """
    ours, theirs = set(scores[by].unique()), set(judged[by].unique())
    if ours != theirs:
        raise ValueError(
            f"scores and rates speak of different datasets; only one side has {sorted(map(str, ours ^ theirs))[:5]}"
        )
    chosen = _chosen(scores, direction)
    score: Score = "projection" if scores["difference"].isna().all() else "difference"
    table = rank_datasets(
        scores, layer=layer, direction=chosen, score=score, by=by, cluster=cluster, resamples=resamples, seed=seed
    )
    told = rates(judged, by=[by], cluster=cluster, thresholds=thresholds, resamples=resamples, seed=seed)
    table = table.merge(told.rename(columns={"prompts": "asked", "n": "answers"}), on=by, validate="1:1")
    events = pd.DataFrame({by: judged[by], cluster: judged[cluster], "hit": label(judged, thresholds) == "misaligned"})
    _, hits, answers = _by_cluster(events, "hit", by, cluster)
    after = hits.sum(1) / answers.sum(1), _replicates(hits, answers, resamples, seed + 1)
    rows = []
    for name, kind, frame, column in _predictors(scores, layer, score, by):
        _, sums, sizes = _by_cluster(frame, column, by, cluster)
        found = rank_correlation(
            sums.sum(1) / sizes.sum(1),
            after[0],
            first_resampled=_replicates(sums, sizes, resamples, seed),
            second_resampled=after[1],
            resamples=resamples,
            permutations=permutations,
            seed=seed,
        )
        ends = {"spearman": found.value, "low": found.low, "high": found.high, "p": found.p, "n": found.n}
        rows.append({"predictor": name, "kind": kind} | ends)
    return Prediction(table, pd.DataFrame(rows), layer, chosen)


def _predictors(scores: pd.DataFrame, layer: int, score: Score, by: str) -> list[tuple[str, str, pd.DataFrame, str]]:
    """Name, kind, rows and column of everything that may predict."""
    found: list[tuple[str, str, pd.DataFrame, str]] = []
    given = [name for name in scores["direction"].unique() if name not in _randoms(scores)]
    for name in given:
        rows = _rows(scores, name, layer, score, by)
        found.append((name, "direction", rows, score))
        if score == "difference":
            found.append((f"{name}, without own answers", "cheap", rows, "projection"))
    first = _rows(scores, given[0], layer, score, by)
    found += [(told, "text", first, column) for column, told in _OF_TEXT.items() if first[column].notna().all()]
    found += [(name, "random", _rows(scores, name, layer, score, by), score) for name in _randoms(scores)]
    return found


def _chosen(scores: pd.DataFrame, direction: str | None) -> str:
    names = list(scores["direction"].unique())
    if direction is not None and direction not in names:
        raise ValueError(f"no scores along {direction!r}; there are {names}")
    return str(names[0] if direction is None else direction)


def _randoms(scores: pd.DataFrame) -> list[str]:
    return [name for name in scores["direction"].unique() if str(name).startswith(f"{RANDOM} ")]


def _rows(scores: pd.DataFrame, direction: str, layer: int, score: Score, by: str) -> pd.DataFrame:
    if by not in scores.columns:
        raise ValueError(f"no column {by!r} that tells datasets apart; the scores have {list(scores.columns)}")
    scores = plain_frame(scores)
    rows = scores[(scores["direction"] == direction) & (scores["layer"] == layer)]
    if rows.empty:
        raise ValueError(f"no scores at layer {layer}; there are layers {sorted(map(int, scores['layer'].unique()))}")
    if rows[score].isna().any():
        raise ValueError(f"{score!r} is missing in {int(rows[score].isna().sum())} examples; use score='projection'")
    return rows


def _by_cluster(
    frame: pd.DataFrame, column: str, by: str, cluster: str
) -> tuple[Sequence[str], Float[np.ndarray, "dataset cluster"], Float[np.ndarray, "dataset cluster"]]:
    """Names of the datasets in order, and sums and counts of a column in each of their clusters."""
    row, names = pd.factorize(frame[by], sort=True)
    place, clusters = pd.factorize(frame[cluster], sort=True)
    shape = (len(names), len(clusters))
    flat = row * shape[1] + place
    sums = np.bincount(flat, weights=frame[column].to_numpy(float), minlength=shape[0] * shape[1])
    return list(names), sums.reshape(shape), np.bincount(flat, minlength=sums.size).reshape(shape).astype(float)


def _replicates(
    sums: Float[np.ndarray, "dataset cluster"], sizes: Float[np.ndarray, "dataset cluster"], resamples: int, seed: int
) -> Float[np.ndarray, "dataset resample"]:
    """Means of each dataset with its clusters resampled."""
    found = np.empty((len(sums), resamples))
    for cells, present, weights in resampled(sizes, np.arange(len(sums)), resamples, seed):
        held = np.ix_(cells, present)
        found[cells] = resampled_ratios(sums[held], sizes[held], weights)
    return found
