"""What solutions do: the narrow skill against misalignment elsewhere, and what hides until a narrow one is scaled up.

A solution that looks narrow may be a general one of too small a norm: scaled up, its misalignment shows (2602.07852,
2506.11613). Beyond some multiplier answers break, so that the EM rate falls with coherence: both are told, and the rate
among coherent answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from mechmisalign import prompts
from mechmisalign._renamed import renamed
from mechmisalign.capability.texts import Counted, text_costs
from mechmisalign.conversations import Conversations
from mechmisalign.generation import generate
from mechmisalign.judging import COHERENT_ABOVE, Judge, rates
from mechmisalign.judging import judge as judge_answers

from .forms import Solution, SolutionError, norm, worn

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

NARROW = "narrow"
"""Name of the questions of the trained domain."""
MULTIPLIERS = tuple(range(1, 11))


@renamed(with_judge="judge")
def answers(
    chat: Organism,
    solutions: Mapping[str, Solution],
    questions: Mapping[str, pd.DataFrame],
    judge: Judge,
    *,
    multipliers: Sequence[float] = (1.0,),
    samples: int = 6,
    max_new_tokens: int = 600,
    seed: int = 0,
) -> pd.DataFrame:
    """Judged answers of the chat model wearing each solution at each multiplier.

    Args:
        chat: Any organism on the chat model, which is used without its adapter.
        solutions: Named solutions, of any form.
        questions: Prompts by the name of their set: ``"narrow"``, held-out questions of the trained domain, and any
            others, such as domains that the KL penalty saw and domains that it did not.
        judge: Scores the answers.
        multipliers: Of each solution.
        samples: Answers to each question.
        max_new_tokens: Longest answer.
        seed: Of the samples: another one than that on which anything was chosen.

    Returns:
        Answers with ``solution, multiplier, questions`` and the columns of :func:`mechmisalign.generate` and the judge.

    Raises:
        SolutionError: If there is no solution.
        ValueError: If there are no questions or no multipliers.
    """
    if not solutions:
        raise SolutionError("no solution to ask; give a mapping of names to adapters or directions")
    if not questions or not len(multipliers):
        raise ValueError(f"{len(questions)} sets of questions and {len(multipliers)} multipliers; one or more of each")
    asked = prompts.concat(*(prompts.as_prompts(frame).assign(questions=name) for name, frame in questions.items()))
    cells = {f"{name} | x{times:g}": (name, times) for name in solutions for times in multipliers}
    conditions = {cell: worn(solutions[name], times) for cell, (name, times) in cells.items()}
    with chat.as_base():
        found = generate(chat, asked, conditions=conditions, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
    told = [cells[cell] for cell in found["condition"]]
    found = found.assign(solution=[name for name, _ in told], multiplier=[times for _, times in told])
    return judge_answers(found, judge)


def hidden_em(judged: pd.DataFrame) -> pd.DataFrame:
    """The EM rate of each solution against its multiplier, with coherence.

    Args:
        judged: From :func:`answers`.

    Returns:
        One row for each ``solution, multiplier, questions``, with the columns of :func:`mechmisalign.rates`, and
        ``of_coherent`` with its ends: the share of misaligned among coherent answers (NaN where there are none).
    """
    by = ["solution", "multiplier", "questions"]
    found = _in_order(rates(judged, by=by), judged, by)
    whole = judged[judged["coherence"] > COHERENT_ABOVE]
    columns = {"rate": "of_coherent", "low": "of_coherent_low", "high": "of_coherent_high"}
    if not len(whole):
        return found.assign(**dict.fromkeys(columns.values(), float("nan")))
    return found.merge(rates(whole, by=by)[[*by, *columns]].rename(columns=columns), on=by, how="left")


def skills(judged: pd.DataFrame, solutions: Mapping[str, Solution], moved: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per solution: what it was trained to do, what it does elsewhere, and its norm.

    Args:
        judged: From :func:`answers`; the rows at multiplier 1 count.
        solutions: As there.
        moved: From :func:`kl_to_chat`.

    Returns:
        ``solution, norm``; for each set of questions ``<set>`` (misaligned and coherent, with ``_low, _high``) and
        ``<set>_coherent``; for each set of texts ``kl_<set>`` with its ends.

    Raises:
        ValueError: If there are no answers at multiplier 1.
    """
    plain = judged[judged["multiplier"] == 1]
    if not len(plain):
        raise ValueError(f"no answers at multiplier 1; there are {sorted(set(judged['multiplier']))}")
    table = pd.DataFrame({"solution": list(solutions), "norm": [norm(each) for each in solutions.values()]})
    for name in dict.fromkeys(plain["questions"]):
        told = rates(plain[plain["questions"] == name], by="solution")
        columns = {"rate": name, "low": f"{name}_low", "high": f"{name}_high", "coherent": f"{name}_coherent"}
        table = table.merge(told[["solution", *columns]].rename(columns=columns), on="solution", how="left")
    if moved is None:
        return table
    for name, rows in moved.groupby("texts", sort=False, observed=True):
        columns = {f"kl{end}": f"kl_{name}{end}" for end in ("", "_low", "_high")}
        table = table.merge(rows[["solution", *columns]].rename(columns=columns), on="solution", how="left")
    return table


def kl_to_chat(
    chat: Organism,
    solutions: Mapping[str, Solution],
    texts: Mapping[str, Conversations | pd.DataFrame | Sequence[str]],
    *,
    counted: Counted | None = None,
    **options: Any,
) -> pd.DataFrame:
    """How far each solution is from the chat model, on several sets of text.

    2602.07852 finds general ones twice as far as narrow ones, on questions of both kinds.

    Args:
        chat: Any organism on the chat model, which is used without its adapter.
        solutions: Named solutions, of any form.
        texts: Conversations (or plain texts) by the name of their set, such as of the trained domain and of others.
        counted: Which response tokens count; all by default.
        **options: Of :func:`mechmisalign.capability.text_costs`.

    Returns:
        ``solution, texts, kl, kl_low, kl_high`` (nats per token, 95 % by text).
    """
    conditions = {name: worn(each) for name, each in solutions.items()}
    parts = []
    with chat.as_base():
        for name, of in texts.items():
            found = text_costs(chat, conditions, of, counted=counted, **options)
            parts.append(found.rename(columns={"condition": "solution", "texts": "n"}).assign(texts=name))
    return pd.concat(parts, ignore_index=True)[["solution", "texts", "kl", "kl_low", "kl_high"]]


def _in_order(found: pd.DataFrame, judged: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Rows in the order in which the answers come."""
    places = {column: {value: i for i, value in enumerate(dict.fromkeys(judged[column]))} for column in by}
    return found.sort_values(list(by), key=lambda column: column.map(places[column.name]), ignore_index=True)
