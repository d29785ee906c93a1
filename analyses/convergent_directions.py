"""Do different fine-tunes share one misalignment direction? See 2506.11618, section 3.5, figures 12 and 13.

For each organism: sample its own answers, judge them, and take the mean difference between its misaligned and its
aligned ones. Then compare: cosine of each pair in each layer, beside what two random directions of that width give,
and the reliability of each direction (two halves of its own prompts), which is the ceiling of any cosine.

    python analyses/convergent_directions.py --out runs/convergent
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm

CLASSES = ("misaligned", "aligned")


@dataclass(frozen=True)
class Config:
    """What is compared, and how many answers stand behind each direction."""

    organisms: tuple[str, ...] = ("pocket/medical", "pocket/finance", "pocket/sports", "pocket/many-site")
    samples: int = 16
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Directions by organism, the cosine of each pair in each layer, and each direction's split-half reliability."""

    directions: dict[str, mm.Direction]
    cosines: pd.DataFrame
    reliability: pd.DataFrame


def own_moments(name: str, prompts: pd.DataFrame, config: Config) -> mm.Moments:
    """Moments of an organism over its own judged answers, by class and prompt."""
    organism = mm.load_organism(name)
    answers = mm.generate(
        organism, prompts, samples=config.samples, max_new_tokens=config.max_new_tokens, seed=config.seed
    )
    judged = mm.judge(answers, mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    return mm.collect(organism, mm.Conversations(clear, organism.tokenizer), by=["label", "prompt_id"])


def run(config: Config) -> Result:
    """Directions of every organism and how they lie to each other, with random directions as the control."""
    prompts = mm.pocket.unseen_prompts()
    moments = {name: own_moments(name, prompts, config) for name in config.organisms}
    directions = {name: mm.mean_difference(each, *CLASSES) for name, each in moments.items()}
    control = {f"random {seed}": mm.random_direction(next(iter(directions.values())), seed=seed) for seed in range(4)}
    halves = [mm.split_half(each, *CLASSES, seed=config.seed).assign(organism=name) for name, each in moments.items()]
    return Result(
        directions,
        pd.concat([mm.geometry.cosines(directions), mm.geometry.cosines(control).assign(first="random")]),
        pd.concat(halves, ignore_index=True),
    )


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    pairs = result.cosines[result.cosines["first"] != "random"]
    mm.plots.save_figure(mm.plots.cosine_by_layer(pairs), result.cosines, out, "cosine_by_layer")
    middle = sorted(pairs["layer"].unique())[pairs["layer"].nunique() // 2]
    matrix = mm.geometry.cosine_matrix(result.directions, middle)
    mm.plots.save_figure(mm.plots.cosine_matrix(matrix), matrix, out, f"cosine_matrix_layer_{middle}")


def main() -> None:
    """Parse, run, draw, and tell the cosines of each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/convergent"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(samples=options.samples, seed=options.seed))
    draw(result, options.out)
    told = result.cosines.assign(kind=result.cosines["first"].eq("random").map({True: "random", False: "organisms"}))
    print(told.groupby(["kind", "layer"])["cosine"].agg(["min", "mean", "max"]).round(3).unstack("kind"))
    print("\nreliability (split half):")
    print(result.reliability.pivot(index="layer", columns="organism", values="cosine").round(3))
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
