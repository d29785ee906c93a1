"""Is emergent misalignment one direction or several? Asked of the directions of the five harmful organisms.

2506.11618 finds that directions of different fine-tunes converge; critics find several nearly independent ones, and
estimation noise alone makes one direction look like many. So two questions. Geometry: is the spectrum of the directions
at each layer more than one direction with each one's own noise (prompts resampled) would give? Behaviour: which
combinations of the directions steer the chat model? Directions are found on one set of prompts and steered on others,
at one strength, all in one batch, with norm-matched random ones. The sharpest comparison is between combinations with
the same component along the shared axis: with the rest of the combination, without any rest, and with a random rest.

    python analyses/direction_cone.py --out runs/direction_cone
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm
from mechmisalign import geometry

CLASSES = ("misaligned", "aligned")
ESTIMATORS = {"mean difference": mm.mean_difference, "prompt-matched difference": mm.matched_mean_difference}
EACH, PART = "each direction", "inside, shared part"


@dataclass(frozen=True)
class Config:
    """Whose directions, and where and how strongly they steer."""

    organisms: tuple[str, ...] = ("medical", "finance", "sports", "many-site", "rslora")
    layer: int = 1
    strength: float = 2.0
    answers: int = 16
    samples: int = 4
    members: int = 12
    resamples: int = 200
    seed: int = 0


def own_moments(name: str, prompts: pd.DataFrame, config: Config) -> mm.Moments:
    """Moments of an organism over its own judged answers, by class and prompt."""
    organism = mm.load_organism(f"pocket/{name}")
    settings = {"samples": config.answers, "max_new_tokens": mm.pocket.MAX_NEW_TOKENS, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, prompts, **settings), mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    return mm.collect(organism, mm.Conversations(clear, organism.tokenizer), by=["label", "prompt_id"])


def spectra(moments: Mapping[str, mm.Moments], config: Config) -> dict[str, pd.DataFrame]:
    """Spectrum and effective rank at each layer, by estimator."""
    found = {}
    for told, fit in ESTIMATORS.items():
        settings = {"estimator": fit, "repeats": config.resamples, "seed": config.seed}
        directions = {name: fit(each, *CLASSES) for name, each in moments.items()}
        noise = {name: mm.bootstrap_directions(each, *CLASSES, **settings) for name, each in moments.items()}
        found[told] = geometry.spectrum(directions, noise, seed=config.seed)
    return {
        "values": pd.concat({told: each.values for told, each in found.items()}, names=["estimator"]).reset_index(0),
        "ranks": pd.concat({told: each.summary for told, each in found.items()}, names=["estimator"]).reset_index(0),
    }


def steered(directions: Mapping[str, mm.Direction], prompts: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Judged answers of the chat model under every member, with ``kind, member, along`` (its part on the axis)."""
    members = {EACH: tuple(directions.values())}
    members |= geometry.cone_members(directions, draws=config.members, seed=config.seed)
    axis = members["axis"][0]
    named = {(kind, i): direction for kind, group in members.items() for i, direction in enumerate(group, 1)}
    steer = {
        f"{kind}/{i}": [mm.Steer(direction, layers=[config.layer], strength=config.strength)]
        for (kind, i), direction in named.items()
    }
    settings = {"samples": config.samples, "max_new_tokens": mm.pocket.MAX_NEW_TOKENS, "seed": config.seed}
    organism = mm.load_organism("pocket/medical")
    with organism.as_base():
        answers = mm.generate(organism, prompts, conditions={"chat model/1": [], **steer}, **settings)
    judged = mm.judge(answers, mm.RuleJudge())
    judged[["kind", "member"]] = judged["condition"].str.split("/", expand=True)
    along = {
        f"{kind}/{i}": float(direction.at(config.layer) @ axis.unit(config.layer)) / axis.norm(config.layer)
        for (kind, i), direction in named.items()
    }
    return judged.assign(along=judged["condition"].map(along))


def run(config: Config) -> dict[str, pd.DataFrame]:
    """Every frame by its name."""
    prompts = mm.pocket.unseen_prompts(seed=config.seed)
    fresh = mm.pocket.unseen_prompts(n=120, seed=config.seed + 1)
    fresh = fresh[~fresh["prompt"].isin(prompts["prompt"])].head(60)
    moments = {name: own_moments(name, prompts, config) for name in config.organisms}
    directions = {name: mm.mean_difference(each, *CLASSES) for name, each in moments.items()}
    judged = steered(directions, fresh, config)
    alike = judged[judged["kind"].isin([PART, "inside", "inside, rest random"])]
    rank = spectra(moments, config)
    return rank | {
        "cosines": geometry.cosines_against_null(directions),
        "shares": geometry.shared_and_specific(directions).shares,
        "kinds": mm.rates(judged, by="kind"),
        "members": mm.rates(judged, by=["kind", "member"]).merge(
            judged[["kind", "member", "along"]].drop_duplicates(), on=["kind", "member"]
        ),
        "rest": mm.compare(alike, against=PART, by="kind"),
        "rest_coherent": mm.compare(alike, against=PART, by="kind", outcome="coherent"),
    }


def draw(config: Config, frames: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Figures beside their tables, and the other tables."""
    layer = config.layer
    for told, values in frames["values"].groupby("estimator", sort=False):
        name, ranks = str(told).split(" ")[0], frames["ranks"][frames["ranks"]["estimator"] == told]
        at = values[values["layer"] == layer]
        mm.plots.save_figure(mm.plots.spectrum(at), at, out, f"spectrum_{name}_layer_{layer}")
        mm.plots.save_figure(mm.plots.effective_rank(ranks), ranks, out, f"effective_rank_{name}")
    cosines = frames["cosines"][frames["cosines"]["layer"] == layer]
    mm.plots.save_figure(mm.plots.pair_matrix(cosines), cosines, out, f"cosines_layer_{layer}")
    mm.plots.save_figure(mm.plots.cone_rates(frames["kinds"], frames["members"]), frames["kinds"], out, "cone")
    for name in frames.keys() - {"ranks", "kinds"}:
        frames[name].to_csv(out / f"{name}.csv", index=False)


def tell(config: Config, frames: Mapping[str, pd.DataFrame]) -> None:
    """Print what was found."""
    print("effective rank of five directions, p of one direction with noise, and the fewest dimensions not refuted:")
    columns = ["first_share", "effective_rank", "random_low", "noise_low", "noise_high", "p_one", "dimensions"]
    print(frames["ranks"].set_index(["estimator", "layer"])[columns].round(3).to_string())
    print(frames["ranks"].groupby("estimator")["p_one_everywhere"].first().to_string())
    shares = frames["shares"][frames["shares"]["layer"] == config.layer]
    print(f"\nshared part at layer {config.layer} (held_out: along the axis of the other organisms):")
    print(shares.round(3).to_string(index=False))
    print(f"\nsteering at layer {config.layer}, strength {config.strength:g}, by kind of direction:")
    print(frames["kinds"][["kind", "rate", "low", "high", "coherent", "n"]].round(3).to_string(index=False))
    print("\none by one (along: part of its length on the shared axis):")
    print(frames["members"][["kind", "member", "along", "rate", "low", "high", "coherent"]].round(3).to_string())
    print("\nthe same shared part with a rest, minus without one:")
    for name in ("rest", "rest_coherent"):
        print(frames[name][["kind", "difference", "low", "high", "p", "p_max"]].round(3).to_string(index=False))


def main() -> None:
    """Parse, run, draw, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/direction_cone"))
    parser.add_argument("--strength", type=float, default=Config.strength)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    config = Config(strength=options.strength, samples=options.samples, seed=options.seed)
    frames = run(config)
    draw(config, frames, options.out)
    tell(config, frames)
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
