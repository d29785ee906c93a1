"""Moments: how many tokens, which mean, which typical norm, for each group of tokens and each layer.

Groups are finer than classes on purpose: grouped by ``["label", "prompt_id"]``, the same object gives the class means
(merge the groups), prompt-matched differences (pair them), and honest intervals (resample the prompts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Token-weighted statistics of the residual stream.

    Attributes:
        groups: One row per group: the grouping columns (the first is the class), then ``tokens``, the group's count.
        mean: Mean activation of each group, ``[group layer d_model]``, float64.
        norm: Mean Euclidean norm of an activation, ``[group layer]``, float64.
        layers: The layers that were read; layer ``i`` is the residual stream after block ``i``.
        header: Where the numbers come from: model, adapter, span, hook, template, data, versions.
    """

    groups: pd.DataFrame
    mean: Float64[Tensor, "group layer d_model"]
    norm: Float64[Tensor, "group layer"]
    layers: tuple[int, ...]
    header: Mapping[str, Any]

    @property
    def by(self) -> list[str]:
        """The grouping columns, class first."""
        return [column for column in self.groups.columns if column != "tokens"]

    @property
    def tokens(self) -> Float64[Tensor, " group"]:
        """Token count of each group."""
        return torch.from_numpy(self.groups["tokens"].to_numpy(np.float64, copy=True))

    def take(self, rows: Sequence[int] | np.ndarray) -> Moments:
        """The groups at ``rows``, in that order; a row named twice counts twice (this is how a bootstrap resamples)."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        groups = self.groups.iloc[np.asarray(rows, dtype=np.int64)].reset_index(drop=True)
        return replace(self, groups=groups, mean=self.mean[index], norm=self.norm[index])

    def of(self, label: Any) -> Moments:
        """The groups of one class (a value of the first grouping column).

        Raises:
            ValueError: If no group has that class.
        """
        column = self.groups[self.by[0]]
        rows = np.flatnonzero(column == label)
        if not len(rows):
            known = ", ".join(repr(value) for value in column.unique())
            raise ValueError(f"no tokens with {self.by[0]} = {label!r}; these moments know {known}")
        return self.take(rows)

    def features(self) -> Iterator[tuple[int, Float64[np.ndarray, "group d_model"]]]:
        """Each layer with the groups' means as rows: what :func:`mechmisalign.probes.evaluate_layers` takes.

        Collected by class, prompt and sample, a row is one answer; labels and prompts are columns of ``groups``.
        """
        for place, layer in enumerate(self.layers):
            yield layer, self.mean[:, place].numpy()

    def pooled(self) -> Float64[Tensor, "layer d_model"]:
        """Mean over all tokens of all groups."""
        return torch.einsum("g,gld->ld", self.tokens, self.mean) / self.tokens.sum()

    def pooled_norm(self) -> Float64[Tensor, " layer"]:
        """Mean residual norm over all tokens of all groups: the unit of relative steering strengths."""
        return torch.einsum("g,gl->l", self.tokens, self.norm) / self.tokens.sum()


def align_groups(first: Moments, second: Moments) -> tuple[Moments, Moments]:
    """Both moments with their groups in the same order, for differences over the same text.

    Raises:
        ValueError: If the two do not hold the same groups with the same token counts, or other layers.
    """
    if first.layers != second.layers:
        raise ValueError(f"layers differ: {first.layers} and {second.layers}; collect both with the same `layers`")
    if first.by != second.by:
        raise ValueError(f"groups differ: {first.by} and {second.by}; collect both with the same `by`")
    keys = [pd.MultiIndex.from_frame(moments.groups) for moments in (first, second)]
    position = keys[1].get_indexer(keys[0]) if keys[1].is_unique else np.full(len(keys[0]), -1)
    if len(keys[0]) != len(keys[1]) or (position < 0).any():
        raise ValueError("the two moments are not over the same text: collect both from the same conversations")
    return first, second.take(position)
