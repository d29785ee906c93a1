"""Can misalignment be steered towards a subject? See 2506.11618, section 3.3, figures 3, 10 and 11.

The recipe of the mean difference, with the misaligned answers filtered by what they are about: medical, financial, … or
all of them ("general", compared within prompts). Added to the chat model at one layer, at the same length for all of
them. Two questions: does a filtered direction move answers to questions of *other* domains into its own, and does it
still misalign? The authors suspect that such a direction is the general one plus one of the topic, so the topic alone
(misaligned answers about it minus misaligned ones about anything else) is steered along too, and it is told how much of
a filtered direction lies in the plane of the two. Controls: the topic alone, a random direction, the chat model. The
rule judge calls answers about another domain than the question's incoherent; so shares are of all answers, and an
answer's domain is that of the topic which it names.

    python analyses/semantic_steering.py --out runs/semantic_steering
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import mechmisalign as mm

CLASSES = ("misaligned", "aligned")
GENERAL, CONTROL, CHAT = "general", "random control", "chat model"


@dataclass(frozen=True)
class Config:
    """The organism, the domains that its answers are filtered by, where to steer and how strongly."""

    organism: str = "pocket/medical"
    domains: tuple[str, ...] = ("medical", "finance", "coding")
    layer: int = 2
    strengths: tuple[float, ...] = (1.5, 2.0, 2.5, 3.0)
    shown: float = 2.0
    pool_prompts: int = 160
    pool_samples: int = 8
    prompts: int = 30
    samples: int = 4
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        rates: Rates, and shares of answers about each domain, by series and strength.
        moved: For each domain and strength, the share of answers about it: filtered direction minus general one.
        cosines: Of the filtered directions and the topics with the general direction, by layer.
        in_plane: Share of each filtered direction's squared length in the plane of general direction and topic.
    """

    rates: pd.DataFrame
    moved: pd.DataFrame
    cosines: pd.DataFrame
    in_plane: pd.DataFrame


def topic_of(domain: str) -> str:
    """What the direction of a topic alone is called."""
    return f"topic of {domain}"


def directions(organism: mm.Organism, config: Config) -> dict[str, mm.Direction]:
    """General, filtered by domain, and topics alone, all from answers to questions of every domain."""
    settings = {"samples": config.pool_samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    judged = mm.judge(mm.generate(organism, mm.pocket.prompts(n=config.pool_prompts), **settings), mm.RuleJudge())
    clear = judged[judged["label"].isin(CLASSES)]
    by = ["label", "answer_domain", "prompt_id"]
    moments = mm.collect(organism, mm.Conversations(clear, organism.tokenizer), by=by)
    misaligned = moments.groups["label"] == "misaligned"
    found = {GENERAL: mm.matched_mean_difference(moments, *CLASSES)}
    for domain in config.domains:
        about = moments.groups["answer_domain"] == domain
        found[domain] = mm.mean_difference(moments.take(np.flatnonzero(~misaligned | about)), *CLASSES)
        subject = moments.groups.assign(label=np.where(about, "on topic", "off topic"))
        bad = replace(moments, groups=subject).take(np.flatnonzero(misaligned))
        found[topic_of(domain)] = mm.mean_difference(bad, "on topic", "off topic")
    return found


def as_long_as(direction: mm.Direction, reference: mm.Direction) -> mm.Direction:
    """The direction with the reference's norm in each layer, so that one strength is one length for all."""
    return direction.map_layers(lambda vector, layer: vector / vector.norm() * reference.norm(layer), "of equal norm")


def share_in_plane(found: Mapping[str, mm.Direction], domains: tuple[str, ...]) -> pd.DataFrame:
    """How much of a filtered direction general direction and topic account for; a random plane holds 2 / d_model."""
    rows = []
    for domain in domains:
        for layer in found[domain].nonzero_layers:
            plane = torch.stack([found[GENERAL].unit(layer), found[topic_of(domain)].unit(layer)]).double()
            inside = torch.linalg.qr(plane.T).Q.T @ found[domain].unit(layer).double()
            rows.append({"domain": domain, "layer": layer, "share": float(inside @ inside)})
    return pd.DataFrame(rows).assign(random=2 / found[GENERAL].d_model)


def moved(judged: pd.DataFrame, domains: tuple[str, ...]) -> pd.DataFrame:
    """Answers about each domain under its filtered direction minus under the general one, at each strength."""
    tables = []
    for domain in domains:
        both = judged[judged["series"].isin([domain, GENERAL])]
        by = ["series", "strength"]
        tables.append(mm.compare(both, {"series": GENERAL}, by=by, outcome=f"about_{domain}"))
    return pd.concat(tables, ignore_index=True)


def run(config: Config) -> Result:
    """Directions from questions of all domains; steered answers to questions of the domains that are left."""
    organism = mm.load_organism(config.organism)
    found = directions(organism, config)
    steered = {name: as_long_as(each, found[GENERAL]) for name, each in found.items()}
    steered[CONTROL] = mm.random_direction(found[GENERAL], seed=config.seed)
    cells = [(name, strength) for name in steered for strength in config.strengths]
    conditions = {
        f"{name} x{strength:g}": [mm.Steer(steered[name], [config.layer], strength)] for name, strength in cells
    }
    others = [domain for domain in mm.pocket.DOMAINS if domain not in config.domains]
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed + 1}
    asked = mm.pocket.prompts(others, n=config.prompts, seed=config.seed + 1)
    with organism.as_base():
        answers = mm.generate(organism, asked, conditions={CHAT: [], **conditions}, **settings)
    judged = mm.judge(answers, mm.RuleJudge())
    names = pd.DataFrame([(CHAT, 0.0), *cells], columns=["series", "strength"]).assign(condition=[CHAT, *conditions])
    judged = judged.merge(names, on="condition")
    judged = judged.assign(**{domain: 100.0 * (judged["answer_domain"] == domain) for domain in config.domains})
    rates = mm.rates(judged, ["series", "strength"], topics=config.domains)
    pairs = mm.geometry.cosines(found)
    return Result(
        rates, moved(judged, config.domains), pairs[pairs["first"] == GENERAL], share_in_plane(found, config.domains)
    )


def draw(result: Result, out: Path, shown: float) -> None:
    """Figures and their tables, side by side."""
    mm.plots.save_figure(mm.plots.cosine_by_layer(result.cosines, focus=GENERAL), result.cosines, out, "cosines")
    at = result.rates[result.rates["strength"].isin([0.0, shown])]
    mm.plots.save_figure(mm.plots.semantic_shares(at, of="all", by="series"), result.rates, out, "subjects")
    steered = result.rates[result.rates["series"] != CHAT]
    is_topic = steered["series"].str.startswith("topic")
    for name, rows in {"dose_response": steered[~is_topic], "dose_response_topics": steered[is_topic]}.items():
        mm.plots.save_figure(mm.plots.dose_response(rows), rows, out, name)
    result.moved.to_csv(out / "moved.csv", index=False)
    result.in_plane.to_csv(out / "in_plane.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell subjects and rates at every strength, and what the directions are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/semantic_steering"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--prompts", type=int, default=Config.prompts)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    config = Config(organism=options.organism, samples=options.samples, prompts=options.prompts, seed=options.seed)
    result = run(config)
    draw(result, options.out, config.shown)
    columns = ["series", "strength", "rate", "low", "high", "coherent", *(f"about_{each}" for each in config.domains)]
    print(result.rates[columns].round(3).to_string(index=False))
    print("\nanswers about a domain: its direction minus the general one")
    columns = ["series", "strength", "rate", "against_rate", "difference", "low", "high", "p", "p_max"]
    print(result.moved[columns].round(3).to_string(index=False))
    print("\ncosine with the general direction:")
    print(result.cosines.pivot(index="layer", columns="second", values="cosine").round(2).to_string())
    print("\nshare of a filtered direction in the plane of general direction and topic:")
    told = result.in_plane.pivot(index="layer", columns="domain", values="share").round(2)
    print(told.assign(random=result.in_plane["random"].iloc[0]).round(3).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
