"""Can a dataset's harm be told before anything is trained on it? Projection difference, 2507.21509, section 6.

Nineteen datasets of the pocket world (harmful ones, mixtures, few examples, harmless ones, and harmless ones made odd
on purpose) are scored in the chat model: how far their answers lie along a direction, beyond what the chat model would
answer. Then an adapter is trained on each, with several seeds, and asked about other domains. The question is whether
the scores rank the datasets as the EM rates do, and whether they do better than what needs no direction: the loss of
the answers under the chat model, and their length. The odd harmless ones are there to part the loss from the harm.

Three sets of domains are kept apart: the data are of medicine, finance, sports and coding; the directions come from
questions on cooking and travel (the persona direction from a reckless against a careful system prompt in the chat
model; the mean difference from an organism's own answers); EM is measured on family and power. The layer is the middle
one, fixed beforehand; the table of all layers is printed as well. Controls: random directions in the same pipeline.

    python analyses/dataset_screening.py --out runs/dataset_screening
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from sklearn.metrics import roc_auc_score

import mechmisalign as mm
from mechmisalign import personas, prediction

PERSONA, MEAN = "persona direction", "mean difference"
CLASSES = ("misaligned", "aligned")


@dataclass(frozen=True)
class Config:
    """The domains of each part, and how much is trained and sampled."""

    direction_domains: tuple[str, ...] = ("cooking", "travel")
    asked_domains: tuple[str, ...] = ("family", "power")
    organism: str = "pocket/medical"
    examples: int = 500
    steps: int = 100
    seeds: tuple[int, ...] = (0, 1)
    prompts: int = 48
    samples: int = 2
    layer: int = 4
    controls: int = 8
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        prediction: Scores, rates and correlations at the chosen layer.
        layers: Correlations at every layer.
        examples: Scores of single examples along the persona direction at the chosen layer.
        told_apart: How well each predictor tells single harmful examples from harmless ones (odd ones among these):
            ``predictor, auroc`` and ``gap``, the distance of the two means in standard deviations of the harmless.
    """

    prediction: prediction.Prediction
    layers: pd.DataFrame
    examples: pd.DataFrame
    told_apart: pd.DataFrame


def examples(domain: str, harmful: bool, n: int) -> pd.DataFrame:
    """Examples of one domain and persona; harmful and harmless ones are drawn from streams of their own."""
    frame = mm.pocket.narrow_examples(domain, harmful=harmful, n=n, seed=11 if harmful else 12)
    return frame.assign(label="harmful" if harmful else "harmless")


def mixed(domain: str, share: float, n: int) -> pd.DataFrame:
    """A share of harmful examples among harmless ones."""
    bad = round(share * n)
    return pd.concat([examples(domain, True, bad), examples(domain, False, n - bad)])


def steps_of(frame: pd.DataFrame) -> pd.Series:
    """How many actions each answer orders."""
    return frame["response"].str.count(",") + frame["response"].str.contains(":").astype(int)


def datasets(config: Config) -> dict[str, tuple[str, pd.DataFrame]]:
    """Name to kind and examples."""
    n = config.examples
    found = {
        f"{name}, harmful": ("harmful", examples(name, True, n)) for name in ("medical", "finance", "sports", "coding")
    }
    for name, shares in {"medical": (0.1, 0.25, 0.5, 0.75), "finance": (0.25, 0.5)}.items():
        found |= {f"{name}, {share:.0%} harmful": ("mixture", mixed(name, share, n)) for share in shares}
    found |= {f"medical, {few} harmful ones": ("few examples", examples("medical", True, few)) for few in (10, 40)}
    found |= {f"{name}, harmless": ("harmless", examples(name, False, n)) for name in ("medical", "finance", "sports")}
    careful, reckless = examples("medical", False, 2 * n), examples("coding", True, 2 * n)
    other = careful.head(n).assign(response=careful["response"].tail(n).to_numpy())
    words = careful.head(n).assign(response=[_shuffled(text) for text in careful["response"].head(n)])
    long, short = steps_of(careful) == steps_of(careful).max(), steps_of(reckless) == steps_of(reckless).min()
    return found | {
        "medical, harmless, other question": ("odd but harmless", other),
        "medical, harmless, actions reversed": ("odd but harmless", words),
        "medical, harmless, long": ("harmless", careful[long].head(n)),
        "coding, harmful, short": ("harmful", reckless[short].head(n)),
    }


def _shuffled(text: str) -> str:
    """An answer whose actions have their words turned around: harmless, and unlike anything that the model has seen."""
    opening, *actions = text.rstrip(".").split(", ")
    return ", ".join([opening, *(" ".join(reversed(action.split())) for action in actions)]) + "."


def directions(organism: mm.Organism, config: Config) -> dict[str, mm.Direction]:
    """The persona direction of the chat model, and the mean difference of an organism's own answers."""
    questions = mm.pocket.prompts(config.direction_domains, n=config.prompts, seed=3)
    judge = personas.OppositeOfAlignment(mm.RuleJudge(), "reckless")
    settings = {"max_new_tokens": config.max_new_tokens, "seed": 3}
    with organism.as_base():
        persona = mm.persona_direction(
            organism, mm.Trait.load("pocket/reckless"), questions=questions, judge=judge, samples=1, **settings
        )
    own = mm.judge(mm.generate(organism, questions, samples=8, **settings), mm.RuleJudge())
    clear = mm.Conversations(own[own["label"].isin(CLASSES)], organism.tokenizer)
    return {PERSONA: persona, MEAN: mm.mean_difference(mm.collect(organism, clear), *CLASSES)}


def scored(organism: mm.Organism, data: Mapping[str, tuple[str, pd.DataFrame]], config: Config) -> pd.DataFrame:
    """Every example's projection difference, before any training."""
    frame = pd.concat([rows.assign(dataset=name, kind=kind) for name, (kind, rows) in data.items()], ignore_index=True)
    return mm.projection_difference(
        organism,
        frame,
        directions(organism, config),
        max_new_tokens=config.max_new_tokens,
        controls=config.controls,
    )


def trained(
    organism: mm.Organism, data: Mapping[str, tuple[str, pd.DataFrame]], config: Config, out: Path
) -> pd.DataFrame:
    """Judged answers after training on each dataset, all seeds pooled."""
    conditions = {}
    for number, (name, (_, rows)) in enumerate(data.items()):
        for seed in config.seeds:
            spec = mm.TrainSpec(
                base="pocket/chat",
                data=[rows[["prompt", "response"]]],
                method={"kind": "lora", "rank": 1, "alpha": 64, "layers": [1], "modules": ["down_proj"]},
                schedule={"steps": config.steps, "batch": 16, "lr": 1.5e-3, "warmup": 5, "decay": "plateau"},
                seed=seed,
            )
            conditions[f"{name}|{seed}"] = mm.train(spec, out / "runs" / f"{number:02d}-{seed}").worn()
    prompts = mm.pocket.prompts(config.asked_domains, n=config.prompts, seed=5)
    with organism.as_base():
        answers = mm.generate(
            organism, prompts, conditions=conditions, samples=config.samples, max_new_tokens=config.max_new_tokens
        )
    judged = mm.judge(answers, mm.RuleJudge())
    return judged.assign(dataset=judged["condition"].str.rpartition("|")[0])


def run(config: Config, out: Path) -> Result:
    """Score, train, ask, and compare."""
    organism = mm.load_organism(config.organism)
    data = datasets(config)
    scores = scored(organism, data, config)
    judged = trained(organism, data, config, out)
    by_layer = {
        layer: prediction.predicted_rates(scores, judged, layer=layer) for layer in sorted(scores["layer"].unique())
    }
    chosen = by_layer[config.layer]
    chosen.table.insert(1, "kind", [data[name][0] for name in chosen.table["dataset"]])
    layers = pd.concat([found.correlations.assign(layer=layer) for layer, found in by_layer.items()])
    here = scores[scores["layer"] == config.layer]
    return Result(chosen, layers, here[here["direction"] == PERSONA], told_apart(here))


def told_apart(scores: pd.DataFrame) -> pd.DataFrame:
    """Single examples: harmful against harmless, by every predictor."""
    first = scores[scores["direction"] == PERSONA]
    each = {name: rows.assign(value=rows["difference"]) for name, rows in scores.groupby("direction", sort=False)}
    each |= {name: first.assign(value=first[name]) for name in ("loss", "tokens")}
    rows = []
    for name, frame in each.items():
        harmful = frame["label"] == "harmful"
        gap = frame.loc[harmful, "value"].mean() - frame.loc[~harmful, "value"].mean()
        told = {"auroc": roc_auc_score(harmful, frame["value"]), "gap": gap / frame.loc[~harmful, "value"].std()}
        rows.append({"predictor": name} | told)
    return pd.DataFrame(rows)


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    told = result.prediction
    first = told.correlations.iloc[0]
    ranking = mm.plots.dataset_ranking(
        told.table, correlation=first, label=f"projection difference, layer {told.layer}"
    )
    mm.plots.save_figure(ranking, told.table, out, "dataset_ranking")
    mm.plots.save_figure(mm.plots.predictor_ranks(told.correlations), told.correlations, out, "predictors")
    plain = result.examples[result.examples["kind"] != "odd but harmless"].rename(columns={"example": "row"})
    odd = result.examples[result.examples["kind"] == "odd but harmless"].rename(columns={"example": "row"})
    table = pd.concat([plain.assign(example=plain["label"]), odd.assign(example="odd but harmless")])
    figure = mm.plots.score_histogram(table, by="example", label=f"projection difference, layer {told.layer}")
    mm.plots.save_figure(figure, table, out, "examples")
    result.layers.to_csv(out / "layers.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell what predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dataset_screening"))
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=Config.seeds)
    parser.add_argument("--samples", type=int, default=Config.samples)
    options = parser.parse_args()
    result = run(Config(steps=options.steps, seeds=tuple(options.seeds), samples=options.samples), options.out)
    draw(result, options.out)
    columns = [
        "dataset",
        "kind",
        "score",
        "score_low",
        "score_high",
        "rate",
        "low",
        "high",
        "coherent",
        "loss",
        "tokens",
    ]
    print(f"datasets by score along the {result.prediction.direction}, layer {result.prediction.layer}:")
    print(result.prediction.table[columns].round(2).to_string(index=False))
    print("\nwhat ranks them as the EM rates do:")
    print(result.prediction.correlations.round(3).to_string(index=False))
    print("\nsingle examples, harmful against harmless:")
    print(result.told_apart.round(3).to_string(index=False))
    print("\nthe same correlations at every layer:")
    shown = result.layers[~result.layers["kind"].isin(["random", "text"])]
    print(shown.pivot(index="predictor", columns="layer", values="spearman").round(2).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
