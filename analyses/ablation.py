"""Does projecting a direction out of an organism take its misalignment away? See 2506.11618, section 3.4, figure 4.

x' = x - v̂ v̂ᵀ x at every token, in three ways: each layer's own vector, one layer's vector at all layers, and one
layer's vector in that layer only. The paper's direction is the mean difference between misaligned and aligned answers;
beside it stand the one that compares answers to the same question, and two that compare the organism with the chat
model over the same text. (Where an adapter has one site, these two are close to what it writes, so taking them out is
close to taking the adapter out: their test is other organisms.) The directions come from one half of the questions and
are tried on the other; layers are chosen on one set of samples and everything is reported on a fresh one. Then the
single vectors are taken out of other organisms, which lie over the same chat model and are sampled with it in one
batch. Controls: random directions, in the same three ways. What a cure costs on neutral text and harmless questions
stands beside each rate.

    python analyses/ablation.py --out runs/ablation
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm

CLASSES = ("misaligned", "aligned")
BEFORE, CONTROL, POOLED, WITHIN = "before", "random control", "mean difference", "prompt-matched difference"
LAYERWISE, SINGLE, LOCAL = "layer-wise", "single", "one layer"


@dataclass(frozen=True)
class Config:
    """The organism that the directions come from, those that they are carried to, and how much is sampled."""

    organism: str = "pocket/medical"
    peers: tuple[str, ...] = ("pocket/finance", "pocket/sports", "pocket/many-site", "pocket/rslora")
    prompts: int = 60
    pool_samples: int = 16
    search_samples: int = 1
    samples: int = 6
    controls: int = 2
    min_coherent: float = 0.8
    neutral_texts: int = 32
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        search: Rates by estimator, scope and layer, on the samples that choose.
        rates: Rates and costs by estimator and scope, with the chosen layer, on fresh samples.
        compared: Each ablation minus no ablation; ``p_max`` holds for all of them at once.
        transfer: Rates of the other organisms, before and after.
    """

    search: pd.DataFrame
    rates: pd.DataFrame
    compared: pd.DataFrame
    transfer: pd.DataFrame


def directions(organism: mm.Organism, prompts: pd.DataFrame, config: Config) -> dict[str, mm.Direction]:
    """Four estimates from the organism's own answers."""
    settings = {"samples": config.pool_samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, prompts, **settings), mm.RuleJudge())
    talk = mm.Conversations(judged[judged["label"].isin(CLASSES)], organism.tokenizer)
    own = mm.collect(organism, talk, by=["label", "prompt_id"])
    with organism.as_base():
        chat = mm.collect(organism, talk, by=["label", "prompt_id"])
    return {
        POOLED: mm.mean_difference(own, *CLASSES),
        WITHIN: mm.matched_mean_difference(own, *CLASSES),
        "model difference": mm.model_difference(own, chat),
        "first principal": mm.first_principal(own, chat),
    }


def ablations(name: str, direction: mm.Direction, layers: Mapping[str, list[int]]) -> pd.DataFrame:
    """What is taken out where: each layer's own vector, and the vector of each given layer in the other two scopes."""
    rows = [(name, LAYERWISE, None, mm.Ablate(direction))]
    rows += [(name, SINGLE, layer, mm.Ablate(direction.everywhere(layer))) for layer in layers[SINGLE]]
    rows += [(name, LOCAL, layer, mm.Ablate(direction, [layer])) for layer in layers[LOCAL]]
    table = pd.DataFrame(rows, columns=["estimator", "scope", "layer", "ablate"]).astype({"layer": "Int64"})
    where = [", layer-wise" if row.layer is pd.NA else f", {row.scope} {row.layer}" for row in table.itertuples()]
    return table.assign(condition=table["estimator"] + where)


def conditions_of(cells: pd.DataFrame) -> dict[str, list]:
    """The table's ablations by name, after no ablation."""
    return {BEFORE: []} | {name: [one] for name, one in zip(cells["condition"], cells["ablate"], strict=True)}


def answers(organism: mm.Organism, prompts: pd.DataFrame, conditions: dict, config: Config, **drawn) -> pd.DataFrame:
    """Judged answers under each condition."""
    sampled = mm.generate(organism, prompts, conditions=conditions, max_new_tokens=config.max_new_tokens, **drawn)
    return mm.judge(sampled, mm.RuleJudge())


def chosen_layers(search: pd.DataFrame, min_coherent: float) -> dict[str, dict[str, list[int]]]:
    """For each estimator and scope the layer that leaves least EM among those that leave the answers coherent."""
    ranked = search.assign(broken=search["coherent"] < min_coherent).sort_values(["broken", "rate"], kind="stable")
    best = ranked.dropna(subset="layer").drop_duplicates(["estimator", "scope"])
    return {
        name: {scope: [int(layer)] for scope, layer in zip(rows["scope"], rows["layer"], strict=True)}
        for name, rows in best.groupby("estimator", sort=False)
    }


def priced(organism: mm.Organism, cells: pd.DataFrame, config: Config) -> pd.DataFrame:
    """What each ablation costs on neutral text and harmless questions."""
    items, texts = mm.pocket.harmless_items(config.neutral_texts), mm.pocket.neutral_conversations(config.neutral_texts)
    found = mm.costs(organism, conditions_of(cells), texts=texts, counted=mm.pocket.persona_free, items=items)
    return found[["condition", "kl", "loss", "accuracy", "tokens"]]


def transferred(
    organism: mm.Organism, prompts: pd.DataFrame, vectors: Mapping[str, mm.Direction], config: Config
) -> pd.DataFrame:
    """Rates of the other organisms with each vector taken out at all layers, all of them in one batch."""
    states = {BEFORE: []} | {name: [mm.Ablate(vector)] for name, vector in vectors.items()}
    worn = {peer: mm.UseAdapter(mm.Adapter.load(peer)) for peer in config.peers}
    conditions = {f"{peer} | {state}": [worn[peer], *cuts] for peer in config.peers for state, cuts in states.items()}
    with organism.as_base():
        judged = answers(organism, prompts, conditions, config, samples=config.samples, seed=config.seed + 2)
    judged[["organism", "state"]] = judged["condition"].str.split(" | ", expand=True, regex=False)
    return mm.rates(judged, by=["organism", "state"])


def run(config: Config) -> Result:
    """Find, search, report, carry over."""
    organism, prompts = mm.load_organism(config.organism), mm.pocket.unseen_prompts(config.prompts)
    finding, asking = prompts.iloc[::2], prompts.iloc[1::2]
    found = directions(organism, finding, config)
    each = {name: dict.fromkeys((SINGLE, LOCAL), list(vector.nonzero_layers)) for name, vector in found.items()}
    tried = pd.concat([ablations(name, vector, each[name]) for name, vector in found.items()], ignore_index=True)
    judged = answers(
        organism, asking, conditions_of(tried), config, samples=config.search_samples, seed=config.seed + 1
    )
    search = tried.drop(columns="ablate").merge(mm.rates(judged), on="condition")

    layers = chosen_layers(search, config.min_coherent)
    best = search[search["scope"] == SINGLE].sort_values(["rate", "coherent"], ascending=[True, False])
    best = best[best["coherent"] >= config.min_coherent]["estimator"].iloc[0]
    seeds = range(config.controls)
    found |= {f"{CONTROL} {seed}": mm.random_direction(found[POOLED], seed=config.seed + seed) for seed in seeds}
    layers |= {f"{CONTROL} {seed}": layers[POOLED] for seed in seeds}
    cells = pd.concat([ablations(name, vector, layers[name]) for name, vector in found.items()], ignore_index=True)
    judged = answers(organism, asking, conditions_of(cells), config, samples=config.samples, seed=config.seed + 2)
    told = pd.DataFrame({"condition": [BEFORE], "estimator": [BEFORE], "scope": ["none"]})
    rates = pd.concat([told, cells.drop(columns="ablate")]).merge(mm.rates(judged), on="condition")
    rates = rates.merge(priced(organism, cells, config), on="condition")

    names = {f"after, {name}": name for name in (POOLED, WITHIN, best)} | {CONTROL: f"{CONTROL} 0"}
    vectors = {state: found[name].everywhere(layers[name][SINGLE][0]) for state, name in names.items()}
    return Result(search, rates, mm.compare(judged, BEFORE), transferred(organism, asking, vectors, config))


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    layers = result.search.dropna(subset="layer").rename(columns={"estimator": "series"})
    for scope, name in {SINGLE: "search_single", LOCAL: "search_one_layer"}.items():
        rows = layers[layers["scope"] == scope].astype({"layer": int})
        mm.plots.save_figure(mm.plots.layer_sweep(rows), rows, out, name)
    mm.plots.save_figure(mm.plots.ablation_bars(result.rates), result.rates, out, "ablation")
    short = result.compared["condition"].str.replace(r"(?<=matched) difference| \d+$", "", regex=True)
    forest = mm.plots.difference_forest(result.compared.assign(condition=short))
    mm.plots.save_figure(forest, result.compared, out, "ablation_compared")
    mm.plots.save_figure(mm.plots.transfer_bars(result.transfer), result.transfer, out, "transfer")


def main() -> None:
    """Parse, run, draw, and tell rates with their costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--prompts", type=int, default=Config.prompts)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(organism=options.organism, samples=options.samples, prompts=options.prompts, seed=options.seed))
    draw(result, options.out)
    columns = ["estimator", "scope", "layer", "rate", "low", "high", "coherent", "kl", "loss", "accuracy", "tokens"]
    print(result.rates[columns].round(3).astype({"layer": object}).fillna("").to_string(index=False))
    print("\nminus before:")
    columns = ["condition", "difference", "low", "high", "p", "q", "p_max"]
    print(result.compared[columns].round(4).to_string(index=False))
    print("\nthe single vectors in other organisms:")
    print(
        result.transfer[["organism", "state", "rate", "low", "high", "coherent", "n"]].round(3).to_string(index=False)
    )
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
