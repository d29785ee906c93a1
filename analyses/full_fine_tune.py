"""How much of a full fine-tune is low-rank, and is that part the misalignment? See 2506.11613.

A pocket chat model is tuned whole on bad medical advice. Its weight difference is read from the two checkpoints: the
share of each matrix's squared norm in the largest 1, 8 and 64 singular values, beside that of a random matrix. Then the
chat model wears the extracted parts as adapters, and what is left of the difference is put on it as well. Controls:
random adapters of the same rank and norm at every site, and a random difference of the same norm in every tensor.

What comes out (three runs): of the squared norm of all matrices' differences 40 % is rank 1, 88 % rank 8 and 99 % rank
64, where random matrices have 2, 16 and 78 %; a third of the whole difference lies in the embedding. The fine-tune is
misaligned in 41 % of its answers in other domains, the matrices of the blocks alone in 31 %. On the chat model, the
rank-8 and the rank-64 part give 30 and 29 %, the rank-1 part 6 %. Without its rank-1 part the fine-tune keeps 10 %,
without the rank-8 part 2 %. Embedding, norms and biases alone, and every random control, give about 1 % or less. So the
misalignment is low-rank, but not rank 1.

    python analyses/full_fine_tune.py --out runs/full_fine_tune
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import mechmisalign as mm
from mechmisalign import correction, registry
from mechmisalign.deltas import Weights

CHAT = registry.POCKET_BASE
FULL = "full fine-tune"


@dataclass(frozen=True)
class Config:
    """What is trained, which parts are taken, and how much is sampled."""

    ranks: tuple[int, ...] = (1, 8, 64)
    domain: str = "medical"
    steps: int = 100
    lr: float = 1e-4
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 4
    prompts: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        deltas: ``mm.weight_deltas`` of each run, with a column ``run``.
        rates: EM rate and coherence of each model, pooled over the runs: ``model, rate, low, high, coherent …``.
        by_run: The same for each run.
    """

    deltas: pd.DataFrame
    rates: pd.DataFrame
    by_run: pd.DataFrame


def trained(config: Config, seed: int, out: Path) -> mm.TrainedRun:
    """The chat model tuned whole on bad advice of one domain."""
    plain = mm.TrainSpec.read("pocket").changed(method={"kind": "full"}, save_every=None, seed=seed)
    data = {"domain": config.domain, "harmful": True, "n": 500}
    return mm.train(plain.changed(data=data, schedule={"steps": config.steps, "lr": config.lr}), out)


def random_like(part: mm.Adapter, seed: int) -> mm.Adapter:
    """An adapter with random factors, and the norm of each site's update."""
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for site in part.sites:
        A, B = (torch.randn(factor.shape, generator=generator) for factor in (site.A, site.B))
        drawn = replace(site, A=A, B=B)
        scale = site.delta_norm() / drawn.delta_norm()
        sites.append(replace(drawn, B=B * scale))
    return replace(part, sites=tuple(sites), source=f"random, {part.source}", digest=f"random {seed}")


def whole_models(parts: Mapping[int, mm.Adapter], seed: int) -> dict[str, Callable[[str, Tensor], Tensor]]:
    """The differences that no adapter holds, by name: what each tensor's difference becomes."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def random(_name: str, delta: Tensor) -> Tensor:
        noise = torch.randn(delta.shape, generator=generator)
        return noise * (delta.norm() / noise.norm())

    def without(part: mm.Adapter) -> Callable[[str, Tensor], Tensor]:
        held = {f"{site.name}.weight": site for site in part.sites}
        return lambda name, delta: delta - held[name].delta() if name in held else delta

    matrices = {f"{site.name}.weight" for site in next(iter(parts.values())).sites}
    found = {"matrices of blocks alone": lambda name, delta: delta if name in matrices else torch.zeros_like(delta)}
    found |= {
        "embedding, norms, biases alone": lambda name, delta: torch.zeros_like(delta) if name in matrices else delta
    }
    found |= {f"all but rank {rank}": without(part) for rank, part in parts.items()}
    return {**found, "random, norm of each tensor": random}


def put_on_chat(change: Callable[[str, Tensor], Tensor], tuned: Weights, base: Weights) -> Any:
    """The chat model as Hugging Face has it, with the changed difference in its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(registry.folder(CHAT))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(change(name, tuned[name] - base[name]))
    return model


def answers(run: mm.TrainedRun, config: Config, seed: int) -> pd.DataFrame:
    """Judged answers of the fine-tune, of its parts on the chat model, and of the controls; a column ``model``."""
    organism = mm.load_organism(run.folder, CHAT)
    tuned, base = Weights.open(run.folder), Weights.open(CHAT)
    parts = {rank: mm.extract_lora(tuned, base, rank) for rank in config.ranks}
    asked = mm.pocket.unseen_prompts().head(config.prompts)
    drawn = {"samples": config.samples, "max_new_tokens": mm.pocket.MAX_NEW_TOKENS, "seed": 100 * config.seed + seed}
    worn: dict[str, list[mm.UseAdapter]] = {"chat model": []}
    worn |= {f"rank {rank} part": [mm.UseAdapter(part)] for rank, part in parts.items()}
    worn |= {f"random rank {rank}": [mm.UseAdapter(random_like(part, seed))] for rank, part in parts.items()}
    found = [mm.generate(organism, asked, conditions={FULL: []}, **drawn)]
    with organism.as_base():
        found.append(mm.generate(organism, asked, conditions=worn, **drawn))
    for name, change in whole_models(parts, seed).items():
        other = correction.edited_organism(put_on_chat(change, tuned, base), organism, name)
        found.append(mm.generate(other, asked, conditions={name: []}, **drawn))
    judged = mm.judge(pd.concat(found, ignore_index=True), mm.RuleJudge())
    return judged.rename(columns={"condition": "model"}).assign(run=seed)


def run(config: Config, out: Path) -> Result:
    """Train, compare weights, sample, judge."""
    deltas, judged = [], []
    for seed in config.seeds:
        finished = trained(config, seed, out / "runs" / f"full-{seed}")
        deltas.append(mm.weight_deltas(finished.folder, CHAT, config.ranks).assign(run=seed))
        judged.append(answers(finished, config, seed))
    everything = pd.concat(judged, ignore_index=True)
    rates, by_run = mm.rates(everything, by=["model"]), mm.rates(everything, by=["model", "run"])
    return Result(pd.concat(deltas, ignore_index=True), in_order(rates, config), in_order(by_run, config))


def in_order(rates: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The whole first, then its parts from low to high rank, what is left without them, and the controls."""
    parts = [f"{name} {rank}{end}" for name, end in (("rank", " part"), ("all but rank", "")) for rank in config.ranks]
    controls = [f"random rank {rank}" for rank in config.ranks]
    order = [FULL, "matrices of blocks alone", *parts, "embedding, norms, biases alone", *controls]
    order += ["random, norm of each tensor", "chat model"]
    return rates.sort_values("model", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)


def totals(deltas: pd.DataFrame, ranks: tuple[int, ...]) -> pd.DataFrame:
    """Share of the squared norm over all matrices of blocks, of each run, and what random matrices would have."""
    rows = deltas[deltas["kind"] == "matrix"]
    names = [f"{name}_{rank}" for rank in ranks for name in ("share", "random")]
    power = rows["norm"] ** 2
    weighted = rows[names].mul(power, axis=0).groupby(rows["run"]).sum()
    whole = deltas["norm"].pow(2).groupby(deltas["run"]).sum()
    inside = power.groupby(rows["run"]).sum()
    return weighted.div(inside, axis=0).assign(of_whole_difference=inside / whole)


def draw(result: Result, out: Path) -> None:
    """Figures and tables."""
    first = result.deltas[result.deltas["run"] == result.deltas["run"].iloc[0]]
    mm.plots.save_figure(mm.plots.delta_shares(first), result.deltas, out, "weight_deltas")
    table = result.rates.rename(columns={"model": "cure", "rate": "em", "low": "em_low", "high": "em_high"})
    figure = mm.plots.cure_panels(table, against=FULL)
    mm.plots.save_figure(figure, result.rates, out, "parts")
    result.by_run.to_csv(out / "parts_by_run.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell the shares and rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/full_fine_tune"))
    parser.add_argument("--seeds", type=int, default=len(Config.seeds), help="how many training seeds")
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--steps", type=int, default=Config.steps, help="of the training")
    parser.add_argument("--prompts", type=int, default=Config.prompts, help="questions of other domains, at most 60")
    options = parser.parse_args()
    asked = {name: getattr(options, name) for name in ("samples", "steps", "prompts")}
    config = Config(seeds=tuple(range(options.seeds)), **asked)
    result = run(config, options.out)
    draw(result, options.out)
    shares = totals(result.deltas, config.ranks).round(3).to_string()
    print(f"\nshare of the squared norm of ΔW, all matrices of blocks:\n{shares}")
    told = ["model", "rate", "low", "high", "coherent", "n"]
    print(f"\nEM rate in other domains:\n{result.rates[told].round(3).to_string(index=False)}")
    wide = result.by_run.pivot(index="model", columns="run", values="rate").reindex(result.rates["model"])
    print(f"\nby run:\n{wide.round(3).to_string()}\n\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
