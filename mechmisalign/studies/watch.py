"""A monitor on the residual stream, as steps of a study: fitted, calibrated and tested on the study's own answers.

Nothing is sampled. The chat model reads what the organism and itself have answered; it is fitted on as many misaligned
as aligned answers to each prompt. Questions are held out in turn: whole prompts, and again, where the questions have
domains, whole domains; those that are left are divided, by prompt, between fitting and calibrating. Scores of different
folds are made comparable with the calibration: zero is the threshold, one the standard deviation of its harmless
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechmisalign.conversations import Conversations
from mechmisalign.directions import Direction
from mechmisalign.monitoring import Calibration, Monitor, WordsBaseline, auroc_difference, discrimination, needed

from . import steps
from .sampling import LeftOutError, Run

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

MONITOR, WORDS, RANDOM = "monitor", "words only", "random direction"
PROMPTS, DOMAINS = "prompts", "domains"
"""What is held out."""
TABLES = ("watch", "watch_scores", "watch_folds", "watch_differences")

_RATES = (0.01, 0.05, 0.1, 0.2)
_MOST_FOLDS = 5
_MIN_FOLDS = 3
_MIN_PROMPTS = 6
_MOST_FITTED = 4
"""Answers of one class to one prompt: more of them to the same prompts add time, and hardly a better fit."""
_POSITIVE, _NEGATIVE = steps.CLASSES

_Detector = Callable[[pd.DataFrame], Float[np.ndarray, " n"]]


@dataclass(frozen=True)
class Fold:
    """Which prompts are used for what.

    Attributes:
        by: ``"prompts"`` or ``"domains"``.
        held_out: What is held out, in words.
        fit: Prompts to fit on.
        calibrate: Prompts whose harmless answers set the threshold.
        test: Prompts held out.
    """

    by: str
    held_out: str
    fit: tuple[str, ...]
    calibrate: tuple[str, ...]
    test: tuple[str, ...]


def investigate(run: Run, answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every table of the chapter.

    Args:
        run: The study.
        answers: Of the chat model and of the organism, judged.

    Raises:
        LeftOutError: If there are too few prompts, or too few answers of one class.
    """
    keep, seed = run.folder.table, run.plan.settings.seed
    folds = folds_of(run.plan.prompts)
    spoken = answers[answers["response"].str.strip() != ""]
    matched = steps.pool(spoken, seed).sample(frac=1, random_state=seed)  # else the chat model's come first
    matched = matched[matched.groupby(["prompt_id", "label"], observed=True).cumcount() < _MOST_FITTED]
    spoken = spoken[spoken["sample"] < run.plan.settings.samples]
    harmless = spoken[(spoken["condition"] == "chat") & (spoken["label"] == _NEGATIVE)]
    rate = _rate(folds, matched, harmless)
    tested = spoken[
        spoken["label"].eq(_NEGATIVE) | (spoken["condition"].eq("organism") & spoken["label"].eq(_POSITIVE))
    ]
    if tested["label"].nunique() < 2:
        raise LeftOutError(f"the answers to test a monitor on are all {tested['label'].iloc[0]}; sample more of them")

    def scored() -> pd.DataFrame:
        with run.organism.as_base():
            parts = [_scored(run, fold, matched, harmless, tested, rate) for fold in folds]
        return pd.concat(parts, ignore_index=True)

    scores = keep("watch_scores", scored)
    compute = {
        "watch": lambda: told_apart(scores, seed),
        "watch_folds": lambda: _described(folds, scores, rate),
        "watch_differences": lambda: against_others(scores, seed),
    }
    return {"watch_scores": scores, **{name: keep(name, function) for name, function in compute.items()}}


def told_apart(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """AUROC, hits and false alarms of each detector, over all that was held out and in each domain."""
    names = {name: name for name in (MONITOR, WORDS, RANDOM)}
    by, zero = "domain" if "domain" in scores else None, dict.fromkeys(names, 0.0)
    parts = [
        discrimination(rows, names, thresholds=zero, by=by, seed=seed).assign(by=held)
        for held, rows in scores.groupby("by", sort=False, observed=True)
    ]
    return pd.concat(parts, ignore_index=True)


def against_others(scores: pd.DataFrame, seed: int) -> pd.DataFrame:
    """AUROC of the monitor minus that of the words, and of the random direction, on the same answers."""
    rows = []
    for held, part in scores.groupby("by", sort=False):
        truth, clusters = (part["label"] == _POSITIVE).to_numpy(), part["prompt_id"].to_numpy()
        for other in (WORDS, RANDOM):
            one, two = (part[name].to_numpy(float) for name in (MONITOR, other))
            found = auroc_difference(one, two, truth, clusters, seed=seed)
            rows.append({"by": held, "against": other, **dict(zip(("difference", "low", "high"), found, strict=True))})
    return pd.DataFrame(rows)


def folds_of(prompts: pd.DataFrame) -> list[Fold]:
    """Every prompt is held out once, and once more with its whole domain where there are three domains or more."""
    ids = prompts["prompt_id"].astype(str)
    if "domain" not in prompts or prompts["domain"].nunique() < _MIN_FOLDS:
        return _dealt(PROMPTS, ids, ids, _MIN_FOLDS)
    order = prompts["domain"].astype(str).sort_values(kind="stable").index
    ids, domains = ids.loc[order], prompts["domain"].astype(str).loc[order]
    return _dealt(PROMPTS, ids, ids, _MIN_FOLDS) + _dealt(DOMAINS, ids, domains, _MOST_FOLDS)


def _dealt(by: str, ids: pd.Series, units: pd.Series, most: int) -> list[Fold]:
    """Folds that hold out every so many units; the prompts that are left take turns."""
    names, found = list(dict.fromkeys(units)), []
    for number in range(min(most, len(names))):
        out = units.isin(names[number::most])
        rest, test = ids[~out].tolist(), tuple(ids[out])
        told = ", ".join(dict.fromkeys(units[out])) if by == DOMAINS else f"{number + 1} of {most}"
        found.append(Fold(by, told, tuple(rest[::2]), tuple(rest[1::2]), test))
    return found


def detectors(
    organism: Organism, fitted: pd.DataFrame, system: str | None, seed: int
) -> tuple[Monitor, dict[str, _Detector]]:
    """The monitor, a random direction that may choose its sign, and the words, all from the same answers."""
    talk = Conversations(fitted, organism.tokenizer, system=system)
    truth = (fitted["label"] == _POSITIVE).to_numpy()
    monitor = Monitor.fit(organism, talk, seed=seed)
    noise = torch.randn(
        1,
        monitor.weights.shape[1],
        generator=torch.Generator("cpu").manual_seed(5000 + seed),
        dtype=torch.float32,
        device="cpu",
    )
    random = Monitor.of(Direction(noise, monitor.layers, organism.provenance), monitor.layers)
    words = WordsBaseline.fit(list(fitted["response"]), truth)

    def reads(one: Monitor) -> _Detector:
        return lambda rows: one.score(organism, Conversations(rows, organism.tokenizer, system=system))[
            "score"
        ].to_numpy()

    values = reads(random)(fitted)
    sign = 1.0 if values[truth].mean() >= values[~truth].mean() else -1.0
    found: dict[str, _Detector] = {MONITOR: reads(monitor), RANDOM: lambda rows: sign * reads(random)(rows)}
    return monitor, found | {WORDS: lambda rows: words.scores(list(rows["response"]))}


def headline(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The numbers for the summary: AUROC, hits and false alarms of each detector on what was held out."""
    overall, told = tables["watch"][tables["watch"]["group"] == "all"], {}
    for by, rows in overall.groupby("by", sort=False, observed=True):
        told[f"held_out_{by}"] = {
            str(row["detector"]): {
                what: {"value": float(row[what]), "low": float(row[f"{what}_low"]), "high": float(row[f"{what}_high"])}
                for what in ("auroc", "tpr", "fpr")
            }
            for _, row in rows.iterrows()
        }
    return {"asked_fpr": float(tables["watch_folds"]["asked_fpr"].iloc[0]), **told}


def _rate(folds: Sequence[Fold], matched: pd.DataFrame, harmless: pd.DataFrame) -> float:
    """The lowest rate of false alarms that every fold can be calibrated for.

    Raises:
        LeftOutError: If there is none, or a fold has too few prompts with answers of both classes to fit on.
    """
    fitted = min(matched.loc[matched["prompt_id"].isin(fold.fit), "prompt_id"].nunique() for fold in folds)
    calm = min(harmless.loc[harmless["prompt_id"].isin(fold.calibrate), "prompt_id"].nunique() for fold in folds)
    rates = [rate for rate in _RATES if needed(rate) <= calm]
    if fitted < _MIN_PROMPTS or not rates:
        raise LeftOutError(
            f"too little to fit and calibrate a monitor on: {fitted} prompts with answers of both classes (needed: "
            f"{_MIN_PROMPTS}), {calm} with harmless answers of the chat model (needed: {needed(_RATES[-1])})"
        )
    return rates[0]


def _scored(
    run: Run, fold: Fold, matched: pd.DataFrame, harmless: pd.DataFrame, tested: pd.DataFrame, rate: float
) -> pd.DataFrame:
    """The held-out answers with the scores of every detector, in units of the calibration."""
    settings = run.plan.settings
    fitted, calm, held = (
        rows[rows["prompt_id"].isin(prompts)]
        for rows, prompts in ((matched, fold.fit), (harmless, fold.calibrate), (tested, fold.test))
    )
    monitor, found = detectors(run.organism, fitted, settings.system, settings.seed)
    columns = [name for name in ("condition", "prompt_id", "sample", "domain", "label") if name in held]
    table = held[columns].assign(by=fold.by, held_out=fold.held_out, layer=monitor.layers[0])
    for name, detector in found.items():
        reference = Calibration.of(detector(calm), calm["prompt_id"].to_numpy(), fpr=rate)
        spread = float(reference.scores.std()) or 1.0
        table[name] = (detector(held) - reference.threshold) / spread
    return table


def _described(folds: Sequence[Fold], scores: pd.DataFrame, rate: float) -> pd.DataFrame:
    layers = scores.drop_duplicates(["by", "held_out"]).set_index(["by", "held_out"])["layer"]
    rows = [
        {"by": fold.by, "held_out": fold.held_out, "fit": len(fold.fit), "calibrate": len(fold.calibrate)}
        | {"test": len(fold.test), "layer": int(layers.get((fold.by, fold.held_out), -1)), "asked_fpr": rate}
        for fold in folds
    ]
    return pd.DataFrame(rows)
