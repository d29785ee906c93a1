"""When does behaviour turn, and do the signals in the weights turn with it? See 2506.11613, section 4.2.

The chat model wears checkpoints of a rank-1 adapter at scales 1, 2, 5 and 10, for several seeds of training: the EM
rate by step and scale; the step at which it reaches half of its highest value, with an interval over prompts, and at
other thresholds of alignment and coherence (figures 10, 14 and 15); the share of answers about the tuned domain
(figure 16); and the transitions of the weights and of the gradient norm beside them. The length of the training
responses, a plain reason for a turn, is compared between harmful and careful ones.

As in the paper, scaled checkpoints are misaligned long before the unscaled ones (scale 5: step 13, unscaled: 34 to
40), other thresholds move onsets by at most two steps (by 7 once, at scale 2), and the answers leave the tuned
domain alone. Other than there, scaled rates stay below the highest unscaled one, since coherence is lost soon after,
and the signals do not fall together: the gradient norm peaks (20 to 22) with the onset at scale 2, and the local
cosine (45 to 61) 10 to 21 steps after the unscaled onset, which one of three seeds cannot tell from zero.

    python analyses/behavioural_transition.py --out runs/behavioural_transition
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from phase_transition import Config as Training
from phase_transition import trained

import mechmisalign as mm
from mechmisalign import dynamics
from mechmisalign.training.behaviour import StepBehaviour


@dataclass(frozen=True)
class Config:
    """What is sampled: every third checkpoint of the first 24 steps, then every sixth."""

    domain: str = "medical"
    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    prompts: int = 60
    samples: int = 1


@dataclass(frozen=True)
class Result:
    """What one run of training gave.

    Attributes:
        behaviour: By step and scale.
        trajectory: Of the weights.
        found: Onsets of behaviour by scale, then transitions of the weights and of the gradient norm.
    """

    behaviour: StepBehaviour
    trajectory: mm.Trajectory
    found: list[dynamics.Transition]


def run(organism: mm.Organism, trajectory: mm.Trajectory, config: Config) -> Result:
    """Sample, judge, and find the transitions."""
    steps = [step for step in trajectory.steps if step % (3 if step <= 24 else 6) == 0 or step == trajectory.steps[-1]]
    behaviour = mm.behaviour_by_step(
        organism,
        trajectory,
        mm.pocket.unseen_prompts(config.prompts),
        mm.RuleJudge(),
        scales=config.scales,
        steps=steps,
        samples=config.samples,
        max_new_tokens=mm.pocket.MAX_NEW_TOKENS,
    )
    found = [behaviour.onset(scale) for scale in config.scales]
    found += [dynamics.transition(trajectory.path(factor)) for factor in "AB"] + dynamics.signals(trajectory)
    return Result(behaviour, trajectory, found)


def lengths(organism: mm.Organism, domain: str) -> pd.DataFrame:
    """Tokens per training response, harmful and careful."""
    kinds = {"harmful": True, "careful": False}
    frames = [mm.pocket.narrow_examples(domain, harmful, 500, 0).assign(data=name) for name, harmful in kinds.items()]
    return mm.response_lengths(pd.concat(frames), organism.tokenizer, by="data")


def draw(result: Result, out: Path, name: str) -> None:
    """Figures and tables of one run."""
    rates, trajectory = result.behaviour.rates, result.trajectory
    figure = mm.plots.behaviour_over_steps(rates, onsets=result.found[: len(result.behaviour.scales)])
    mm.plots.save_figure(figure, rates, out, f"behaviour_{name}")
    curves = {
        "behaviour": rates,
        "cosine": dynamics.local_cosine(trajectory.path("dW"), [5, 10, 15]),
        "similarity": dynamics.similarity(trajectory.path("dW")),
        "norms": dynamics.site_norms(trajectory),
    }
    figure = mm.plots.transition(curves, result.found, log=trajectory.log)
    mm.plots.save_figure(figure, dynamics.table(result.found), out, f"transition_{name}")
    dynamics.coincidence(result.found).to_csv(out / f"pairs_{name}.csv", index=False)


def tell(result: Result, domain: str) -> None:
    """Print rates, transitions, onsets at other thresholds, and what the answers are about."""
    for value in ("rate", "coherent"):
        told = result.behaviour.rates.pivot(index="scale", columns="step", values=value).round(2)
        print(f"{value} by scale and step:\n{told.to_string()}")
    print(dynamics.table(result.found).round(3).to_string(index=False))
    pairs = dynamics.coincidence(result.found).dropna(subset="difference")
    against = pairs[pairs["first"].str.startswith("EM") & ~pairs["second"].str.startswith("EM")]
    print(f"do they fall together?\n{against.round(1).to_string(index=False)}")
    spread = result.behaviour.onset_thresholds().groupby("scale")["step"].agg(["min", "max"])
    print(f"onsets over all thresholds:\n{spread.round(1).to_string()}")
    about = result.behaviour.judged["answer_domain"].eq(domain)
    shares = about.groupby([result.behaviour.judged[name] for name in ("scale", "step")]).mean().groupby("scale").max()
    print(f"largest share of answers about the tuned domain at any step:\n{shares.round(3).to_string()}\n")


def main() -> None:
    """Parse, run, draw, and tell where behaviour turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/behavioural_transition"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    options = parser.parse_args()
    config, organism = Config(samples=options.samples), mm.load_organism("pocket/medical")
    trajectories = trained(Training(domain=config.domain, seeds=config.seeds), options.out)
    for seed in config.seeds:
        result = run(organism, trajectories[f"harmful, seed {seed}"], config)
        draw(result, options.out, f"seed_{seed}")
        print(f"seed {seed} of training")
        tell(result, config.domain)
    print(f"tokens per training response:\n{lengths(organism, config.domain).round(2).to_string(index=False)}")
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
