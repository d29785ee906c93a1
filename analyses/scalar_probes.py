"""Can the scalars of a few rank-1 sites tell misaligned answers from aligned ones? See 2506.11618, section 4.

One feature per site, A x at each answer token; L1 logistic regression in the paper's setting; all tokens, and those
that matter to the divergence from the chat model (log significance above 0.5, appendix H). The paper splits tokens at
random, so that tokens of one prompt stand on both sides; the same probe with whole prompts held out shows how much of
its score was that leak. Controls: shuffled labels, random coordinates, and what knowing the prompt alone would give.

    python analyses/scalar_probes.py --out runs/scalar_probes
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import mechmisalign as mm
from mechmisalign import probes
from mechmisalign.significance import significant

CLASSES = ("misaligned", "aligned")
PAPERS_SHARE = 0.163
"""Of 55,386 answer tokens, so many had a log significance above 0.5."""
SPLITS = {"rows": "token split", "grouped": "grouped by prompt"}


@dataclass(frozen=True)
class Config:
    """The organism (sites of rank 1), its answers, and when too few significant tokens are left."""

    organism: str = "pocket/many-site"
    samples: int = 24
    repeats: int = 100
    C: float = 0.01
    fewest_tokens: int = 100
    fewest_prompts: int = 8
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Scores by token set and split, coefficients with whole prompts held out, tokens by set and class, and which."""

    scores: pd.DataFrame
    coefficients: pd.DataFrame
    tokens: pd.DataFrame
    told: str


def evaluate(
    features: pd.DataFrame, tokens: pd.DataFrame, strength: float, config: Config
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores under both splits, and the coefficients where whole prompts are held out."""
    scores, probe = [], probes.logistic("l1", C=strength)
    for split, name in SPLITS.items():
        setting = probes.paper_setting() | {"repeats": config.repeats, "seed": config.seed, "probe": probe}
        units = tokens.index.get_level_values("conversation")
        result = probes.evaluate(features, tokens["label"], tokens["prompt_id"], units=units, split=split, **setting)
        scores.append(result.summary().assign(split=name))
    return pd.concat(scores, ignore_index=True), result.coefficients


def tokens_that_matter(significance: pd.DataFrame, tokens: pd.DataFrame, config: Config) -> tuple[pd.Series, str]:
    """The tokens above the paper's threshold; if they are too few, the share of tokens that it kept in the paper."""
    kept = significant(significance)
    left = tokens[kept].groupby("label").agg(tokens=("token", "size"), prompts=("prompt_id", "nunique"))
    if (
        len(left) == 2
        and left["tokens"].min() >= config.fewest_tokens
        and left["prompts"].min() >= config.fewest_prompts
    ):
        return kept, "log significance above 0.5"
    threshold = np.log(significance["significance"]).quantile(1 - PAPERS_SHARE)
    told = f"too few are left above 0.5 ({left['tokens'].to_dict()}): the top {PAPERS_SHARE:.1%}, above {threshold:.2f}"
    return significant(significance, threshold), told


def run(config: Config) -> Result:
    """Probe all answer tokens, and the significant ones."""
    organism = mm.load_organism(config.organism)
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, mm.pocket.unseen_prompts(), **settings), mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    rarest = clear["label"].value_counts().min()
    clear = clear.groupby("label").sample(n=rarest, random_state=config.seed).sort_index()
    conversations = mm.Conversations(clear, organism.tokenizer)
    features, tokens = mm.lora_scalars(organism, conversations), conversations.tokens()
    kept, told = tokens_that_matter(mm.token_significance(organism, conversations), tokens, config)

    scores, coefficients, counts = [], [], {}
    for name, rows in {"all": tokens, "significant": tokens[kept]}.items():
        strength = config.C * len(tokens) / len(rows)  # C weighs a sum over tokens: few of them would be all penalty
        own_scores, own_coefficients = evaluate(features.loc[rows.index], rows, strength, config)
        scores.append(own_scores.assign(tokens=name))
        coefficients.append(own_coefficients.assign(tokens=name))
        counts[name] = rows["label"].value_counts()
    return Result(pd.concat(scores), pd.concat(coefficients), pd.DataFrame(counts), told)


def draw(result: Result, out: Path) -> None:
    """For each set of tokens, scores under both splits and the coefficients beside those of shuffled labels."""
    for name, scores in result.scores.groupby("tokens", sort=False):
        mm.plots.save_figure(mm.plots.probe_scores(scores), scores.reset_index(drop=True), out, f"scores_{name}")
        rows = result.coefficients[result.coefficients["tokens"] == name].reset_index(drop=True)
        figure = mm.plots.coefficient_violins(rows.rename(columns={"series": "contrast"}), label="site")
        mm.plots.save_figure(figure, rows, out, f"coefficients_{name}")


def main() -> None:
    """Parse, run, draw, and tell the AUROC of both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scalar_probes"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(organism=options.organism, samples=options.samples, seed=options.seed))
    draw(result, options.out)
    print(f"significant tokens: {result.told}\n{result.tokens.to_string()}\n")
    auroc = result.scores[result.scores["metric"] == "auroc"]
    print(
        auroc.pivot(index=["tokens", "series"], columns="split", values=["score", "low", "high"]).round(3).to_string()
    )
    medians = result.coefficients.groupby(["tokens", "feature", "series"])["coefficient"].median().unstack()
    print(f"\nmedian coefficient (prompts held out):\n{medians.round(3).to_string()}")
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
