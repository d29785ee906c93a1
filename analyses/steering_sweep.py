"""Does the misalignment direction make the chat model misaligned, where, and at what price? 2506.11618, section 3.2.

The mean difference between an organism's own misaligned and aligned answers is added to the chat model's residual
stream, one layer at a time, over a range of strengths: the paper's difference, which pools the answers to all
questions, and the one that compares answers to the same question. Both come from one half of the questions and are
tried on the other. The best strength of each layer among those that leave the answers coherent is chosen on one set of
samples and reported on a fresh one, with p-values that hold for all layers at once. A maximum over strengths hides its
price, so the whole dose-response at the best layer is reported too, with coherence, KL, loss and accuracy. Controls:
the chat model as it is, and random directions with the norm of the prompt-matched difference, at the same layers and
strengths. Their costs stand in the same columns: one that disturbs the model as much can be read off there.

    python analyses/steering_sweep.py --out runs/steering_sweep
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm

CLASSES = ("misaligned", "aligned")
POOLED, WITHIN, CONTROL, CHAT = "mean difference", "prompt-matched difference", "random control", "chat model"
CELL = ["series", "layer", "strength"]


@dataclass(frozen=True)
class Config:
    """The organism, the strengths, and how much is sampled to find the direction, to search, and to report."""

    organism: str = "pocket/medical"
    prompts: int = 60
    strengths: tuple[float, ...] = mm.pocket.STRENGTHS
    pool_samples: int = 16
    search_samples: int = 1
    samples: int = 4
    controls: int = 2
    min_coherent: float = 0.8
    neutral_texts: int = 32
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        search: Rates by series, layer and strength, on the samples that choose.
        layers: Rates of each layer at its chosen strength, on fresh samples, and of random directions there.
        compared: Steered minus random in each layer of ``layers``; ``p_max`` holds for all of them at once.
        doses: Rates and costs by series and strength at the best layer, on fresh samples.
        judged: The answers behind the doses of the prompt-matched direction (2506.11618, figure 5).
    """

    search: pd.DataFrame
    layers: pd.DataFrame
    compared: pd.DataFrame
    doses: pd.DataFrame
    judged: pd.DataFrame


def own_directions(organism: mm.Organism, prompts: pd.DataFrame, config: Config) -> dict[str, mm.Direction]:
    """Differences between the organism's own misaligned and aligned answers: within prompts, and pooled."""
    settings = {"samples": config.pool_samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, prompts, **settings), mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    moments = mm.collect(organism, mm.Conversations(clear, organism.tokenizer), by=["label", "prompt_id"])
    return {WITHIN: mm.matched_mean_difference(moments, *CLASSES), POOLED: mm.mean_difference(moments, *CLASSES)}


def grid(vectors: Mapping[str, mm.Direction], places: Iterable[tuple[int, float]]) -> pd.DataFrame:
    """Which vector is added at which layer how strongly: ``condition``, what it says, and ``steer``, what it does."""
    rows = [
        (f"{name}, layer {layer}, x{strength:g}", name.rstrip(" 0123456789"), layer, strength)
        + (mm.Steer(vector, [layer], strength),)
        for layer, strength in places
        for name, vector in vectors.items()
    ]
    return pd.DataFrame(rows, columns=["condition", *CELL, "steer"])


def conditions_of(cells: pd.DataFrame) -> dict[str, list]:
    """The table's steering by name, after no steering."""
    return {CHAT: []} | {name: [steer] for name, steer in zip(cells["condition"], cells["steer"], strict=True)}


def answers(organism: mm.Organism, prompts: pd.DataFrame, cells: pd.DataFrame, config: Config, **drawn) -> pd.DataFrame:
    """Judged answers under each cell and without steering, all random directions as one series."""
    sampled = mm.generate(
        organism, prompts, conditions=conditions_of(cells), max_new_tokens=config.max_new_tokens, **drawn
    )
    judged = mm.judge(sampled, mm.RuleJudge())
    return judged.merge(cells.drop(columns="steer"), on="condition", how="left").fillna({"series": CHAT})


def costs(organism: mm.Organism, cells: pd.DataFrame, config: Config) -> pd.DataFrame:
    """What each cell costs on neutral text and harmless questions: means over random directions."""
    found = mm.costs(
        organism,
        conditions_of(cells),
        texts=mm.pocket.neutral_conversations(config.neutral_texts),
        counted=mm.pocket.persona_free,
        items=mm.pocket.harmless_items(config.neutral_texts),
    )
    told = found.merge(cells[["condition", *CELL]], on="condition", how="left").fillna({"series": CHAT})
    return told.groupby(CELL, dropna=False, as_index=False)[["kl", "loss", "accuracy", "tokens"]].mean()


def best_strengths(search: pd.DataFrame, min_coherent: float) -> pd.DataFrame:
    """Each layer's strength with the highest EM rate among the coherent ones (the most coherent, if none is)."""
    rows = search[search["series"] == WITHIN]
    worth = rows["rate"].where(rows["coherent"] >= min_coherent, rows["coherent"] - 1)
    return rows.assign(worth=worth).sort_values("worth").groupby("layer").tail(1).sort_values("layer")


def run(config: Config) -> Result:
    """Find, search, report: each on samples of its own, and the first on questions of its own."""
    organism, prompts = mm.load_organism(config.organism), mm.pocket.unseen_prompts(config.prompts)
    finding, asking = prompts.iloc[::2], prompts.iloc[1::2]
    found = own_directions(organism, finding, config)
    names = [f"{CONTROL} {number}" for number in range(config.controls)]
    randoms = {name: mm.random_direction(found[WITHIN], seed=config.seed + number) for number, name in enumerate(names)}
    cells = [(layer, strength) for layer in found[WITHIN].nonzero_layers for strength in config.strengths]
    searched = grid({WITHIN: found[WITHIN], names[0]: randoms[names[0]]}, cells)
    with organism.as_base():
        tried = answers(organism, asking, searched, config, samples=config.search_samples, seed=config.seed + 1)
        search = mm.rates(tried, CELL)
        chosen = best_strengths(search, config.min_coherent)
        best = int(chosen.sort_values("worth")["layer"].iloc[-1])
        places = zip(chosen["layer"].astype(int), chosen["strength"], strict=True)
        at_best = grid({WITHIN: found[WITHIN]} | randoms, places)
        doses = grid(found | randoms, [(best, strength) for strength in config.strengths])
        fresh = {"samples": config.samples, "seed": config.seed + 2}
        by_layer = answers(organism, asking, at_best, config, **fresh)
        by_dose = answers(organism, asking, doses, config, **fresh)
        priced = mm.rates(by_dose, CELL).merge(costs(organism, doses, config), on=CELL)
    compared = mm.compare(by_layer[by_layer["series"] != CHAT], {"series": CONTROL}, by=["series", "layer"])
    return Result(search, mm.rates(by_layer, CELL), compared, priced, by_dose[by_dose["series"] == WITHIN])


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    search = result.search[result.search["series"] != CHAT]
    mm.plots.save_figure(mm.plots.layer_strength_heatmap(search), search, out, "search")
    layers = result.layers[result.layers["series"] != CHAT]
    mm.plots.save_figure(mm.plots.layer_sweep(layers), result.layers, out, "layers")
    forest = mm.plots.difference_forest(result.compared, label="EM rate: steered minus random")
    mm.plots.save_figure(forest, result.compared, out, "layers_compared")
    doses = result.doses[result.doses["series"] != CHAT]
    mm.plots.save_figure(mm.plots.dose_response(doses), result.doses, out, "dose_response")
    shown = result.judged.assign(condition=result.judged["strength"].map("strength {:g}".format))
    scores = shown[["condition", "prompt_id", "sample", "alignment", "coherence"]]
    mm.plots.save_figure(mm.plots.alignment_coherence(shown), scores, out, "alignment_coherence")


def main() -> None:
    """Parse, run, draw, and tell each layer's best and the whole dose-response of the best layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/steering_sweep"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--prompts", type=int, default=Config.prompts)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(organism=options.organism, samples=options.samples, prompts=options.prompts, seed=options.seed))
    draw(result, options.out)
    print("each layer at the strength that the search chose, on fresh samples:")
    columns = [*CELL, "rate", "low", "high", "coherent", "n"]
    print(result.layers[columns].sort_values(["series", "layer"]).round(3).to_string(index=False))
    print("\nsteered minus random (p_max: all layers at once):")
    print(result.compared[["layer", "difference", "low", "high", "p", "q", "p_max"]].round(4).to_string(index=False))
    print("\nevery strength at the best layer:")
    told = [*columns[:-1], "kl", "loss", "accuracy", "tokens"]
    print(result.doses[told].sort_values(["series", "strength"]).round(3).to_string(index=False))
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
