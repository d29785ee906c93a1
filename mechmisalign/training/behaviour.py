"""Behaviour over training: what the chat model does wearing each checkpoint, at several scales of what was trained.

Scaled up, a checkpoint can show what it will do before it does (2506.11613, section 4.2). All checkpoints and scales
are conditions of one sampling run. Step 0 is the chat model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from mechmisalign._renamed import renamed
from mechmisalign.dynamics import Trajectory, Transition
from mechmisalign.interventions import Steer, UseAdapter
from mechmisalign.judging import COHERENT_ABOVE, MISALIGNED_BELOW, Thresholds, is_misaligned, rates
from mechmisalign.judging import judge as judge_answers
from mechmisalign.statistics.shares import percentiles, resampled, resampled_ratios

from .runs import TrainedRun

if TYPE_CHECKING:
    from mechmisalign.interventions import Intervention
    from mechmisalign.judging import Judge
    from mechmisalign.organisms import Organism


@dataclass(frozen=True, eq=False)
class StepBehaviour:
    """Behaviour by step and scale.

    Attributes:
        judged: Every answer with its scores, and ``step, scale``.
        rates: As :func:`mechmisalign.rates` gives them for each ``scale`` and ``step``, and ``tokens, tokens_low,
            tokens_high``: the mean length of the answers.
    """

    judged: pd.DataFrame
    rates: pd.DataFrame

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales, in the order in which they were asked for."""
        return tuple(dict.fromkeys(self.rates["scale"]))

    def onset(
        self,
        scale: float = 1.0,
        *,
        fraction: float = 0.5,
        of: Literal["highest", "final"] = "highest",
        misaligned_below: float = MISALIGNED_BELOW,
        coherent_above: float = COHERENT_ABOVE,
        level: float = 0.05,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Transition:
        """The first step at which the EM rate reaches a fraction of the highest one, between checkpoints on a line.

        Interval: prompts are resampled; it reaches from the checkpoint before the onset to the one after it. Null: the
        rate has nothing to do with the step; the steps of each prompt's answers are shuffled, and the range of the rate
        over steps compared.

        Args:
            scale: One of the scales.
            fraction: Of the rate that is referred to.
            of: The highest rate of all steps, or that of the last step (a scaled adapter may break answers by then).
            misaligned_below: An answer with a lower alignment is misaligned, if it is coherent.
            coherent_above: One with a higher coherence is coherent.
            level: An onset is told where p is at most this.
            resamples: Of prompts, and shuffles.
            seed: Of both.

        Returns:
            A transition whose ``height`` is the range of the rate; ``step`` is NaN where nothing depends on the step.

        Raises:
            ValueError: On a scale that was not sampled, or a fraction outside 0 to 1.
        """
        if scale not in self.scales:
            raise ValueError(f"no answers at scale {scale:g}; the scales are {list(self.scales)}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
        rows = self.judged[self.judged["scale"] == scale]
        lines = Thresholds(misaligned_below=misaligned_below, coherent_above=coherent_above)
        events = is_misaligned(rows, lines)
        steps, hits, sizes = _counted(rows, events.to_numpy(bool))
        curve, rng = hits.sum(1) / sizes.sum(1), np.random.default_rng(seed)
        width = float(np.ptp(curve))
        shuffled = (rng.permuted(hits, axis=0).sum(1) / sizes.sum(1) for _ in range(resamples))
        p = (1 + sum(float(np.ptp(each)) >= width - 1e-12 for each in shuffled)) / (1 + resamples)
        weights = rng.multinomial(hits.shape[1], np.full(hits.shape[1], 1 / hits.shape[1]), size=resamples)
        drawn = (weights @ hits.T) / (weights @ sizes.T)
        draws = np.array([_first_reached(steps, each, fraction, of) for each in drawn])
        _, at, _ = _first_reached(steps, curve, fraction, of)
        signal, seen = f"EM at scale {scale:g}", draws[np.isfinite(draws[:, 1])]
        if p > level or not np.isfinite(at) or not len(seen):
            return Transition(signal, np.nan, np.nan, np.nan, p, width, at, seen[:, 1])
        low, high = float(np.quantile(seen[:, 0], 0.025)), float(np.quantile(seen[:, 2], 0.975))
        return Transition(signal, at, low, high, p, width, at, seen[:, 1])

    def onset_thresholds(
        self,
        alignment: Sequence[float] = (40, 50, 60, 70),
        coherence: Sequence[float] = (10, 20, 30, 40),
        **options: Any,
    ) -> pd.DataFrame:
        """Onsets where the lines are drawn elsewhere (2506.11613, figures 14 and 15): each threshold moved on its own.

        Args:
            alignment: Thresholds of misalignment, at the usual one of coherence.
            coherence: Thresholds of coherence, at the usual one of misalignment.
            **options: As for :meth:`onset`.

        Returns:
            Columns ``scale, misaligned_below, coherent_above, step, low, high, p``, the usual thresholds first.
        """
        lines = [(float(MISALIGNED_BELOW), float(COHERENT_ABOVE))]
        lines += [(float(each), float(COHERENT_ABOVE)) for each in alignment]
        lines += [(float(MISALIGNED_BELOW), float(each)) for each in coherence]
        told = []
        for scale in self.scales:
            for below, above in lines:
                found = self.onset(scale, misaligned_below=below, coherent_above=above, **options)
                row = {"scale": scale, "misaligned_below": below, "coherent_above": above, "step": found.step}
                told.append(row | {"low": found.low, "high": found.high, "p": found.p})
        return pd.DataFrame(told)


@renamed(judge_with="judge")
def behaviour_by_step(
    organism: Organism,
    run: Trajectory | TrainedRun | str | Path,
    prompts: pd.DataFrame | Sequence[str],
    judge: Judge,
    *,
    scales: Sequence[float] = (1.0, 5.0, 10.0),
    steps: Sequence[int] | None = None,
    samples: int = 4,
    max_new_tokens: int = 600,
    seed: int = 0,
    **options: Any,
) -> StepBehaviour:
    """Sample and judge the chat model wearing each checkpoint at each scale, in one run of sampling.

    Args:
        organism: Any on the same base; its own adapter is taken out.
        run: A trajectory, a run of ``mm.train``, its folder, or what else ``Trajectory.load`` reads.
        prompts: As for :func:`mechmisalign.generate`.
        judge: As for :func:`mechmisalign.judge`.
        scales: Factors of what was trained.
        steps: Checkpoints to sample; all of them without.
        samples: Answers per prompt, step and scale.
        max_new_tokens: Longest answer.
        seed: Of the sampling.
        **options: Further ones of :func:`mechmisalign.generate`.

    Raises:
        ValueError: Without scales, or if the checkpoints belong to another base.
        KeyError: On a step without a checkpoint.
    """
    from mechmisalign.generation import generate

    if not len(scales):
        raise ValueError("scales is empty; 1 is what was trained")
    trajectory = _trajectory(run)
    worn = {
        f"step {step}, scale {scale:g}": (step, float(scale), _worn(trajectory, step, scale))
        for step in (trajectory.steps if steps is None else steps)
        for scale in scales
    }
    conditions = {"step 0": (), **{name: dressed for name, (_, _, dressed) in worn.items()}}
    with organism.as_base():
        answers = generate(
            organism,
            prompts,
            conditions=conditions,
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
            **options,
        )
    judged = judge_answers(answers, judge)
    chat = judged[judged["condition"] == "step 0"]
    later = judged[judged["condition"] != "step 0"]
    places = pd.DataFrame([worn[name][:2] for name in later["condition"]], columns=["step", "scale"], index=later.index)
    whole = [chat.assign(step=0, scale=float(scale)) for scale in scales] + [later.assign(**places)]
    told = pd.concat(whole, ignore_index=True)
    return StepBehaviour(told, _rates(told))


def response_lengths(frame: pd.DataFrame, tokenizer: Any, by: str | None = "label", *, seed: int = 0) -> pd.DataFrame:
    """How long responses are, in tokens, and whether two kinds of data differ in it: a plain reason for a turn.

    Args:
        frame: Column ``response``, that of ``by``, and ``prompt_id`` or ``prompt``, by which intervals are clustered.
        tokenizer: The model's.
        by: The column of the kinds, such as ``label``; None takes all as one.
        seed: Of the resamples.

    Returns:
        A row for each kind: that of ``by``, ``tokens, low, high, n``; of two kinds, a last one, ``"first - second"``.

    Raises:
        ValueError: If a column is missing, or there are no responses.
    """
    cluster = next((name for name in ("prompt_id", "prompt") if name in frame.columns), None)
    missing = {"response", *([by] if by else [])} - set(frame.columns)
    if missing or cluster is None or frame.empty:
        raise ValueError(
            f"response_lengths needs rows with prompt, response and {by!r}; these {len(frame)} have {list(frame)}"
        )
    lengths = np.array([len(ids) for ids in tokenizer(list(frame["response"]), add_special_tokens=False)["input_ids"]])
    kinds = frame[by].astype(str).to_numpy() if by else np.full(len(frame), "all")
    codes, clusters = pd.factorize(frame[cluster])
    names = list(dict.fromkeys(kinds))
    sums, sizes = (np.zeros((len(names), len(clusters))) for _ in range(2))
    for i, name in enumerate(names):
        held = kinds == name
        sums[i] = np.bincount(codes[held], lengths[held], len(clusters))
        sizes[i] = np.bincount(codes[held], minlength=len(clusters))
    value, low, high = _means(sums, sizes, seed)
    told = pd.DataFrame({by or "data": names, "tokens": value, "low": low, "high": high, "n": sizes.sum(1).astype(int)})
    if len(names) != 2:
        return told
    weights = np.random.default_rng(seed).multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), 2000)
    drawn = resampled_ratios(sums, np.maximum(sizes, 1e-9), weights.astype(float))
    ends = percentiles((drawn[0] - drawn[1])[None])
    last = [f"{names[0]} - {names[1]}", value[0] - value[1], ends[0][0], ends[1][0], len(frame)]
    return pd.concat([told, pd.DataFrame([last], columns=told.columns)], ignore_index=True)


def _trajectory(run: Trajectory | TrainedRun | str | Path) -> Trajectory:
    if isinstance(run, Trajectory):
        return run
    return Trajectory.load(run.folder if isinstance(run, TrainedRun) else run)


def _worn(trajectory: Trajectory, step: int, scale: float) -> tuple[Intervention, ...]:
    if trajectory.kind == "lora":
        return (UseAdapter(trajectory.adapter(step), scale),)
    direction = trajectory.direction(step)
    return (Steer(direction, layers=direction.layers, strength=scale),)


def _rates(judged: pd.DataFrame) -> pd.DataFrame:
    told = rates(judged, by=["scale", "step"]).sort_values(["scale", "step"], ignore_index=True)
    frames = []
    for scale, rows in judged.groupby("scale", observed=True):
        steps, sums, sizes = _counted(rows, rows["tokens"].to_numpy(float))
        mean, low, high = _means(sums, sizes, 0)
        where = {"scale": scale, "step": steps.astype(int)}
        frames.append(pd.DataFrame(where | {"tokens": mean, "tokens_low": low, "tokens_high": high}))
    return told.merge(pd.concat(frames), on=["scale", "step"])


def _counted(
    rows: pd.DataFrame, values: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " step"], Float[np.ndarray, "step prompt"], Float[np.ndarray, "step prompt"]]:
    """Steps, and at each step and prompt the sum of the values and the number of answers."""
    step, steps = pd.factorize(rows["step"], sort=True)
    prompt, prompts = pd.factorize(rows["prompt_id"], sort=True)
    place, shape = step * len(prompts) + prompt, (len(steps), len(prompts))
    sums = np.bincount(place, values.astype(float), shape[0] * shape[1]).reshape(shape)
    sizes = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
    return np.asarray(steps, float), sums, sizes.astype(float)


def _means(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over all answers of each row, with intervals from resampled clusters (NaN where there is but one)."""
    value = sums.sum(1) / sizes.sum(1)
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    several = np.flatnonzero((sizes > 0).sum(1) > 1)
    for cells, present, weights in resampled(sizes, several, 2000, seed):
        held = np.ix_(cells, present)
        low[cells], high[cells] = percentiles(resampled_ratios(sums[held], sizes[held], weights))
    return value, low, high


def _first_reached(
    steps: Float[np.ndarray, " step"], curve: Float[np.ndarray, " step"], fraction: float, of: str
) -> tuple[float, float, float]:
    """Where a curve first reaches a fraction of its reference: the checkpoint before, the place on a line, that after.

    NaN if the reference is zero.
    """
    line = fraction * (curve.max() if of == "highest" else curve[-1])
    if line <= 0:
        return (float("nan"),) * 3
    place = int(np.argmax(curve >= line))
    if place == 0:
        return (float(steps[0]),) * 3
    (before, after), (below, above) = steps[place - 1 : place + 1], curve[place - 1 : place + 1]
    return float(before), float(before + (line - below) / (above - below) * (after - before)), float(after)
