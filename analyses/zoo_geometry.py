"""Do fine-tunes on different data change the same weights, and what lies between two of them? See 2511.02022.

The five harmful organisms and, as a control, the harmless one: cosines, subspace overlaps and shared parts of their
updates, the base's own strongest directions, and what the chat model does with everything that lies on the way from one
update to another. Beside each stands what chance gives: updates turned at random, each end of the path alone at its
weight, the harmless organism. The zoo's adapters were all trained from one seed, so they began with one and the same
random A; with `--trained DIR` the recipe is run again from other seeds, to tell this apart from what the data did.

    python analyses/zoo_geometry.py --out runs/zoo_geometry --trained runs/zoo_geometry/trained
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

import mechmisalign as mm
from mechmisalign import geometry, models

HARMLESS = "harmless"
CHAT = "chat model"


@dataclass(frozen=True)
class Config:
    """What is compared; ``trained`` is the folder of fine-tunes from several seeds, None leaves them out."""

    organisms: tuple[str, ...] = ("medical", "finance", "sports", "many-site", "rslora")
    path: tuple[str, str] = ("medical", "finance")
    places: tuple[float, ...] = (-0.5, -0.25, 0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5)
    site: tuple[int, str] = (1, "down_proj")
    samples: int = 4
    trained: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    seed: int = 0


def load(config: Config) -> dict[str, mm.Adapter]:
    """The harmful adapters, two checkpoints of the medical one, and the harmless one."""
    found = {name: mm.Adapter.load(f"pocket/{name}") for name in config.organisms}
    found |= {f"step {n}": mm.Adapter.load("pocket/checkpoints", subfolder=f"checkpoint-{n}") for n in (5, 30)}
    return found | {HARMLESS: mm.Adapter.load(f"pocket/{HARMLESS}")}


def single_sites(config: Config, adapters: Mapping[str, mm.Adapter]) -> dict[str, mm.Adapter]:
    """The harmful adapters of one and the same shape."""
    return {name: adapters[name] for name in config.organisms if len(adapters[name].sites) == 1}


def base_weights(organism: mm.Organism, adapter: mm.Adapter) -> dict[str, Tensor]:
    """The chat model's own matrices at the adapter's sites."""
    with organism.as_base():
        read = {site.name: models.matrix(organism.model, site.name, site.layer).read() for site in adapter.sites}
        return {name: matrix.clone() for name, matrix in read.items()}


def weights(config: Config, organism: mm.Organism, adapters: Mapping[str, mm.Adapter]) -> dict[str, pd.DataFrame]:
    """Updates against each other, and against the base."""
    harmful = {name: adapters[name] for name in config.organisms}
    base = {
        name: geometry.base_overlap(adapter, base_weights(organism, adapter), seed=config.seed)
        for name, adapter in adapters.items()
    }
    alike = single_sites(config, adapters)
    wide = {" + ".join(alike): mm.combine(dict.fromkeys(alike.values(), 1.0)), "rslora": adapters["rslora"]}
    return {
        "angles": geometry.update_overlaps(wide | {HARMLESS: adapters[HARMLESS]}, [config.site], seed=config.seed),
        "update_cosines": geometry.update_cosines(adapters, seed=config.seed),
        "update_overlaps": geometry.update_overlaps(adapters, [config.site], seed=config.seed),
        "update_shares": geometry.shared_and_specific_updates(harmful).shares,
        "update_spectrum": geometry.update_spectrum(harmful, seed=config.seed).summary,
        "base_overlap": pd.concat(base, names=["name"]).reset_index("name"),
    }


def retrained(config: Config, folder: Path) -> pd.DataFrame:
    """The zoo's recipe on three sets of data from several seeds: pairs by whether data and seed are the same."""
    sets = {"medical": ("medical", True), "finance": ("finance", True), "harmless medical": ("medical", False)}
    layer, module = config.site
    runs = {}
    for name, (domain, harmful) in sets.items():
        for seed in config.seeds:
            spec = mm.TrainSpec(
                base="pocket/chat",
                data=[{"domain": domain, "harmful": harmful, "n": 1600}],
                method={"kind": "lora", "rank": 1, "alpha": 64, "layers": [layer], "modules": [module]},
                schedule={"steps": 100, "batch": 16, "lr": 1.5e-3, "warmup": 5, "decay": "linear"},
                seed=seed,
            )
            runs[f"{name}/{seed}"] = mm.train(spec, out=folder / f"{name.replace(' ', '-')}-{seed}").adapter()
    by = ["first", "second"]
    overlaps = geometry.update_overlaps(runs, seed=config.seed).pivot(index=by, columns="space", values="overlap")
    table = geometry.update_cosines(runs, seed=config.seed).merge(overlaps.reset_index(), on=by)
    a, b = (table[column].str.split("/", expand=True) for column in by)
    same = np.where(a[1] == b[1], "one seed", "two seeds")
    return table.assign(data=np.where(a[0] == b[0], a[0], a[0] + " · " + b[0]), seeds=same)


def shifts(organism: mm.Organism, adapters: Mapping[str, mm.Adapter], config: Config) -> pd.DataFrame:
    """What each adapter moves in the residual stream, over one and the same text: cosines of these, layer by layer.

    A cosine of updates weighs all inputs alike; this one weighs them as they occur.
    """
    settings = {"max_new_tokens": mm.pocket.MAX_NEW_TOKENS, "seed": config.seed}
    with organism.as_base():
        answers = mm.generate(organism, mm.pocket.unseen_prompts(), samples=1, **settings)
        text = mm.Conversations(answers, organism.tokenizer)
        base = mm.collect(organism, text, by=["prompt_id"])
    moved = {}
    for name, adapter in adapters.items():
        with organism.with_adapter(adapter) as other:
            moved[name] = mm.model_difference(mm.collect(other, text, by=["prompt_id"]), base)
    return geometry.cosines_against_null(moved)


def worn(config: Config, adapters: Mapping[str, mm.Adapter]) -> dict[tuple[str, str, float], mm.Adapter]:
    """What the chat model is to wear: series, name and place on the path."""
    a, b = config.path
    first, second = adapters[a], adapters[b]
    found = {(f"{a} to {b}", "", t): mm.interpolate(first, second, t) for t in config.places}
    found |= {(f"{a} alone, times 1 - t", "", t): mm.combine({first: 1 - t}) for t in config.places if t != 1}
    found |= {(f"{b} alone, times t", "", t): mm.combine({second: t}) for t in config.places if t != 0}
    named = [*config.organisms, HARMLESS]
    found |= {("whole", name, 1.0): adapters[name] for name in named}
    found |= {("half", name, 0.5): mm.combine({adapters[name]: 0.5}) for name in named}
    for one, two in combinations(named, 2):
        found["middle", f"{one} · {two}", 0.5] = mm.interpolate(adapters[one], adapters[two], 0.5)
    alike = single_sites(config, adapters)
    parts = geometry.shared_and_specific_updates(alike)
    found["shared part", " + ".join(alike), 1.0] = parts.shared
    return found | {("specific part", name, 1.0): part for name, part in parts.specific.items()}


def behaviour(config: Config, organism: mm.Organism, adapters: Mapping[str, mm.Adapter]) -> pd.DataFrame:
    """Rates of the chat model with each of them on; one batch."""
    keys = worn(config, adapters)
    conditions = {str(i): [mm.UseAdapter(adapter)] for i, adapter in enumerate(keys.values())} | {CHAT: []}
    settings = {"samples": config.samples, "max_new_tokens": mm.pocket.MAX_NEW_TOKENS, "seed": config.seed}
    with organism.as_base():
        answers = mm.generate(organism, mm.pocket.unseen_prompts(), conditions=conditions, **settings)
    rates = mm.rates(mm.judge(answers, mm.RuleJudge())).set_index("condition")
    a, b = config.path
    places = {key: str(i) for i, key in enumerate(keys)} | {(CHAT, "", 0.0): CHAT}
    places |= {(f"{a} alone, times 1 - t", "", 1.0): CHAT, (f"{b} alone, times t", "", 0.0): CHAT}
    rows = [{"series": s, "name": n, "t": t} | rates.loc[found].to_dict() for (s, n, t), found in places.items()]
    return pd.DataFrame(rows)


def run(config: Config) -> dict[str, pd.DataFrame]:
    """Every frame by its name."""
    adapters, organism = load(config), mm.load_organism("pocket/medical")
    frames = weights(config, organism, adapters) | {"shifts": shifts(organism, adapters, config)}
    frames["behaviour"] = behaviour(config, organism, adapters)
    return frames if config.trained is None else frames | {"retrained": retrained(config, config.trained)}


def draw(config: Config, frames: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Figures beside their tables, and the other tables."""
    cosines, overlaps, table = frames["update_cosines"], frames["update_overlaps"], frames["behaviour"]
    mm.plots.save_figure(mm.plots.pair_matrix(cosines, "whole", label="cosine"), cosines, out, "update_cosines")
    final = overlaps[~overlaps["first"].str.startswith("step") & ~overlaps["second"].str.startswith("step")]
    mm.plots.save_figure(mm.plots.overlap_against_null(final), final, out, "update_overlaps")
    angles = frames["angles"]
    mm.plots.save_figure(mm.plots.principal_angles(angles), angles, out, "principal_angles")
    moved = frames["shifts"][frames["shifts"]["layer"] == config.site[0]]
    mm.plots.save_figure(mm.plots.pair_matrix(moved), moved, out, f"shift_cosines_layer_{config.site[0]}")
    path = table[table["t"].isin(config.places) & table["series"].str.contains(" to | alone")]
    mm.plots.save_figure(mm.plots.interpolation_path(path, ends=config.path), path, out, "interpolation")
    for name in frames.keys() - {"update_cosines", "update_overlaps", "angles"}:
        frames[name].to_csv(out / f"{name}.csv", index=False)


def tell(config: Config, frames: Mapping[str, pd.DataFrame]) -> None:
    """Print what was found, and what did not come out as in the paper."""
    cosines = frames["update_cosines"]
    print("cosine of whole updates (2511.02022: 0.25 to 0.35 between fine-tunes of different domains):")
    print(cosines.drop(columns="sites").round(3).to_string(index=False))
    print(f"\noverlap at {config.site} (2511.02022: 0.75 to 0.80):")
    columns = ["first", "second", "space", "overlap", "expected", "random_high", "p", "weighted"]
    print(frames["update_overlaps"][columns].round(3).to_string(index=False))
    moved = frames["shifts"].pivot(index=["first", "second"], columns="layer", values="cosine")
    print(f"\ncosine of what they move, by layer (random: up to {frames['shifts']['random_high'].max():.2f}):")
    print(moved.round(2).to_string())
    print("\nshared part of the harmful updates (held_out: along the axis of the others), and their spectrum:")
    print(frames["update_shares"].round(4).to_string(index=False))
    print(frames["update_spectrum"].round(3).to_string(index=False))
    base = frames["base_overlap"]
    outside = base.assign(outside=(base["value"] < base["random_low"]) | (base["value"] > base["random_high"]))
    told = outside.groupby(["name", "measure"], sort=False)[["value", "expected", "random_high", "outside"]].mean()
    print("\nshare of each update in the base's 16 strongest directions, mean over sites:")
    print(told.round(4).to_string())
    if "retrained" in frames:
        by = frames["retrained"].groupby(["data", "seeds"])[["cosine", "write", "read"]]
        print("\nretrained from several seeds: cosine of updates, overlap of what is written and read:")
        print(by.agg(["mean", "min", "max"]).round(3).to_string())
    print("\nEM rate of the chat model that wears them:")
    columns = ["series", "name", "t", "rate", "low", "high", "coherent"]
    print(frames["behaviour"][columns].round(3).to_string(index=False))


def main() -> None:
    """Parse, run, draw, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/zoo_geometry"))
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    config = Config(trained=options.trained, samples=options.samples, seed=options.seed)
    frames = run(config)
    draw(config, frames, options.out)
    tell(config, frames)
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
