"""Tables of features: checked once, then read in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Shaped


def as_matrix(features: Any) -> tuple[Float[np.ndarray, "row feature"], list[str]]:
    """Features as a C-ordered float array, and their names; float32 and float64 stay what they are.

    Raises:
        ValueError: If they are no table, or hold NaN or infinite values.
    """
    names = [str(name) for name in features.columns] if isinstance(features, pd.DataFrame) else None
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu() if features.dtype == torch.float64 else features.detach().cpu().float()
    array = np.asarray(features)
    if array.ndim != 2:
        raise ValueError(f"features must be [row feature], got shape {array.shape}; for one feature write x[:, None]")
    matrix = np.ascontiguousarray(array, dtype=array.dtype if array.dtype == np.float64 else np.float32)
    if not tensor(matrix).sum().isfinite() and (bad := int((~np.isfinite(matrix)).any(axis=1).sum())):
        raise ValueError(
            f"{bad} of {len(matrix)} rows of the features hold NaN or infinite values; drop them, or look for an "
            "overflow where they were collected (float16?)"
        )
    return matrix, names or [f"x{column}" for column in range(matrix.shape[1])]


def tensor(array: Shaped[np.ndarray, ...]) -> torch.Tensor:
    """The array as a tensor, in place where the memory may be shared."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def moments(
    features: Float[np.ndarray, "row feature"],
    shares: Float[np.ndarray, "fold row"],
    *,
    variances: bool = False,
    block: int = 2048,
) -> tuple[Float64[np.ndarray, "fold feature"], Float64[np.ndarray, "fold feature"]]:
    """Weighted means, and variances if asked for (else zeros), in one pass over blocks of rows.

    The blocks are shifted by a common offset, which would otherwise eat the digits of float32, and summed in float64.
    """
    sample, data = torch.from_numpy(shares), tensor(features)
    shift = data[:block].mean(0)
    first = torch.zeros(len(shares), data.shape[1], dtype=torch.float64)
    second = torch.zeros_like(first)
    for start in range(0, len(data), block):
        rows, share = data[start : start + block] - shift, sample[:, start : start + block]
        first += share @ rows
        if variances:
            second += share @ rows.square_()
    return (first + shift).numpy(), (second - first**2).clamp(min=0).numpy()
