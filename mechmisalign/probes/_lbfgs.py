r"""Many L2 logistic regressions over one table of features, solved together by L-BFGS.

Fold ``f`` minimises, over the weights ``w`` of the standardised features and the intercept ``b``,

.. math:: \sum_i s_{fi} \log(1 + e^{-y_{fi} z_{fi}}) + \frac{\lambda_f}{2} |w_f|^2, \qquad
          z_{fi} = \sum_d w_{fd} \frac{x_{id} - \mu_{fd}}{\sigma_{fd}} + b_f, \qquad \lambda_f = 1 / (C n_f)

with ``s`` the shares of the training rows: scikit-learn's problem divided by ``C n``. Margins are linear in a step, so
the line search reads margins only; an iteration reads the features twice, once forwards and once for the gradient.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

_MEMORY = 10
_LINE_STEPS = 6

Steps = Float[Tensor, "fold parameter"]
Column = Float[Tensor, "fold 1"]
Pair = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Problem:
    features: Float[Tensor, "row feature"]
    signs: Float[Tensor, "fold row"]
    sample: Float[Tensor, "fold row"]
    mean: Float[Tensor, "fold feature"]
    scale: Float[Tensor, "fold feature"]
    penalty: Float[Tensor, "fold 1"]

    def raw(self, parameters: Steps) -> tuple[Float[Tensor, "fold feature"], Column]:
        """Weights and intercept in the units of the raw features."""
        coef = parameters[:, :-1] / self.scale
        return coef, parameters[:, -1:] - (coef.double() * self.mean).sum(1, keepdim=True).to(coef)

    def margins(self, parameters: Steps) -> Float[Tensor, "fold row"]:
        coef, intercept = self.raw(parameters)
        return (self.features @ coef.T).T + intercept

    def pull(self, margins: Float[Tensor, "fold row"]) -> Float[Tensor, "fold row"]:
        """Derivative of the loss by each margin."""
        return -self.signs * self.sample * torch.sigmoid(-self.signs * margins)

    def gradient(self, parameters: Steps, margins: Float[Tensor, "fold row"]) -> Steps:
        pull = self.pull(margins)
        total = pull.sum(1, keepdim=True)
        slope = (pull @ self.features - total * self.mean) / self.scale + self.penalty * parameters[:, :-1]
        return torch.cat([slope, total], dim=1)


def solve_logistic(
    features: Float[Tensor, "row feature"],
    signs: Float[Tensor, "fold row"],
    sample: Float[Tensor, "fold row"],
    mean: Float[Tensor, "fold feature"],
    scale: Float[Tensor, "fold feature"],
    C: float,  # noqa: N803
    max_iter: int,
    tol: float,
) -> tuple[Float[Tensor, "fold feature"], Float[Tensor, " fold"]]:
    """Weights ``[fold feature]`` and intercepts ``[fold]`` in raw units.

    Args:
        features: ``[row feature]``, never copied.
        signs: Labels as +1 and -1.
        sample: Share of each row in the loss: 1/n on training rows, 0 elsewhere.
        mean: Means that standardise, by fold.
        scale: Standard deviations that standardise, by fold.
        C: Inverse regularisation strength.
        max_iter: Most iterations; a ConvergenceWarning says if they did not suffice.
        tol: Largest component of the gradient at which a fold is solved.
    """
    penalty = sample.amax(1, keepdim=True) / C  # shares are 1 / n
    problem = _Problem(features, signs, sample, mean, scale, penalty)
    parameters = features.new_zeros(len(signs), features.shape[1] + 1)
    margins = torch.zeros_like(signs)
    gradient = problem.gradient(parameters, margins)
    history: list[Pair] = []
    for _ in range(max_iter):
        if gradient.abs().max() <= tol:
            break
        step = _descent(gradient, history)
        change = problem.margins(step)
        length = _line_minimum(problem, parameters, margins, step, change)
        parameters, margins = parameters + length * step, margins + length * change
        before, gradient = gradient, problem.gradient(parameters, margins)
        history = [*history[1 - _MEMORY :], _pair(length * step, gradient - before)]
    else:
        if (left := float(gradient.abs().max())) > tol:
            warnings.warn(
                f"after {max_iter} iterations the gradient is {left:.1e}, above tol {tol:.1e}: this probe was stopped "
                "early; raise max_iter for the exact solution",
                ConvergenceWarning,
                stacklevel=3,
            )
    coef, intercept = problem.raw(parameters)
    return coef, intercept[:, 0]


def _pair(step: Steps, change: Steps) -> Pair:
    """A step, the change of the gradient over it, and the inverse of their product (0: a fold that stands still)."""
    product = (step * change).sum(1, keepdim=True)
    return step, change, torch.where(product > 0, 1 / product, 0)


def _descent(gradient: Steps, history: list[Pair]) -> Steps:
    """The L-BFGS direction (two-loop recursion), fold by fold."""
    direction, scalings = -gradient, []
    for step, change, inverse in reversed(history):
        scalings.append(inverse * (step * direction).sum(1, keepdim=True))
        direction = direction - scalings[-1] * change
    if history:
        _, change, inverse = history[-1]
        curvature = inverse * (change * change).sum(1, keepdim=True)
        direction = torch.where(curvature > 0, direction / curvature, direction)
    for (step, change, inverse), scaling in zip(history, reversed(scalings), strict=True):
        direction = direction + (scaling - inverse * (change * direction).sum(1, keepdim=True)) * step
    return direction


def _line_minimum(
    problem: _Problem,
    parameters: Steps,
    margins: Float[Tensor, "fold row"],
    step: Steps,
    change: Float[Tensor, "fold row"],
) -> Column:
    """Step length at which the loss along the step is least: Newton's method, kept inside a bracket."""
    weights, along = parameters[:, :-1], step[:, :-1]
    cross = problem.penalty * (weights * along).sum(1, keepdim=True)
    square = problem.penalty * (along * along).sum(1, keepdim=True)
    low, length = torch.zeros_like(cross), torch.ones_like(cross)
    high = torch.full_like(cross, torch.inf)
    for _ in range(_LINE_STEPS):
        at = margins + length * change
        pull = problem.pull(at)
        slope = (pull * change).sum(1, keepdim=True) + cross + length * square
        bend = (pull.abs() * torch.sigmoid(problem.signs * at) * change**2).sum(1, keepdim=True) + square
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        newton = length - slope / bend.clamp(min=torch.finfo(bend.dtype).tiny)
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        length = torch.where((newton > low) & (newton < high) & newton.isfinite(), newton, middle)
    return length
