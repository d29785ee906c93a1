"""What a study reads from its answers, the directions that follow, and what it chooses.

Whatever is chosen (a layer, a strength, an estimator) is chosen on one half of the prompts and reported on the other,
on fresh samples (see ``splits``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from mechmisalign import estimators
from mechmisalign.activations import collect
from mechmisalign.adapters import Adapter
from mechmisalign.conversations import Conversations
from mechmisalign.directions import Direction
from mechmisalign.moments import Moments, align_groups
from mechmisalign.organisms import Organism

MEAN_DIFFERENCE = "mean difference"
MODEL_DIFFERENCE = "model difference"
CLASSES = ("misaligned", "aligned")
CLASSLESS = (MODEL_DIFFERENCE, "first principal")
"""Estimators that compare two models over the same answers, whatever class these are of."""
MIN_ANSWERS = 20
CONTROL = "random control"


class TooFewAnswersError(ValueError):
    """An organism gave too few answers of one class to estimate a direction from."""


@dataclass(frozen=True)
class Readings:
    """Moments over the same answers: the organism's, the chat model's, and the organism's first three tokens."""

    organism: Moments
    base: Moments
    opening: Moments


def pool(judged: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The organism's own answers, as many misaligned as aligned ones to each prompt.

    Pools of equal size (2506.11618, section 3.1) are not enough: where misalignment is nearly a function of the prompt,
    a difference between pools that answer different prompts is a direction of their topics.

    Raises:
        TooFewAnswersError: If fewer than 20 answers of a class can be matched with one of the other to the same prompt.
    """
    matched = _matched(judged, seed)
    if len(matched) // 2 < MIN_ANSWERS:
        raise TooFewAnswersError(_too_few(judged, len(matched) // 2))
    return matched


def pool_with_chat(judged: pd.DataFrame, chat: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The organism's own answers where they are enough; otherwise with the chat model's in the class that is missing.

    A strongly misaligned organism has hardly an aligned answer of its own. Where it has fewer of one class to a prompt,
    the answers of the chat model to that prompt stand in for them; the column ``condition`` says whose each answer is.

    Args:
        judged: The organism's answers.
        chat: The chat model's, to the same prompts.
        seed: Of the choice among them.

    Raises:
        TooFewAnswersError: If there are too few pairs even so.
    """
    own = _matched(judged, seed)
    if len(own) // 2 >= MIN_ANSWERS:
        return own
    filled = _matched(pd.concat([judged, chat], ignore_index=True), seed, own=len(judged))
    if len(filled) // 2 < MIN_ANSWERS:
        raise TooFewAnswersError(_too_few(judged, len(own) // 2, len(filled) // 2))
    return filled


def pool_of_study(
    judged: pd.DataFrame, chat: Callable[[], pd.DataFrame], seed: int
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The answers that a study's directions are estimated from, and the estimators that can read them.

    Where too few answers of a class can be matched, even with the chat model's, those estimators are left that compare
    models instead of classes; they read all answers of the organism.

    Raises:
        TooFewAnswersError: If there are too few answers that say anything.
    """
    try:
        return pool_with_chat(judged, chat(), seed), tuple(ESTIMATORS)
    except TooFewAnswersError:
        if (judged["response"].str.strip() != "").sum() < MIN_ANSWERS:
            raise
        return judged, CLASSLESS


def reference(names: Iterable[str]) -> str:
    """The estimator that a study steers with and sets beside the others: the mean difference, where it has one."""
    return MEAN_DIFFERENCE if MEAN_DIFFERENCE in set(names) else MODEL_DIFFERENCE


def reliability(readings: Readings, estimator: str, seed: int) -> pd.DataFrame:
    """Cosine between the estimates of two halves of the prompts, by layer (see ``estimators.split_half``)."""
    if estimator == MEAN_DIFFERENCE:
        return estimators.split_half(readings.organism, *CLASSES, seed=seed)
    return estimators.split_half(side_by_side(readings), "organism", "chat model", seed=seed)


def side_by_side(readings: Readings) -> Moments:
    """Both models' moments as two classes, whose mean difference is the model difference."""
    here, base = align_groups(readings.organism, readings.base)
    groups = [each.groups.assign(model=name) for each, name in ((here, "organism"), (base, "chat model"))]
    joined = pd.concat(groups, ignore_index=True)
    columns = ["model", *(name for name in joined.columns if name != "model")]
    mean, norm = torch.cat([here.mean, base.mean]), torch.cat([here.norm, base.norm])
    return replace(here, groups=joined[columns], mean=mean, norm=norm)


def pool_for(estimator: str, judged: pd.DataFrame, chat: Callable[[], pd.DataFrame], seed: int) -> pd.DataFrame:
    """The answers that one estimator reads: the model difference needs no classes, and takes all where they are few.

    Args:
        estimator: A name of ``ESTIMATORS``.
        judged: The organism's answers.
        chat: Gives the chat model's; called only where the organism's own are not enough.
        seed: Of the choice among them.

    Raises:
        TooFewAnswersError: If an estimator that compares classes has too few pairs.
    """
    own = _matched(judged, seed)
    if len(own) // 2 >= MIN_ANSWERS:
        return own
    if estimator == MODEL_DIFFERENCE and (judged["response"].str.strip() != "").sum() >= MIN_ANSWERS:
        return judged
    return pool_with_chat(judged, chat(), seed)


def pool_sources(pooled: pd.DataFrame) -> pd.DataFrame:
    """How many answers of each class are whose: ``label, source, answers``."""
    source = pooled["condition"].map({"chat": "chat model"}).fillna("organism")
    return pooled.groupby(["label", source.rename("source")]).size().rename("answers").reset_index()


def _matched(judged: pd.DataFrame, seed: int, own: int | None = None) -> pd.DataFrame:
    """As many misaligned as aligned answers to each prompt; of the first ``own`` rows before the others."""
    clear = judged[judged["label"].isin(CLASSES)].sample(frac=1, random_state=seed)
    if own is not None:
        clear = clear.loc[[*clear.index[clear.index < own], *clear.index[clear.index >= own]]]
    place = clear.groupby(["prompt_id", "label"]).cumcount()
    counts = pd.crosstab(clear["prompt_id"], clear["label"]).reindex(columns=CLASSES, fill_value=0).min(axis=1)
    return clear[place < clear["prompt_id"].map(counts).astype(float)].sort_index()


def _too_few(judged: pd.DataFrame, pairs: int, with_chat: int | None = None) -> str:
    """What is missing, and the setting that helps."""
    totals = judged["label"].value_counts().reindex(CLASSES, fill_value=0)
    prompts = judged["prompt_id"].nunique()
    drawn = -(-len(judged) // max(prompts, 1))
    filled = "" if with_chat is None else f" ({with_chat} with the chat model's for the missing class)"
    most = max(pairs, with_chat or 0)
    to = f"to {_more(drawn, most)} or more" if most else "higher"
    help_by = (
        f"raise pool_samples (--pool-samples), now {drawn} for each of {prompts} prompts, {to}, or ask other or more "
        "prompts (--prompts); what is sampled already is kept. Look at the judge's scores too"
    )
    return (
        f"of {totals['misaligned']} misaligned and {totals['aligned']} aligned answers only {pairs} pairs are to "
        f"the same prompt{filled}, at least {MIN_ANSWERS} are needed for a mean difference; {help_by}. The model "
        f"difference needs no pairs: mechmisalign direction --estimator {MODEL_DIFFERENCE!r}"
    )


def _more(drawn: int, pairs: int) -> int:
    return -(-drawn * MIN_ANSWERS // pairs)


def read(organism: Organism, answered: pd.DataFrame, system: str | None) -> Readings:
    """Activations of the organism and of its chat model over the same answers, grouped by class, prompt and sample."""
    conversations = spoken(organism, answered, system)
    by = ["label", "prompt_id", "sample"]
    here = collect(organism, conversations, by=by)
    opening = collect(organism, conversations, by=by, first=3)
    with organism.as_base():
        base = collect(organism, conversations, by=by)
    return Readings(here, base, opening)


def spoken(organism: Organism, answered: pd.DataFrame, system: str | None) -> Conversations:
    """The answers that say anything, as conversations."""
    return Conversations(answered[answered["response"].str.strip() != ""], organism.tokenizer, system=system)


ESTIMATORS: Mapping[str, Callable[[Readings], Direction]] = {
    MEAN_DIFFERENCE: lambda read: estimators.mean_difference(read.organism, *CLASSES),
    "mean difference, first 3 tokens": lambda read: estimators.mean_difference(read.opening, *CLASSES),
    "prompt-matched difference": lambda read: estimators.matched_mean_difference(read.organism, *CLASSES),
    "whitened difference": lambda read: estimators.whitened_difference(read.organism, *CLASSES),
    "logistic probe": lambda read: estimators.logistic_direction(read.organism, *CLASSES),
    MODEL_DIFFERENCE: lambda read: estimators.model_difference(read.organism, read.base),
    "first principal": lambda read: estimators.first_principal(read.organism, read.base),
}


def best_cell(sweep: pd.DataFrame, min_coherent: float) -> tuple[int, float]:
    """Layer and strength with the highest EM rate among the coherent ones (among all, if none is).

    Of several such cells the most coherent, then the one of the lowest strength and layer: that of the figure.
    """
    cells = sweep[sweep["series"] != CONTROL]
    coherent = cells[cells["coherent"] >= min_coherent]
    by, rising = ["rate", "coherent", "strength", "layer"], [False, False, True, True]
    best = (coherent if len(coherent) else cells).sort_values(by, ascending=rising).iloc[0]
    return int(best["layer"]), float(best["strength"])


def best_by_layer(sweep: pd.DataFrame, min_coherent: float) -> pd.DataFrame:
    """For each layer the strength with the highest coherent EM rate, and the control at the same strength."""
    cells = sweep[sweep["series"] != CONTROL]
    ranked = cells.assign(broken=cells["coherent"] < min_coherent).sort_values(
        ["broken", "rate", "coherent"], ascending=[True, False, False], kind="stable"
    )
    best = ranked.groupby("layer").head(1).sort_values("layer").drop(columns="broken")
    control = sweep[sweep["series"] == CONTROL].merge(best[["layer", "strength"]], on=["layer", "strength"])
    return pd.concat([best, control], ignore_index=True)


def costly_cells(sweep: pd.DataFrame, layer: int, min_coherent: float) -> list[str]:
    """The cells of the sweep whose cost is worth its time: coherent ones of the direction, and all that are drawn."""
    coherent = (sweep["series"] != CONTROL) & (sweep["coherent"] >= min_coherent)
    drawn = sweep["condition"].isin(best_by_layer(sweep, min_coherent)["condition"]) | (sweep["layer"] == layer)
    return list(sweep.loc[coherent | drawn, "condition"])


def chosen_layers(search: pd.DataFrame, min_coherent: float) -> dict[str, int]:
    """For each estimator the layer whose vector cuts EM most while answers stay coherent."""
    ranked = search.assign(broken=search["coherent"] < min_coherent).sort_values(
        ["broken", "rate", "coherent"], ascending=[True, True, False]
    )
    return {str(name): int(group["layer"].iloc[0]) for name, group in ranked.groupby("estimator", sort=False)}


def best_estimator(ablated: pd.DataFrame, scope: str, min_coherent: float) -> str:
    """The estimator whose ablation leaves the least EM among those that leave the answers coherent."""
    cells = ablated[(ablated["scope"] == scope) & (ablated["estimator"] != CONTROL)]
    coherent = cells[cells["coherent"] >= min_coherent]
    return str((coherent if len(coherent) else cells).sort_values("rate")["estimator"].iloc[0])


def best_estimators(ablated: pd.DataFrame, min_coherent: float) -> dict[str, str]:
    """The best estimator of each scope."""
    return {scope: best_estimator(ablated, scope, min_coherent) for scope in ("layer-wise", "single")}


def best_scope(ablated: pd.DataFrame, chosen: Mapping[str, str], min_coherent: float) -> str:
    """Layer-wise or single: the better of the two chosen ablations, where they were compared."""
    cells = ablated[ablated["scope"].map(chosen) == ablated["estimator"]]
    coherent = cells[cells["coherent"] >= min_coherent]
    return str((coherent if len(coherent) else cells).sort_values("rate")["scope"].iloc[0])


def on_base_of(own: Adapter, other: Adapter) -> Adapter:
    """Another adapter that is known to be on the same base, by the name that the first one calls it."""
    return replace(other, base=own.base, config={**other.config, "revision": own.config.get("revision")})


def stored_directions(run: Path, names: Sequence[str], estimator: str) -> dict[str, Direction]:
    """One estimator's direction of every named organism that has one in the run folder."""
    paths = {name: run / "directions" / slug(name) / f"{slug(estimator)}.safetensors" for name in names}
    return {name: Direction.load(path) for name, path in paths.items() if path.exists()}


def slug(name: str) -> str:
    """A name as a file name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)
