"""Do different fine-tunes share one misalignment direction? See 2506.11618, section 3.5, figures 12 and 13.

For each organism: sample its own answers, judge them, and take the mean difference between its misaligned and its
aligned ones, pooled as in the paper, and between answers to the same prompt. Then compare: cosine of each pair in each
layer with its interval (prompts resampled, the same for both), and the length of what parts them. The ceiling is each
direction's own reliability (two halves of its prompts). Controls: random directions of that width, and the directions
that the same answers give when their labels are shuffled within prompts: whichever prompts were answered worse stays
as it was, so a cosine between those is owed to the prompts and to the shape of the activations, not to misalignment.

    python analyses/convergent_directions.py --out runs/convergent
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import mechmisalign as mm

CLASSES = ("misaligned", "aligned")
POOLED, MATCHED = "mean difference", "prompt-matched difference"
ESTIMATORS = {POOLED: mm.mean_difference, MATCHED: mm.matched_mean_difference}


@dataclass(frozen=True)
class Config:
    """What is compared, and how many answers stand behind each direction."""

    organisms: tuple[str, ...] = ("pocket/medical", "pocket/finance", "pocket/sports", "pocket/many-site")
    samples: int = 16
    resamples: int = 100
    shuffles: int = 20
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        directions: The paper's directions by organism.
        cosines: ``estimator, first, second, layer, cosine, low, high, distance``; ``distance`` is the length of the
            difference between the two directions, over their mean length.
        shuffled: The same cosines with labels shuffled within prompts, ``shuffle`` by ``shuffle``.
        random: Cosines of random directions.
        reliability: Cosine between two halves of an organism's prompts, by estimator, organism and layer.
    """

    directions: dict[str, mm.Direction]
    cosines: pd.DataFrame
    shuffled: pd.DataFrame
    random: pd.DataFrame
    reliability: pd.DataFrame


def own_moments(name: str, prompts: pd.DataFrame, config: Config) -> mm.Moments:
    """Moments of an organism over its own judged answers, answer by answer."""
    organism = mm.load_organism(name)
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, prompts, **settings), mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    return mm.collect(organism, mm.Conversations(clear, organism.tokenizer), by=["label", "prompt_id", "sample"])


def by_prompt(moments: mm.Moments) -> mm.Moments:
    """The answers of one class to one prompt as one group: same directions, far fewer rows."""
    groups = moments.groups.groupby(["label", "prompt_id"])
    place, tokens = torch.tensor(groups.ngroup().to_numpy(copy=True)), moments.tokens
    total = torch.zeros(groups.ngroups, dtype=tokens.dtype).index_add(0, place, tokens)

    def merged(values: torch.Tensor) -> torch.Tensor:
        weights = tokens.reshape(-1, *[1] * (values.ndim - 1))
        sums = values.new_zeros(len(total), *values.shape[1:]).index_add(0, place, values * weights)
        return sums / total.reshape(-1, *[1] * (values.ndim - 1))

    table = groups["tokens"].sum().reset_index()
    return replace(moments, groups=table, mean=merged(moments.mean), norm=merged(moments.norm))


def resampled(moments: mm.Moments, prompts: np.ndarray) -> mm.Moments:
    """The answers to these prompts; a prompt that was drawn twice counts as two."""
    rows_of = moments.groups.groupby("prompt_id").indices
    rows = [rows_of.get(prompt, np.array([], dtype=int)) for prompt in prompts]
    drawn = moments.take(np.concatenate(rows))
    names = np.repeat(np.arange(len(prompts)), [len(each) for each in rows])
    return replace(drawn, groups=drawn.groups.assign(prompt_id=names))


def shuffled(moments: mm.Moments, rng: np.random.Generator) -> mm.Moments:
    """The labels dealt anew to the answers of each prompt."""
    labels = moments.groups.groupby("prompt_id")["label"].transform(rng.permutation)
    return by_prompt(replace(moments, groups=moments.groups.assign(label=labels)))


def pairs(directions: Mapping[str, mm.Direction], estimator: str) -> pd.DataFrame:
    """Cosine and relative distance of each pair in each layer."""
    rows = [
        {"estimator": estimator, "first": a, "second": b, "layer": layer}
        | {
            "cosine": float(torch.cosine_similarity(x, y, dim=0)),
            "distance": float(2 * (x - y).norm() / (x.norm() + y.norm())),
        }
        for a, b in combinations(directions, 2)
        for layer, x, y in zip(directions[a].layers, directions[a].vectors, directions[b].vectors, strict=True)
    ]
    return pd.DataFrame(rows)


def estimated(moments: Mapping[str, mm.Moments]) -> pd.DataFrame:
    """``pairs`` for both estimators."""
    tables = [
        pairs({name: fit(each, *CLASSES) for name, each in moments.items()}, told) for told, fit in ESTIMATORS.items()
    ]
    return pd.concat(tables, ignore_index=True)


def with_intervals(moments: Mapping[str, mm.Moments], prompts: pd.Series, config: Config) -> pd.DataFrame:
    """Cosines with percentile intervals; resampled directions are noisier, so the intervals lie rather too low."""
    rng, place = np.random.default_rng(config.seed), ["estimator", "first", "second", "layer"]
    replicates = []
    for _ in range(config.resamples):
        drawn = rng.choice(prompts.to_numpy(), len(prompts))
        replicates.append(estimated({name: resampled(each, drawn) for name, each in moments.items()}))
    ends = pd.concat(replicates).groupby(place, sort=False)["cosine"].quantile([0.025, 0.975]).unstack()
    return estimated(moments).merge(ends.set_axis(["low", "high"], axis=1).reset_index(), on=place)


def run(config: Config) -> Result:
    """Directions of every organism and how they lie to each other, with both controls and the ceiling."""
    prompts = mm.pocket.unseen_prompts()
    answers = {name: own_moments(name, prompts, config) for name in config.organisms}
    moments = {name: by_prompt(each) for name, each in answers.items()}
    directions = {name: mm.mean_difference(each, *CLASSES) for name, each in moments.items()}
    random = {f"random {seed}": mm.random_direction(next(iter(directions.values())), seed=seed) for seed in range(4)}
    rng = np.random.default_rng(config.seed)
    null = [
        estimated({name: shuffled(each, rng) for name, each in answers.items()}).assign(shuffle=number)
        for number in range(config.shuffles)
    ]
    halves = [
        mm.split_half(each, *CLASSES, estimator=fit, repeats=40, seed=config.seed).assign(organism=name, estimator=told)
        for told, fit in ESTIMATORS.items()
        for name, each in moments.items()
    ]
    cosines = with_intervals(moments, prompts["prompt_id"], config)
    return Result(
        directions, cosines, pd.concat(null), mm.geometry.cosines(random), pd.concat(halves, ignore_index=True)
    )


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    for estimator, name in {POOLED: "cosine_by_layer", MATCHED: "cosine_by_layer_matched"}.items():
        cosines = result.cosines[result.cosines["estimator"] == estimator]
        figure = mm.plots.cosine_by_layer(cosines)
        null = result.shuffled[result.shuffled["estimator"] == estimator].groupby("layer")["cosine"]
        low, high = null.quantile(0.025), null.quantile(0.975)
        figure.axes[0].fill_between(low.index, low, high, color="0.7", alpha=0.4, linewidth=0, zorder=0)
        figure.axes[0].set_title("grey: labels shuffled within prompts", fontsize=7, loc="left")
        mm.plots.save_figure(figure, cosines, out, name)
    halves = result.reliability.rename(columns={"organism": "series"})
    for estimator, rows in halves.groupby("estimator", sort=False):
        suffix = "" if estimator == POOLED else "_matched"
        mm.plots.save_figure(mm.plots.reliability(rows), rows, out, f"reliability{suffix}")
    layers = sorted(result.cosines["layer"].unique())
    middle = layers[len(layers) // 2]
    matrix = mm.geometry.cosine_matrix(result.directions, middle)
    mm.plots.save_figure(mm.plots.cosine_matrix(matrix), matrix, out, f"cosine_matrix_layer_{middle}")
    result.shuffled.to_csv(out / "shuffled.csv", index=False)


def told(result: Result) -> pd.DataFrame:
    """Lowest, mean and highest cosine of the pairs in each layer, beside the two controls and the ceiling."""
    by = ["estimator", "layer"]
    real = result.cosines.groupby(by).agg(
        lowest=("cosine", "min"),
        its_low=("low", "min"),
        mean=("cosine", "mean"),
        highest=("cosine", "max"),
        distance=("distance", "mean"),
    )
    null = result.shuffled.groupby(by)["cosine"].agg(shuffled="mean", shuffled_high=lambda found: found.quantile(0.975))
    halves = result.reliability.groupby(by)["cosine"].mean().rename("two halves")
    random = result.random.groupby("layer")["cosine"].agg(lambda found: found.abs().max()).rename("|random|, highest")
    return real.join(null).join(halves).join(random, on="layer")


def main() -> None:
    """Parse, run, draw, and tell the cosines of each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/convergent"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--resamples", type=int, default=Config.resamples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(samples=options.samples, resamples=options.resamples, seed=options.seed))
    draw(result, options.out)
    print("cosines of all pairs, with labels shuffled within prompts, and of random directions:")
    print(told(result).round(3).to_string())
    print("\nreliability (split half):")
    print(
        result.reliability.pivot(index=["estimator", "layer"], columns="organism", values="cosine").round(3).to_string()
    )
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
