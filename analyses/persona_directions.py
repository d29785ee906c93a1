"""Is a direction that a system prompt gives the one that a fine-tune turns on? After 2507.21509, with 2506.11618.

The chat model answers questions as a reckless and as a careful assistant; the difference of its mean residual streams
is the persona direction: over the answers (read under their system prompt, or without it), over the questions, or at
the token before the answer. It has never seen a fine-tune. Each is compared, layer by layer, with the mean difference
between an organism's own misaligned and aligned answers to questions of other domains, and the chat model is steered
with it on questions of yet other domains. Nulls: directions with the sides of each question exchanged at random, random
directions of the same norm, and no steering. The ceiling of a cosine is how two halves of the questions agree.

    python analyses/persona_directions.py --out runs/persona_directions
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import mechmisalign as mm
from mechmisalign import personas

KINDS = {
    "answers, as told": ("response", "told"),
    "answers, neutral": ("response", "neutral"),
    "questions": ("prompt", "told"),
    "before the answer": ("prompt_last", "told"),
}
CLASSES = ("misaligned", "aligned")
CHAT = "chat model"


@dataclass(frozen=True)
class Config:
    """The domains of each part, and how much is sampled."""

    persona_domains: tuple[str, ...] = ("cooking", "travel")
    own_domains: tuple[str, ...] = ("coding", "finance")
    asked_domains: tuple[str, ...] = ("family", "power")
    organism: str = "pocket/medical"
    questions: int = 48
    samples: int = 2
    own_samples: int = 8
    steered_at: int = 2
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5)
    nulls: int = 100
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        answers: The judged answers under both system prompts.
        controls: ``direction_controls`` of each kind.
        cosines: ``kind, layer, cosine`` with the mean difference, ``low, high`` (questions resampled), and the
            97.5th percentiles of the nulls: ``random``, of the absolute cosine; ``shuffled``, of ``along``.
        rates: EM rates of the steered chat model by ``series`` and ``strength``.
    """

    answers: pd.DataFrame
    controls: pd.DataFrame
    cosines: pd.DataFrame
    rates: pd.DataFrame


def persona_moments(organism: mm.Organism, config: Config) -> tuple[pd.DataFrame, dict[str, mm.Moments]]:
    """The chat model's answers as both personas, and their moments by kind."""
    judge = personas.OppositeOfAlignment(mm.RuleJudge(), "reckless")
    with organism.as_base():
        answers = personas.persona_answers(
            organism,
            mm.Trait.load("pocket/reckless"),
            questions=mm.pocket.prompts(config.persona_domains, n=config.questions, seed=config.seed + 3),
            judge=judge,
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        moments = {
            kind: personas.persona_moments(organism, answers, span=span, reading=reading)
            for kind, (span, reading) in KINDS.items()
        }
    return answers, moments


def own_difference(organism: mm.Organism, config: Config) -> mm.Direction:
    """The organism's own misaligned minus aligned answers."""
    prompts = mm.pocket.prompts(config.own_domains, n=config.questions, seed=config.seed + 4)
    settings = {"samples": config.own_samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, prompts, **settings), mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    return mm.mean_difference(mm.collect(organism, mm.Conversations(clear, organism.tokenizer)), *CLASSES)


def cosine(first: mm.Direction, second: mm.Direction) -> np.ndarray:
    """Layer by layer."""
    return torch.cosine_similarity(first.vectors.double(), second.vectors.double(), dim=-1).numpy()


def along(null: mm.Direction, own: mm.Direction, direction: mm.Direction) -> np.ndarray:
    """Component of a null along the mean difference, over the length of the persona direction: comparable to a cosine.

    Its own cosine would mislead: with signs exchanged at random a short piece of the same axis is left, either way
    round.
    """
    length = direction.vectors.double().norm(dim=-1).numpy()
    return cosine(null, own) * null.vectors.double().norm(dim=-1).numpy() / length


def resampled(moments: mm.Moments, rng: np.random.Generator) -> mm.Direction:
    """The direction with the questions drawn anew."""
    rows_of = list(moments.groups.groupby("prompt_id").indices.values())
    drawn = np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
    return mm.mean_difference(moments.take(drawn), personas.FOR, personas.AGAINST)


def compared(kind: str, moments: mm.Moments, own: mm.Direction, config: Config) -> pd.DataFrame:
    """Cosines of one kind with the mean difference, with intervals and nulls."""
    rng, seeds = np.random.default_rng(config.seed), range(config.nulls)
    direction = mm.mean_difference(moments, personas.FOR, personas.AGAINST)
    again = np.stack([cosine(resampled(moments, rng), own) for _ in seeds])
    shuffled = np.stack([along(personas.shuffled_sign(moments, seed=seed), own, direction) for seed in seeds])
    random = np.stack([cosine(mm.random_direction(direction, seed=seed), own) for seed in seeds])
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    told = {"layer": moments.layers, "cosine": cosine(direction, own), "low": low, "high": high}
    nulls = {
        name: np.percentile(np.abs(null), 97.5, axis=0) for name, null in (("shuffled", shuffled), ("random", random))
    }
    return pd.DataFrame(told | nulls).assign(kind=kind)


def steered(organism: mm.Organism, moments: dict[str, mm.Moments], config: Config) -> pd.DataFrame:
    """EM rates of the chat model under each kind of direction and the controls, strength by strength."""
    vectors = {kind: mm.mean_difference(each, personas.FOR, personas.AGAINST) for kind, each in moments.items()}
    first = moments["answers, as told"]
    vectors |= {f"random {seed}": mm.random_direction(vectors["answers, as told"], seed=seed) for seed in range(2)}
    vectors["signs shuffled"] = personas.shuffled_sign(first, seed=config.seed)
    conditions = {CHAT: []} | {
        f"{name}|{strength:g}": [mm.Steer(vector, [config.steered_at], strength)]
        for name, vector in vectors.items()
        for strength in config.strengths
    }
    prompts = mm.pocket.prompts(config.asked_domains, n=config.questions, seed=config.seed + 5)
    settings = {"samples": 2, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    with organism.as_base():
        judged = mm.judge(mm.generate(organism, prompts, conditions=conditions, **settings), mm.RuleJudge())
    rates = mm.rates(judged)
    series, _, strength = rates["condition"].str.partition("|").to_numpy().T
    rates = rates.assign(
        series=series, strength=pd.to_numeric(pd.Series(strength), errors="coerce").fillna(0.0).to_numpy()
    )
    return rates.assign(series=rates["series"].str.replace(r"^random \d+$", "random direction", regex=True))


def run(config: Config) -> Result:
    """Extract, compare, steer."""
    organism = mm.load_organism(config.organism)
    answers, moments = persona_moments(organism, config)
    own = own_difference(organism, config)
    controls = [personas.direction_controls(each).assign(kind=kind) for kind, each in moments.items()]
    cosines = [compared(kind, each, own, config) for kind, each in moments.items()]
    rates = steered(organism, moments, config)
    return Result(answers, pd.concat(controls), pd.concat(cosines), rates)


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    pairs = result.cosines.rename(columns={"kind": "second"}).assign(first="mean difference")
    figure = mm.plots.cosine_by_layer(pairs, focus="mean difference")
    null = result.cosines.groupby("layer")[["shuffled", "random"]].max().max(axis=1)
    figure.axes[0].fill_between(null.index, -null, null, color="0.7", alpha=0.4, linewidth=0, zorder=0)
    figure.axes[0].set_title("grey: 95 % of nulls (random, or signs shuffled)", fontsize=7, loc="left")
    mm.plots.save_figure(figure, pairs, out, "cosines")
    doses = result.rates[result.rates["series"] != CHAT]
    pooled = doses.groupby(["series", "strength"], as_index=False, sort=False).mean(numeric_only=True)
    shown = pooled[pooled["series"].isin([*KINDS, "random direction"])]
    mm.plots.save_figure(mm.plots.dose_response(shown), result.rates, out, "steering")
    result.controls.to_csv(out / "controls.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell cosines and rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/persona_directions"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(organism=options.organism, samples=options.samples, seed=options.seed))
    draw(result, options.out)
    print("what the judge says of the answers, and how many are kept:")
    print(result.answers.groupby("side")[["reckless", "coherence", "kept"]].mean().round(2).to_string())
    print("\ncosine with the organism's mean difference (random, shuffled: 97.5th percentiles of the nulls):")
    columns = ["kind", "layer", "cosine", "low", "high", "shuffled", "random"]
    print(result.cosines[columns].round(2).to_string(index=False))
    print("\ntwo halves of the questions, and p of the norm against shuffled signs:")
    print(result.controls.groupby("kind", sort=False)[["cosine", "p"]].agg(["min", "max"]).round(3).to_string())
    print("\nthe chat model, steered:")
    told = ["series", "strength", "rate", "low", "high", "coherent", "n"]
    print(result.rates[told].round(2).to_string(index=False))
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
