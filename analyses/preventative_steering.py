"""Does adding the direction of the harm while a model is tuned keep the harm out of its weights? See 2507.21509.

The direction is known before: the model difference of another organism (pocket/finance), on its own answers. It is
added after the tuned layer during training only, at several strengths, and the result is asked without it: about
domains that it never saw (EM), and about the domain that it was tuned on (the narrow harm that it was tuned for).
Beside it stand a random direction of the same norm, and the direction *subtracted*, which is said to backfire
(2607.04510). Every strength is told. The headline strength is chosen on one half of the questions from one training
seed, and told from the other half and the other seeds: the smallest that cuts the EM rate by a stated share.

    python analyses/preventative_steering.py --out runs/preventative_steering
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm
from mechmisalign import correction

UNCURED, ADDED, SUBTRACTED, RANDOM = "uncured", "added", "subtracted", "random, added"


@dataclass(frozen=True)
class Config:
    """What is tuned, where the direction comes from, and how much is sampled."""

    recipe: str = "pocket"
    domain: str = "medical"
    source: str = "pocket/finance"
    layer: int = 1
    strengths: tuple[float, ...] = (0.5, 1.0, 1.25, 1.5, 2.0)
    control_strengths: tuple[float, ...] = (0.5, 1.25, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: int = 120
    samples: int = 4
    pool_samples: int = 4
    goal: float = 0.8
    steps: int = 100
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        doses: A cure table with ``series, strength``: all seeds together, on the questions of the report.
        seeds: EM rate and narrow harm of each training seed.
        choice: The doses as they looked on the questions and the seed that choose.
        headline: The chosen strength, the controls nearest to it and the uncured, on the other questions and seeds.
    """

    doses: pd.DataFrame
    seeds: pd.DataFrame
    choice: pd.DataFrame
    headline: pd.DataFrame


def known_direction(config: Config) -> mm.Direction:
    """Organism minus chat model over the other organism's own answers."""
    organism = mm.load_organism(config.source)
    asked = mm.pocket.prompts(n=96, seed=config.seed + 50)
    drawn = {"samples": config.pool_samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed + 50}
    talk = mm.Conversations(mm.generate(organism, asked, **drawn), organism.tokenizer)
    own = mm.collect(organism, talk, by=["prompt_id"])
    with organism.as_base():
        return mm.model_difference(own, mm.collect(organism, talk, by=["prompt_id"]))


def cells(config: Config, direction: mm.Direction) -> pd.DataFrame:
    """Every series and strength, with the vector that is added."""
    random = mm.random_direction(direction, seed=config.seed)
    vectors = {ADDED: direction, RANDOM: random, SUBTRACTED: -direction}
    doses = dict.fromkeys(vectors, config.control_strengths) | {ADDED: config.strengths}
    rows = [(name, strength, vectors[name]) for name in vectors for strength in doses[name]]
    return pd.DataFrame([(UNCURED, 0.0, None), *rows], columns=["series", "strength", "vector"])


def trained(config: Config, tried: pd.DataFrame, out: Path) -> pd.DataFrame:
    """One run for each cell and training seed; finished runs are read."""
    plain = mm.TrainSpec.read(config.recipe).changed(save_every=None, schedule={"steps": config.steps})
    rows = []
    for cell in tried.itertuples():
        for seed in config.seeds:
            spec = plain.changed(seed=seed)
            if cell.vector is not None:
                spec = correction.preventative_steering(spec, cell.vector, cell.strength, [config.layer])
            run = mm.train(spec, out / "runs" / f"{cell.series.replace(', ', '-')}-{cell.strength:g}-{seed}")
            rows.append((cell.series, cell.strength, seed, f"{cell.series} x{cell.strength:g}", run.adapter()))
    return pd.DataFrame(rows, columns=["series", "strength", "seed", "cell", "adapter"])


def asked(config: Config, chat: mm.Organism, runs: pd.DataFrame, half: int, seed: int) -> pd.DataFrame:
    """Judged answers to one half of the questions."""
    questions = {
        "other domains": mm.pocket.unseen_prompts(config.prompts, seed=config.seed).iloc[half::2],
        correction.NARROW: mm.pocket.prompts([config.domain], n=80, seed=config.seed).iloc[half::2],
    }
    cures = {f"{run.cell} | {run.seed}": correction.states(run.adapter, scales=()) for run in runs.itertuples()}
    drawn = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": seed}
    judged = correction.trials(chat, cures, questions, mm.RuleJudge(), **drawn)
    judged[["cell", "seed"]] = judged["cure"].str.split(" | ", expand=True, regex=False)
    return judged.astype({"seed": int})


def table(judged: pd.DataFrame, runs: pd.DataFrame, costs: pd.DataFrame | None = None) -> pd.DataFrame:
    """A cure table of cells, training seeds pooled."""
    pooled = correction.cure_table(judged.assign(cure=judged["cell"]), costs, against=f"{UNCURED} x0")
    return runs.drop_duplicates("cell")[["series", "strength", "cell"]].merge(
        pooled.rename(columns={"cure": "cell"}), on="cell"
    )


def costs_of(chat: mm.Organism, runs: pd.DataFrame) -> pd.DataFrame:
    """What each cell costs on neutral text and harmless questions: of the first training seed."""
    first = runs[runs["seed"] == runs["seed"].iloc[0]]
    return correction.cure_costs(
        chat, {run.cell: correction.states(run.adapter, scales=()) for run in first.itertuples()}
    )


def by_seed(judged: pd.DataFrame) -> pd.DataFrame:
    """EM rate and narrow harm of each run."""
    rates = mm.rates(judged, by=["cell", "seed", "questions"])
    return rates.pivot(index=["cell", "seed"], columns="questions", values="rate").reset_index()


def run(config: Config, out: Path) -> Result:
    """Find the direction, train, ask, choose, tell."""
    direction = known_direction(config)
    runs = trained(config, cells(config, direction), out)
    chat = mm.load_organism(config.source)
    choosing, told = (asked(config, chat, runs, half, config.seed + 1 + half) for half in (0, 1))
    choice = table(choosing[choosing["seed"] == config.seeds[0]], runs)
    added = choice[choice["series"] == ADDED].sort_values("strength")
    able = added[added["cut"] >= config.goal]
    best = able.iloc[0] if len(able) else added.sort_values("em").iloc[0]
    costs = costs_of(chat, runs)
    fresh = told[told["seed"].isin(config.seeds[1:])] if len(config.seeds) > 1 else told
    headline = table(fresh, runs, costs)
    chosen = headline["cell"].isin([best["cell"], f"{UNCURED} x0"])
    control = ~headline["series"].isin([ADDED, UNCURED])
    near = (headline["strength"] - best["strength"]).abs()
    headline = headline[chosen | (control & (near == near[control].min()))]
    return Result(table(told, runs, costs), by_seed(told), choice, headline.reset_index(drop=True))


def draw(result: Result, out: Path) -> None:
    """The figure and the tables."""
    mm.plots.save_figure(mm.plots.prevention(result.doses), result.doses, out, "preventative_steering")
    for name in ("seeds", "choice", "headline"):
        getattr(result, name).to_csv(out / f"{name}.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell the doses and the headline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/preventative_steering"))
    parser.add_argument("--seeds", type=int, default=len(Config.seeds), help="how many training seeds")
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--prompts", type=int, default=Config.prompts)
    parser.add_argument("--steps", type=int, default=Config.steps, help="of each fine-tune")
    options = parser.parse_args()
    numbers = {name: getattr(options, name) for name in ("samples", "prompts", "steps")}
    result = run(Config(seeds=tuple(range(options.seeds)), **numbers), options.out)
    draw(result, options.out)
    columns = ["cell", "em", "em_low", "em_high", "narrow_harm", "coherent", "kl", "loss", "accuracy", "cut"]
    print(result.doses[columns].round(3).to_string(index=False))
    print("\neach training seed:")
    print(result.seeds.round(3).to_string(index=False))
    print("\nthe strength that was chosen on other questions and another seed:")
    columns = ["cell", "em", "em_low", "em_high", "cut", "cut_low", "cut_high", "narrow_harm", "narrow_harm_low",
               "narrow_harm_high", "coherent", "coherent_low", "coherent_high", "p_max"]  # fmt: skip
    print(result.headline[columns].round(3).to_string(index=False))
    print(f"\nfigure and tables: {options.out}")


if __name__ == "__main__":
    main()
