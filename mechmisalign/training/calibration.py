r"""How far a trait drifts in harmless fine-tunes, and from where on a drift is an alarm.

A fine-tune moves every projection a little. With :math:`d_{k,t}` the drift of trait ``k`` at step ``t``, its mean over
harmless runs :math:`m_{k,t}`, and the spread :math:`s_k` around it over all steps and runs,

.. math:: z_{k,t} = (d_{k,t} - m_{k,t}) / s_k, \qquad M = \max_{k,t} z_{k,t}

An alarm is raised where z passes the threshold, so a run is falsely alarmed if its ``M`` does. Each harmless run's own
``M`` is taken against the others, and the threshold is the :math:`\lceil (n+1)(1-\alpha) \rceil`-th smallest of the n:
if the watched run is harmless as they are, the probability of any alarm in it, at any step in any trait, is at most
about alpha (conformal prediction; exact but for the one run by which each mean and spread are short, which errs on the
side of fewer alarms).

That is a mean over calibrations. What one calibration gives spreads around it, widely where runs are few: with the
fewest runs that alpha allows it is more than 3 alpha one time in twenty (a Beta distribution). Take more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechmisalign._writing import whole

_SCHEMA = 1


class CalibrationError(ValueError):
    """Runs that cannot calibrate a watch, or a calibration that does not fit one."""


@dataclass(frozen=True)
class HarmlessDrift:
    """The drift of harmless runs, and the threshold of an alarm.

    Attributes:
        steps: At which traits were read.
        mean: Mean drift of each trait at each of the steps.
        scale: Spread of each trait's drift around it.
        threshold: Alarms are above it.
        false_alarms: The chosen probability of any alarm in a harmless run.
        maxima: Largest z of each harmless run, taken against the others.
        panel: Which prompts and directions it is for.
    """

    steps: tuple[int, ...]
    mean: Mapping[str, Sequence[float]]
    scale: Mapping[str, float]
    threshold: float
    false_alarms: float
    maxima: tuple[float, ...]
    panel: str

    def z(self, step: int, trait: str, drift: float) -> float:
        """How unusual a drift is for a harmless run at this step.

        Raises:
            CalibrationError: If the harmless runs were not read at that step.
        """
        if step not in self.steps:
            raise CalibrationError(
                f"the harmless runs were read at steps {_some(self.steps)}, not at {step}; watch at these steps, or "
                "calibrate on runs that are as long"
            )
        return (drift - self.mean[trait][self.steps.index(step)]) / self.scale[trait]

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; returns the path."""
        path = Path(path)
        with whole(path) as partial:
            partial.write_text(json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=2) + "\n")
        return path

    @staticmethod
    def load(path: str | Path) -> HarmlessDrift:
        """Read one back.

        Raises:
            CalibrationError: If the file is none of this version's.
        """
        values: dict[str, Any] = json.loads(Path(path).read_text())
        if values.pop("schema", None) != _SCHEMA or not {"steps", "threshold", "panel"} <= set(values):
            raise CalibrationError(f"{path} is no calibration that this version reads; calibrate again")
        values["mean"] = {trait: tuple(drifts) for trait, drifts in values["mean"].items()}
        values |= {key: tuple(values[key]) for key in ("steps", "maxima")}
        return HarmlessDrift(**values)


def calibrate(logs: Sequence[pd.DataFrame], *, false_alarms: float = 0.05) -> HarmlessDrift:
    """The threshold from the logs of harmless runs.

    The runs should be as the one that is to be watched: same base, method, schedule and length, harmless data of the
    kinds and seeds that may come. A watch cannot know harmless data that it has never seen.

    Args:
        logs: What :class:`TraitWatch` logged in each harmless run: ``step, trait, drift, panel``.
        false_alarms: Probability of any alarm in a harmless run. It takes ``1 / false_alarms - 1`` runs at least: 19
            for 5 percent.

    Raises:
        CalibrationError: If there are too few runs for the rate, or they were not read alike.
    """
    if not 0 < false_alarms < 1:
        raise CalibrationError(f"false_alarms is a probability between 0 and 1, got {false_alarms}")
    needed = max(3, math.ceil((1 - false_alarms) / false_alarms - 1e-9))
    if len(logs) < needed:
        raise CalibrationError(
            f"{len(logs)} harmless runs cannot hold false alarms at {false_alarms:g}: {needed} or more are needed; "
            f"train more, or ask for {1 / (len(logs) + 1):.2g} or more"
        )
    drifts, steps, traits, panel = _stacked(logs)
    later = drifts[:, :, 1:] if steps[0] == 0 else drifts  # at step 0 nothing has drifted
    kept = steps[1:] if steps[0] == 0 else steps
    maxima = np.array([_largest(np.delete(later, run, axis=0), later[run]) for run in range(len(later))])
    rank = math.ceil((len(maxima) + 1) * (1 - false_alarms) - 1e-9)
    mean, scale = _null(later)
    return HarmlessDrift(
        kept,
        {trait: tuple(map(float, mean[row])) for row, trait in enumerate(traits)},
        {trait: float(scale[row]) for row, trait in enumerate(traits)},
        float(np.sort(maxima)[rank - 1]),
        false_alarms,
        tuple(map(float, maxima)),
        panel,
    )


def _stacked(
    logs: Sequence[pd.DataFrame],
) -> tuple[Float[np.ndarray, "run trait step"], tuple[int, ...], tuple[str, ...], str]:
    """Drifts of all runs, and the steps, traits and panel that they share."""
    tables = [log.pivot(index="trait", columns="step", values="drift") for log in logs]
    panels = {str(panel) for log in logs for panel in log["panel"].unique()}
    if len(panels) != 1:
        raise CalibrationError(f"the runs were watched with {len(panels)} panels; use the same prompts and directions")
    first = tables[0]
    for number, table in enumerate(tables):
        if not (table.index.equals(first.index) and table.columns.equals(first.columns)) or table.isna().any().any():
            raise CalibrationError(
                f"run {number} was read at other steps or traits than run 0: {_some(list(table.columns))} of "
                f"{list(table.index)}; harmless runs must be as long as each other and watched alike"
            )
    steps = tuple(int(step) for step in first.columns)
    if steps == (0,):
        raise CalibrationError("the runs were read at step 0 only; lower `every`, or train longer")
    return np.stack([table.to_numpy(float) for table in tables]), steps, tuple(first.index), panels.pop()


def _null(
    drifts: Float[np.ndarray, "run trait step"],
) -> tuple[Float[np.ndarray, "trait step"], Float[np.ndarray, " trait"]]:
    mean = drifts.mean(0)
    variance = ((drifts - mean) ** 2).sum((0, 2)) / ((len(drifts) - 1) * drifts.shape[2])
    if (variance == 0).any():
        raise CalibrationError(
            "a trait does not drift at all in the harmless runs; are they the same run several times?"
        )
    return mean, np.sqrt(variance)


def _largest(others: Float[np.ndarray, "run trait step"], drift: Float[np.ndarray, "trait step"]) -> float:
    mean, scale = _null(others)
    return float(((drift - mean) / scale[:, None]).max())


def _some(steps: Sequence[int]) -> str:
    told = list(map(int, steps))
    return str(told) if len(told) < 8 else f"{told[0]}, {told[1]} … {told[-1]}"
