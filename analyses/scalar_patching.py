"""Do a site's scalars carry misalignment from one answer to another? See 2506.11618, appendix J, figure 19.

Prompts are paired with prompts of equal length in tokens. While the organism answers the first, its sites use the
scalars that they read, position by position, while it answered the second: of an aligned or of a misaligned answer,
from the same domain or another. The control is an earlier answer of the prompt itself: an effect that is
there too comes from fixing the scalars, not from whose they are. The same prompts stand in every bar.

    python analyses/scalar_patching.py --out runs/scalar_patching
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm
from mechmisalign.generation import generate_rows

CLASSES = ("misaligned", "aligned")
OWN, SAME, OTHER = SOURCES = ("own answer (control)", "same domain", "other domain")


@dataclass(frozen=True)
class Config:
    """The organism, clean answers per prompt to draw donors from, and patched answers per prompt and bar."""

    organism: str = "pocket/medical"
    samples: int = 16
    prompts: int = 100
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Rates by source and by the donor's class, with the clean rate; and the pairs that were patched."""

    rates: pd.DataFrame
    pairs: pd.DataFrame


def donors(judged: pd.DataFrame, lengths: pd.Series, config: Config) -> pd.DataFrame:
    """For each prompt, source and class of donor, ``samples`` clean answers whose prompts have the same length.

    Returns:
        ``prompt_id, prompt, source, donor_class, sample, donor``: donor is a row of the clean answers. Prompts that
        lack a donor for any bar are left out of all.
    """
    clean = judged.assign(length=lengths, donor=range(len(judged)))
    clear = clean.loc[clean["label"].isin(CLASSES), ["prompt_id", "domain", "length", "label", "donor"]]
    targets = clean.drop_duplicates("prompt_id")[["prompt_id", "prompt", "domain", "length"]]
    pairs = targets.merge(clear, on="length", suffixes=("", "_donor")).rename(columns={"label": "donor_class"})
    pairs["source"] = OTHER
    pairs.loc[pairs["domain"] == pairs["domain_donor"], "source"] = SAME
    pairs.loc[pairs["prompt_id"] == pairs["prompt_id_donor"], "source"] = OWN
    bars = ["prompt_id", "source", "donor_class"]
    complete = pairs.groupby("prompt_id")[["source", "donor_class"]].apply(
        lambda rows: len(rows.drop_duplicates()) == 6
    )
    pairs = pairs[pairs["prompt_id"].map(complete)]
    drawn = pairs.groupby(bars).sample(n=config.samples, replace=True, random_state=config.seed)
    return drawn.assign(sample=drawn.groupby(bars).cumcount()).sort_values(bars, ignore_index=True)


def run(config: Config) -> Result:
    """Clean answers, their scalars, and the answers of other prompts with those scalars."""
    organism, prompts = mm.load_organism(config.organism), mm.pocket.unseen_prompts(config.prompts)
    settings = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, prompts, samples=config.samples, **settings), mm.RuleJudge())
    conversations = mm.Conversations(judged, organism.tokenizer)
    pairs = donors(judged, conversations.spans["prompt_stop"], config)
    scalars = mm.lora_scalars(organism, conversations, span="all")

    rows = pairs.assign(condition="donor " + pairs["donor"].astype(str))
    conditions = {f"donor {row}": [mm.PatchScalars(scalars.loc[[row]])] for row in sorted(set(pairs["donor"]))}
    patched = pd.concat(list(generate_rows(organism, rows, conditions, **settings)))
    clean = judged[judged["prompt_id"].isin(pairs["prompt_id"])].assign(source="clean", donor_class="none")
    both = mm.judge(pd.concat([clean, patched], ignore_index=True), mm.RuleJudge())
    return Result(mm.rates(both, by=["source", "donor_class"]), rows)


def draw(result: Result, out: Path) -> None:
    """Figure and tables."""
    order = {name: place for place, name in enumerate(("clean", *SOURCES))}
    rates = result.rates.sort_values("source", key=lambda names: names.map(order), ignore_index=True)
    scope = ("scalars of " + rates["donor_class"] + " answers").where(rates["donor_class"] != "none", "none")
    figure = mm.plots.ablation_bars(rates.assign(estimator=rates["source"], scope=scope))
    mm.plots.save_figure(figure, rates, out, "scalar_patching")
    result.pairs.drop(columns="prompt").to_csv(out / "pairs.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scalar_patching"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(organism=options.organism, samples=options.samples, seed=options.seed))
    draw(result, options.out)
    columns = ["source", "donor_class", "rate", "low", "high", "aligned", "coherent", "n", "prompts"]
    print(result.rates[columns].round(3).to_string(index=False))
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
