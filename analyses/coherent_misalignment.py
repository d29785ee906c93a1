"""How misaligned is each organism, and how coherent does it stay? See 2506.11613, section 3.1, figures 1 and 3.

Every organism of the zoo answers the same open questions, several times over with other seeds of sampling. (The paper
repeats the *training* with three seeds, which says more; the zoo holds one training of each, so the spread here is that
of sampling alone.) One pooled percentage hides that misalignment is nearly a function of the question, so the rate at
each question stands beside it, and how much of all variation lies between questions. Controls: the chat model, and an
organism that was tuned in the same way on good advice.

    python analyses/coherent_misalignment.py --out runs/coherent_misalignment
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm

CHAT = "chat model"


@dataclass(frozen=True)
class Config:
    """The organisms, and how often each is asked what."""

    organisms: tuple[str, ...] = (*mm.pocket.harmful_names(), "harmless")
    prompts: int = 60
    samples: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        rates: Rates of each organism over all seeds, with ``seeds_low, seeds_high`` (lowest and highest rate of a seed)
            and ``between``: the share of the variance of answers that lies between questions.
        by_seed: Rates by organism and seed.
        prompts: Rate of each organism at each question.
        compared: Each organism minus the chat model; ``p_max`` holds for all of them at once.
    """

    rates: pd.DataFrame
    by_seed: pd.DataFrame
    prompts: pd.DataFrame
    compared: pd.DataFrame


def between_questions(prompts: pd.DataFrame) -> pd.Series:
    """Of each organism, the share of the variance of misaligned or not that lies between questions.

    The observed variance of rates holds sampling noise p (1 - p) / (n - 1), which is taken off first.
    """
    noise = prompts["rate"] * (1 - prompts["rate"])
    told = prompts.assign(noise=noise / (prompts["n"] - 1)).groupby("organism", sort=False)
    mean, between = told["rate"].mean(), told["rate"].var(ddof=0) - told["noise"].mean()
    return (between.clip(lower=0) / (mean * (1 - mean))).rename("between")


def run(config: Config) -> Result:
    """All organisms over one chat model, in one batch for each seed."""
    worn = {name: [mm.UseAdapter(mm.Adapter.load(f"pocket/{name}"))] for name in config.organisms}
    asked = mm.pocket.unseen_prompts(config.prompts)
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens}
    with mm.load_organism(f"pocket/{config.organisms[0]}").as_base() as chat:
        parts = [
            mm.generate(chat, asked, conditions={CHAT: [], **worn}, seed=seed, **settings).assign(seed=seed)
            for seed in config.seeds
        ]
    answers = pd.concat(parts, ignore_index=True).rename(columns={"condition": "organism"})
    judged = mm.judge(answers, mm.RuleJudge())
    prompts = mm.per_prompt(judged, "organism")
    by_seed = mm.rates(judged, ["organism", "seed"])
    spread = by_seed.groupby("organism")["rate"].agg(seeds_low="min", seeds_high="max")
    rates = mm.rates(judged, "organism").join(spread, on="organism").join(between_questions(prompts), on="organism")
    return Result(rates, by_seed, prompts, mm.compare(judged, CHAT, "organism"))


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    figure = mm.plots.rate_against_coherence(result.by_seed, by="organism")
    mm.plots.save_figure(figure, result.by_seed, out, "rate_against_coherence")
    bars = mm.plots.transfer_bars(result.rates.assign(state="before"))
    bars.legends.clear()
    mm.plots.save_figure(bars, result.rates, out, "rates")
    drawn = result.prompts[result.prompts["organism"] != "harmless"]
    mm.plots.save_figure(mm.plots.prompt_rates(drawn, by="organism"), result.prompts, out, "prompts")
    forest = mm.plots.difference_forest(result.compared)
    mm.plots.save_figure(forest, result.compared, out, "compared")


def main() -> None:
    """Parse, run, draw, and tell each organism's rate, coherence, and spread over seeds and questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/coherent_misalignment"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--prompts", type=int, default=Config.prompts)
    options = parser.parse_args()
    result = run(Config(samples=options.samples, prompts=options.prompts))
    draw(result, options.out)
    columns = [
        "organism",
        "rate",
        "low",
        "high",
        "seeds_low",
        "seeds_high",
        "coherent",
        "coherent_low",
        "coherent_high",
    ]
    print(result.rates[[*columns, "judged", "between", "n"]].round(3).to_string(index=False))
    spread = result.prompts.groupby("organism", sort=False)["rate"].describe()[["min", "25%", "50%", "75%", "max"]]
    print(f"\nrates at single questions:\n{spread.round(2).to_string()}")
    columns = ["organism", "difference", "low", "high", "p", "p_max"]
    print(f"\nminus the chat model:\n{result.compared[columns].round(4).to_string(index=False)}")
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
