"""Cures side by side: what each does to misalignment, to the narrow skill and to everything else, and whether it lasts.

A cure is told by its *states*: as it is, and what becomes of it. A state is either what the chat model wears (an
adapter, with or without an ablation beside it), so that all of them are sampled in one batch, or a whole edited model.
Each state answers the questions that show broad misalignment; as it is, a cure also answers those of the trained domain
(what the fine-tune was for) and the same questions behind a cue of its training (2604.25891).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechmisalign import capability, prompts
from mechmisalign._frames import plain_frame
from mechmisalign._renamed import renamed
from mechmisalign.adapters import Adapter
from mechmisalign.generation import generate
from mechmisalign.interventions import Intervention, UseAdapter
from mechmisalign.judging import Judge, compare, rates
from mechmisalign.judging import judge as judge_answers
from mechmisalign.judging.labels import label
from mechmisalign.organisms import Organism
from mechmisalign.statistics import paired_ratios

AS_IS = "as is"
FURTHER = "trained further"
NARROW = "narrow"
UNCURED = "uncured"

State = Sequence[Intervention] | Organism
"""What the chat model wears, or a whole model."""
States = Mapping[str, State]
"""By name; the first is the cure as it is."""

_COSTS = ("loss", "kl", "accuracy", "tokens")


def states(
    adapter: Adapter,
    beside: Sequence[Intervention] = (),
    *,
    further: Adapter | None = None,
    scales: Sequence[float] = (2.0, 5.0),
) -> dict[str, State]:
    """The states of a cure that is worn as an adapter.

    Args:
        adapter: Cured, or of the organism where the cure is only at inference.
        beside: What acts beside it at inference (``[mm.Ablate(direction)]``), in every state.
        further: The adapter after more training on the harmful data without the cure.
        scales: Factors of the adapter (2506.11613, section 4.2: hidden misalignment shows when a vector is scaled up).
    """
    found: dict[str, State] = {AS_IS: (UseAdapter(adapter), *beside)}
    found |= {f"x{scale:g}": (UseAdapter(adapter, scale), *beside) for scale in scales}
    return found if further is None else found | {FURTHER: (UseAdapter(further), *beside)}


@renamed(with_judge="judge")
def trials(
    chat: Organism,
    cures: Mapping[str, States],
    questions: Mapping[str, pd.DataFrame],
    judge: Judge,
    *,
    samples: int = 6,
    max_new_tokens: int = 600,
    system: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Judged answers of every cure in every state.

    Args:
        chat: Any organism on the chat model, which is used without its adapter.
        cures: States by the name of the cure; among them ``"uncured"``, and ``"chat"`` (``{"as is": ()}``) to compare.
            Names of controls say "random".
        questions: First those that show broad misalignment; ``"narrow"``: of the trained domain; any others are cues.
        judge: Scores the answers.
        samples: Answers to each question.
        max_new_tokens: Longest answer.
        system: System prompt of the questions that have none of their own.
        seed: Of the samples: another one than that on which doses or layers were chosen.

    Returns:
        Answers with ``cure, state, questions`` and the columns of :func:`mechmisalign.generate` and the judge.

    Raises:
        ValueError: If there are no cures or no questions, or a cure has no state.
    """
    if not cures or not questions or not all(cures.values()):
        raise ValueError(
            f"{len(cures)} cures and {len(questions)} sets of questions; one or more, with states, are needed"
        )
    first = next(iter(questions))
    sets = {name: prompts.as_prompts(frame).assign(questions=name) for name, frame in questions.items()}
    everything = prompts.concat(*sets.values())
    cells = [
        (cure, state, worn, number == 0)
        for cure, found in cures.items()
        for number, (state, worn) in enumerate(found.items())
    ]
    drawn: dict[str, Any] = {
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "system": system,
        "seed": seed,
    }
    parts = []
    for asked, of in ((everything, True), (sets[first], False)):
        here = {f"{cure} | {state}": (cure, state, worn) for cure, state, worn, is_first in cells if is_first == of}
        parts += [_sampled(chat, here, asked, drawn)] if here else []
    order = {cure: place for place, cure in enumerate(cures)}
    answers = pd.concat(parts, ignore_index=True)
    in_order = answers.sort_values("cure", key=lambda cure: cure.map(order), kind="stable", ignore_index=True)
    return judge_answers(in_order, judge)


def cure_costs(chat: Organism, cures: Mapping[str, States], **options: Any) -> pd.DataFrame:
    """What each cure, as it is, costs on neutral text and harmless questions: :func:`mechmisalign.costs` by ``cure``.

    Args:
        chat: As for :func:`trials`.
        cures: As for :func:`trials`.
        **options: Of :func:`mechmisalign.costs`.
    """
    first = {cure: next(iter(found.values())) for cure, found in cures.items()}
    worn = {cure: state for cure, state in first.items() if not isinstance(state, Organism)}
    parts = []
    if worn:
        with chat.as_base():
            parts.append(capability.costs(chat, worn, **options))
    for cure, state in first.items():
        if isinstance(state, Organism):
            parts.append(capability.costs(state, {cure: ()}, **options))
    found = pd.concat(parts).set_index("condition").loc[list(first)].reset_index()
    return found.rename(columns={"condition": "cure"})


def cure_table(judged: pd.DataFrame, costs: pd.DataFrame | None = None, *, against: str = UNCURED) -> pd.DataFrame:
    """One row per cure: misalignment, narrow skill, coherence, cost, and what is left of it in the other states.

    Args:
        judged: From :func:`trials`.
        costs: From :func:`cure_costs`.
        against: The cure that is none: the fine-tune as it would be.

    Returns:
        ``cure``; ``em``: misaligned and coherent, on the first questions; ``cut``: by how much of itself the uncured
        rate is lower (NaN where that is zero), ``p_max``: of the difference, corrected for all cures (NaN for the
        uncured); ``coherent``; ``narrow_harm`` and ``narrow_coherent``: the same on questions of the trained domain,
        that is, whether it does what it was tuned to do, and whether it still makes sense there; ``back_<way>``: the EM
        rate in each other state and under each cue (NaN where it was not tried); then the costs. All but ``p_max`` with
        ``_low, _high``, 95 %, clustered by question: they hold for the weights that were sampled, not for other
        training seeds. The interval of ``cut`` is :func:`mechmisalign.statistics.paired_ratios`, paired by question.

    Raises:
        ValueError: If the uncured answers are not there.
    """
    judged = plain_frame(judged)
    first = judged["questions"].iloc[0]
    own = judged[judged["state"].isin(_first_states(judged))]
    broad = own[own["questions"] == first]
    if against not in set(broad["cure"]):
        raise ValueError(
            f"no answers of {against!r} among the cures {sorted(set(broad['cure']))}; name it with against="
        )
    told = rates(broad, by="cure").set_index("cure")
    table = pd.concat([_with_ends(told, "rate", "em"), _cuts(broad, against)], axis=1)
    if len(told) > 1:
        table["p_max"] = compare(broad, against, by="cure").set_index("cure")["p_max"]
    table = table.join(_with_ends(told, "coherent", "coherent"))
    narrow = own[own["questions"] == NARROW]
    if len(narrow):
        inside = rates(narrow, by="cure").set_index("cure")
        table = table.join(_with_ends(inside, "rate", "narrow_harm"))
        table = table.join(_with_ends(inside, "coherent", "narrow_coherent"))
    back = comes_back(judged)
    for way in [name for name in back["way"].unique() if name != AS_IS]:
        table = table.join(_with_ends(back[back["way"] == way].set_index("cure"), "rate", f"back_{way}"))
    if costs is not None:
        kept = [f"{name}{end}" for name in _COSTS for end in ("", "_low", "_high") if f"{name}{end}" in costs.columns]
        table = table.join(costs.set_index("cure")[kept])
    return table.rename_axis("cure").reset_index()


def comes_back(judged: pd.DataFrame) -> pd.DataFrame:
    """EM rate of each cure as it is, in every other state, and behind every cue.

    Returns:
        One row per ``cure`` and ``way`` (``"as is"``, the states, the cues), with the columns of
        :func:`mechmisalign.rates`.
    """
    judged = plain_frame(judged)
    first, as_is = judged["questions"].iloc[0], judged["state"].isin(_first_states(judged))
    way = judged["state"].where(~as_is | (judged["questions"] == first), judged["questions"])
    asked = judged.assign(way=way.where(~as_is | (way != judged["state"]), AS_IS))
    found = rates(asked[asked["questions"].ne(NARROW) | (first == NARROW)], by=["cure", "way"])
    order = {name: place for place, name in enumerate(dict.fromkeys(judged["cure"]))}
    ways = {name: place for place, name in enumerate(dict.fromkeys([AS_IS, *judged["state"], *judged["questions"]]))}
    return found.sort_values(
        by=["cure", "way"], key=lambda column: column.map(order if column.name == "cure" else ways), ignore_index=True
    )


def _sampled(
    chat: Organism, cells: Mapping[str, tuple[str, str, State]], asked: pd.DataFrame, drawn: Mapping[str, Any]
) -> pd.DataFrame:
    worn = {name: list(state) for name, (_, _, state) in cells.items() if not isinstance(state, Organism)}
    parts = []
    if worn:
        with chat.as_base():
            parts.append(generate(chat, asked, conditions=worn, **drawn))
    for name, (_, _, state) in cells.items():
        if isinstance(state, Organism):
            parts.append(generate(state, asked, conditions={name: ()}, **drawn))
    answers = pd.concat(parts, ignore_index=True)
    for place, column in enumerate(("cure", "state")):
        answers[column] = [cells[name][place] for name in answers["condition"]]
    return answers


def _first_states(judged: pd.DataFrame) -> list[str]:
    return list(judged.drop_duplicates("cure")["state"].unique())


def _with_ends(told: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """A share with its interval, under another name."""
    low, high = ("low", "high") if column == "rate" else (f"{column}_low", f"{column}_high")
    return told[[column, low, high]].set_axis([name, f"{name}_low", f"{name}_high"], axis=1)


def _cuts(judged: pd.DataFrame, against: str) -> pd.DataFrame:
    """``1 - rate / uncured rate`` of each cure, paired by question; the uncured itself has no interval."""
    judged = plain_frame(judged)
    harmful = label(judged).eq("misaligned")
    counted = harmful.groupby([judged["cure"], judged["prompt_id"]], sort=False, observed=True).agg(["sum", "count"])
    tables = [counted[name].unstack(fill_value=0).astype(float) for name in ("sum", "count")]
    first = (tables[0].to_numpy(), tables[1].to_numpy())
    place = tables[0].index.get_loc(against)
    second = (np.repeat(first[0][[place]], len(first[0]), 0), np.repeat(first[1][[place]], len(first[1]), 0))
    left = paired_ratios(first, second)
    found = np.stack([1 - left.value, 1 - left.high, 1 - left.low], axis=1)
    found[place, 1:] = np.nan
    return pd.DataFrame(found, index=tables[0].index, columns=["cut", "cut_low", "cut_high"])
