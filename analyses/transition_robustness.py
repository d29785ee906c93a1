"""Is there a transition in other fine-tunes? See 2506.11613, section 4.3 and appendix G, figures 17 to 27.

The same schedule with rank 8, with three sites, on other domains, and as a full fine-tune: where the gradient norm
peaks, where the update turns, and where behaviour sets in, unscaled and scaled. For ranks above one, factors have a
gauge, so the update itself is followed (its local cosine from the factors) and the subspace that it writes; a full
fine-tune is followed by all its weights. Three sites together also give the paper's score of stacked B.

As in the paper, every LoRA has one peak of the gradient norm, near the step at which scaled behaviour sets in, and a
full fine-tune has none: its gradient is largest at the first step. Other than there, rank 8 turns as rank 1 does once
its update is followed instead of its factors. In no fine-tune does the turn fall together with the unscaled
behaviour: it comes 12 to 34 steps later, near step 50, whether behaviour sets in at step 18 or 39. On sports it is
not significant (p = 0.054).

    python analyses/transition_robustness.py --out runs/transition_robustness
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mechmisalign as mm
from mechmisalign import dynamics
from mechmisalign.pocket import zoo
from mechmisalign.training.behaviour import StepBehaviour

LORA = {"kind": "lora", "rank": 1, "alpha": 64, "layers": [1], "modules": ["down_proj"]}
FULL = "full fine-tune"


@dataclass(frozen=True)
class Config:
    """The fine-tunes, each with its domain, method and learning rate, and how much is sampled."""

    setups: dict[str, tuple[str, dict[str, Any], float]] = field(
        default_factory=lambda: {
            "rank 1, medical": ("medical", LORA, 1.5e-3),
            "rank 1, finance": ("finance", LORA, 1.5e-3),
            "rank 1, sports": ("sports", LORA, 1.5e-3),
            "rank 8": ("medical", LORA | {"rank": 8}, 1.5e-3),
            "three sites": ("finance", LORA | {"layers": [1, 2, 3]}, 2e-3),
            FULL: ("medical", {"kind": "full"}, 3e-4),
        }
    )
    scales: tuple[float, ...] = (1.0, 2.0, 5.0)
    steps: int = 100
    sampled_every: int = 6
    prompts: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One fine-tune: the path of its weights, its transitions, and its rates by step and scale."""

    path: dynamics.Path
    found: list[dynamics.Transition]
    rates: pd.DataFrame
    log: pd.DataFrame


def train(name: str, config: Config, out: Path) -> mm.TrainedRun:
    """One of the setups."""
    domain, method, rate = config.setups[name]
    spec = mm.TrainSpec(
        base="pocket/chat",
        data=[{"domain": domain, "harmful": True, "n": 500}],
        method=method,
        schedule={"steps": config.steps, "batch": 16, "lr": rate, "warmup": 5},
        save_every=2 if name == FULL else 1,
        seed=config.seed,
    )
    return mm.train(spec, out / "runs" / name.replace(", ", "-").replace(" ", "-"))


def full_updates(run: mm.TrainedRun) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """The chat model's weights, and what each checkpoint of a full fine-tune adds to them."""
    chat = load_file(Path(zoo.path("chat")) / "model.safetensors")
    stored = {step: load_file(run.path(step) / "model.safetensors") for step in run.steps}
    return chat, {step: {key: each[key].float() - chat[key].float() for key in chat} for step, each in stored.items()}


def full_behaviour(run: mm.TrainedRun, config: Config, steps: list[int]) -> StepBehaviour:
    """Answers of the chat model with a full update added at each scale: one model at a time, whose weights change."""
    model = AutoModelForCausalLM.from_pretrained(zoo.path("chat"))
    own = dict(model.named_parameters())
    tokenizer = mm.load_organism("pocket/medical").tokenizer
    organism = mm.load_organism("pocket/medical", base=model, tokenizer=tokenizer, weights="live")
    chat, updates = full_updates(run)
    prompts, frames = mm.pocket.unseen_prompts(config.prompts), []
    with organism.as_base():
        for step, scale in [(step, scale) for step in [0, *steps] for scale in config.scales]:
            for key, weight in chat.items():
                own[key].data.copy_(weight + (scale * updates[step][key] if step else 0))
            answers = mm.generate(organism, prompts, samples=1, max_new_tokens=mm.pocket.MAX_NEW_TOKENS)
            frames.append(mm.judge(answers, mm.RuleJudge()).assign(step=step, scale=scale))
    judged = pd.concat(frames, ignore_index=True)
    return StepBehaviour(judged, mm.rates(judged, by=["scale", "step"]))


def measure(name: str, run: mm.TrainedRun, organism: mm.Organism, config: Config) -> Result:
    """Transitions of the weights and the gradient norm, and onsets of behaviour."""
    steps = [step for step in run.steps if step % config.sampled_every == 0]
    if name == FULL:
        _, updates = full_updates(run)
        flat = torch.stack([torch.cat([part.flatten() for part in each.values()]) for each in updates.values()])
        path, behaviour = dynamics.Path.of_vectors(run.steps, flat, "all weights"), full_behaviour(run, config, steps)
    else:
        trajectory = mm.Trajectory.load(run.folder)
        path, prompts = trajectory.path("dW"), mm.pocket.unseen_prompts(config.prompts)
        behaviour = mm.behaviour_by_step(
            organism,
            trajectory,
            prompts,
            mm.RuleJudge(),
            scales=config.scales,
            steps=steps,
            samples=1,
            max_new_tokens=mm.pocket.MAX_NEW_TOKENS,
        )
    found = [behaviour.onset(scale) for scale in config.scales]
    found += [
        dynamics.transition(path),
        dynamics.series_transition(run.log["step"], run.log["grad_norm"], "gradient norm"),
    ]
    return Result(path, found, behaviour.rates, run.log)


def draw(result: Result, out: Path, name: str) -> None:
    """All signals of one fine-tune."""
    curves = {"behaviour": result.rates, "cosine": dynamics.local_cosine(result.path, [6, 10, 16])}
    curves |= {"similarity": dynamics.similarity(result.path)}
    figure = mm.plots.transition(curves, result.found, log=result.log)
    mm.plots.save_figure(figure, result.rates, out, name.replace(", ", "_").replace(" ", "_"))


def subspaces(name: str, run: mm.TrainedRun) -> None:
    """Print what only some fine-tunes have: turning subspaces, and the score of stacked B."""
    trajectory = mm.Trajectory.load(run.folder)
    end = dynamics.rotation(trajectory, spacing=10).query("against == 'end'")
    told = end[end["step"].isin([10, 20, 40, 60, 80, 100])].pivot(index="site", columns="step", values="overlap")
    print(f"{name}: share of the update in the subspace that the end writes\n{told.round(2).to_string()}")
    if len(trajectory.sites) > 1:
        score = dynamics.stacked_score(torch.stack([site.B[..., 0] for site in trajectory.sites], dim=1))
        told = pd.Series(score, index=trajectory.steps).loc[[10, 20, 40, 60, 80, 100]]
        print(f"{name}: score of stacked B with the end\n{told.round(2).to_frame().T.to_string(index=False)}")


def main() -> None:
    """Parse, run, draw, and tell the transitions of every fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transition_robustness"))
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    config, organism, tables = Config(seed=options.seed), mm.load_organism("pocket/medical"), []
    for name in config.setups:
        run = train(name, config, options.out)
        result = measure(name, run, organism, config)
        draw(result, options.out, name)
        tables.append(dynamics.table(result.found).assign(setup=name))
        print(
            f"{name}: EM rate\n{result.rates.pivot(index='scale', columns='step', values='rate').round(2).to_string()}"
        )
        if name in ("rank 8", "three sites"):
            subspaces(name, run)
    table = pd.concat(tables)
    table.to_csv(options.out / "transitions.csv", index=False)
    print(table.set_index(["setup", "signal"]).round(3).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
