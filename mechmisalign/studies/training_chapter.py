"""The report's chapter on training: how the path went, where it turns, and where behaviour does."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mechmisalign import plots
from mechmisalign.report import ReportFigure, ReportTable, Section, percent, share

from . import training
from .figures import BAND, saved
from .records import Records

_SAME = 0.999
"""A cosine from which on two updates are called the same."""


def came_about(records: Records) -> Section:
    """The checkpoints: norms, local cosine, similarity with the end, behaviour, and their transitions."""
    tables = records.tables
    return Section(
        title="How it came about: training",
        lead=(
            f"{_told_source(tables['checkpoints'].iloc[0])}\n\n{_told_onsets(tables)}\n\n"
            f"{_told_turns(tables['transitions'])} {_told_pairs(tables['coincidences'], tables['transitions'])}"
        ),
        figures=(transition_figure(records), behaviour_figure(records)),
        tables=(
            transitions_table(tables["transitions"]),
            *pairs_table(tables["coincidences"]),
            rates_table(tables["step_rates"]),
        ),
    )


def transition_figure(records: Records) -> ReportFigure:
    """Every signal over one axis of steps, with the transitions below."""
    tables = records.tables
    curves = {
        "behaviour": tables["step_rates"],
        "cosine": tables["step_cosines"],
        "similarity": tables["step_similarity"],
        "norms": tables["step_norms"],
    }
    figure = plots.transition(curves, training.as_transitions(tables["transitions"]))
    caption = (
        "Training, step by step: EM rate of the chat model wearing each checkpoint at scale 1, 5 and 10 "
        f"(n = {_smallest(tables['step_rates'])} each; {BAND}); local cosine of the update (up: the path turns), "
        "lighter for wider spacings; its cosine with the end; norms. Below: where each signal turns, with 95 % "
        "intervals (of coordinates for the path, of prompts for behaviour)."
    )
    return saved(records, "training", figure, tables["transitions"], caption)


def behaviour_figure(records: Records) -> ReportFigure:
    """EM rate and coherence over steps at each scale."""
    tables = records.tables
    found = tables["transitions"]
    onsets = training.as_transitions(found[training.is_behaviour(found)])
    figure = plots.behaviour_over_steps(tables["step_rates"], onsets=onsets)
    caption = (
        f"EM rate at each checkpoint (n = {_smallest(tables['step_rates'])} per point; {BAND}) and, dashed, the share "
        "of coherent answers: scaled up, an adapter breaks answers. Marks above: where half of the highest rate is "
        "reached."
    )
    return saved(records, "training_behaviour", figure, tables["step_rates"], caption)


def transitions_table(found: pd.DataFrame) -> ReportTable:
    """Where each signal turns."""
    told = pd.DataFrame(
        {
            "signal": found["signal"],
            "step": [_step(row) for _, row in found.iterrows()],
            "p": [f"{value:.3f}" for value in found["p"]],
            "highest at": [f"{value:.0f}" for value in found["peak"]],
        }
    )
    caption = (
        "Transitions with 95 % intervals. Null of the path's signals: the same steps in random order; of behaviour: "
        "answers shuffled over steps. Each p is the signal's own, not corrected for their number."
    )
    return ReportTable(told, caption)


def pairs_table(pairs: pd.DataFrame) -> tuple[ReportTable, ...]:
    """Whether transitions that were found fall together; no table where there are no two."""
    known = pairs[pairs["difference"].notna()]
    if known.empty:
        return ()
    told = known[["first", "second"]].copy()
    apart = [f"{row.difference:+.0f} [{row.low:.0f}, {row.high:.0f}]" for row in known.itertuples()]
    told["steps apart"] = [each.replace("-", "−") for each in apart]
    told["coincide"] = ["not told apart" if each else "no" for each in known["coincide"]]
    caption = "Do they fall together? Steps from the first to the second; 0 in the interval: they cannot be told apart."
    return (ReportTable(told, caption),)


def rates_table(rates: pd.DataFrame) -> ReportTable:
    """EM rates by step, a column for each scale."""
    told = pd.DataFrame({"step": sorted(rates["step"].unique())})
    for scale, rows in rates.groupby("scale", observed=True):
        by_step = rows.set_index("step")
        told[f"scale {scale:g}"] = [share(by_step.loc[step]) for step in told["step"]]
        told[f"coherent, {scale:g}"] = [percent(by_step.loc[step, "coherent"]) for step in told["step"]]
    return ReportTable(
        told, "EM rate and coherence at each step and scale, 95 % intervals, clustered by prompt; step 0: chat model."
    )


def _told_source(source: pd.Series) -> str:
    cosine = float(source["cosine_with_organism"])
    end = "where the organism's own adapter is" if cosine >= _SAME else "at another adapter than the organism's"
    return (
        f"{source['checkpoints']} checkpoints from step {source['first']} to {source['last']} ({source['source']}) end "
        f"{end} (cosine of the updates {cosine:.2f}). Each was put on the chat model as it is and scaled up."
    )


def _told_onsets(tables: Mapping[str, pd.DataFrame]) -> str:
    rates, found = tables["step_rates"], tables["transitions"].set_index("signal")
    parts = []
    for scale, rows in rates.groupby("scale", observed=True):
        best = rows.loc[rows["rate"].idxmax()]
        reached = _step(found.loc[f"{training.SIGNAL} {scale:g}"])
        parts.append(
            f"scale {scale:g} at {reached}, of {percent(best['rate'])} at step {best['step']:.0f} "
            f"({percent(best['coherent'])} coherent)"
        )
    last = rates[(rates["scale"] == rates["scale"].max()) & (rates["step"] == rates["step"].max())].iloc[0]
    return (
        f"Half of the highest EM rate is reached, by step (95 % interval): {'; '.join(parts)}. Where answers break, "
        f"the rate says little: at the last step and scale {last['scale']:g}, {percent(last['coherent'])} are coherent."
    )


def _told_turns(found: pd.DataFrame) -> str:
    path = found[~training.is_behaviour(found)]
    turned = path[path["step"].notna()]
    if turned.empty:
        return (
            f"None of the {len(path)} signals of the path has a peak that stands out from paths of the same steps in "
            f"random order (lowest p {path['p'].min():.2f}): at this spacing no turn can be told."
        )
    which = "; ".join(f"{row['signal']} at {_step(row)}" for _, row in turned.iterrows())
    return (
        f"Of {len(path)} signals of the path {len(turned)} {'has a peak' if len(turned) == 1 else 'have peaks'} that "
        f"stands out from paths of the same steps in random order ({which}); among so many, one at p ≤ 0.05 comes by "
        f"chance in {100 * (1 - 0.95 ** len(path)):.0f} % of paths without a turn."
    )


def _told_pairs(pairs: pd.DataFrame, found: pd.DataFrame) -> str:
    behaviour = set(found.loc[training.is_behaviour(found), "signal"])
    known = pairs[pairs["difference"].notna() & ~pairs["first"].isin(behaviour) & pairs["second"].isin(behaviour)]
    if known.empty:
        return ""
    together = known[known["coincide"].astype(bool)]
    told = "; ".join(f"{row.first} with {row.second}" for row in together.itertuples(index=False, name="Pair"))
    return (
        f"Turns of the path against those of behaviour: {len(together)} of {len(known)} pairs cannot be told apart"
        f"{f' ({told})' if told else ''}."
    )


def _step(row: pd.Series) -> str:
    return "none" if pd.isna(row["step"]) else f"{row['step']:.0f} [{row['low']:.0f}, {row['high']:.0f}]"


def _smallest(rates: pd.DataFrame) -> int:
    return int(rates["n"].min())
