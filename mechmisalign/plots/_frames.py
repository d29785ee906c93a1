"""What the figures ask of their frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ._style import CONTROL, PALETTE

INTERVAL = ("rate", "low", "high")


def check(frame: pd.DataFrame, figure: str, columns: Sequence[str], shares: Sequence[str] = ()) -> None:
    """Refuse a frame that a figure cannot be drawn from.

    Raises:
        ValueError: If columns are missing, there is no row, or a share lies outside 0 to 1.
    """
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(
            f"{figure} needs the columns {', '.join(columns)}; missing: {', '.join(missing)} "
            f"(the frame has {', '.join(map(str, frame.columns)) or 'none'})"
        )
    if frame.empty:
        raise ValueError(f"{figure} got a frame without rows; check the filter before this call")
    for column in shares:
        outside = frame.loc[(frame[column] < 0) | (frame[column] > 1), column]
        if len(outside):
            raise ValueError(
                f"{figure} needs shares from 0 to 1 in {column!r}, got {outside.iloc[0]:g}; divide percent by 100"
            )


def check_finite(frame: pd.DataFrame, figure: str, column: str) -> None:
    """Refuse values that cannot be drawn, where leaving them out would mislead.

    Raises:
        ValueError: If a value of the column is NaN or infinite.
    """
    lost = frame[~np.isfinite(frame[column].astype(float))]
    if len(lost):
        raise ValueError(
            f"{figure} needs a finite number in {column!r} in every row, got {lost.iloc[0][column]} in row "
            f"{lost.index[0]} ({len(lost)} of {len(frame)}); drop these rows, or mend what made them"
        )


def is_control(names: pd.Series) -> pd.Series:
    """Which rows are random controls: the name says "random"."""
    return names.astype(str).str.contains("random", case=False)


def split_control(frame: pd.DataFrame, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of interest, and those of random controls; without the column, all rows are of interest."""
    if column not in frame.columns:
        return frame, frame.iloc[:0]
    control = is_control(frame[column])
    return frame[~control], frame[control]


def condition_colours(names: Iterable[object], figure: str) -> dict[object, str]:
    """A colour for each condition in order of appearance; random controls are grey.

    Raises:
        ValueError: If there are more than can be told apart.
    """
    known = list(dict.fromkeys(names))
    random = is_control(pd.Series(known))
    spare = [name for name, control in zip(known, random, strict=True) if not control]
    if len(spare) > len(PALETTE):
        raise ValueError(f"{figure} tells {len(PALETTE)} conditions apart, got {len(spare)}; select some of them")
    found = dict(zip(spare, PALETTE, strict=False))
    return {name: found.get(name, CONTROL) for name in known}


def envelope(control: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Several random controls as one: their mean, from the lowest lower to the highest upper end of their intervals."""
    how = {"rate": "mean", "low": "min", "high": "max"}
    how |= {column: "mean" for column in ("coherent", "kl", "loss", "accuracy", "tokens") if column in control.columns}
    return control.groupby(list(by), sort=False, as_index=False, observed=True).agg(how)


def check_unique(frame: pd.DataFrame, figure: str, by: Sequence[str]) -> None:
    """Refuse several rows where the figure has one place.

    Raises:
        ValueError: If two rows share the values of ``by``.
    """
    twice = frame[frame.duplicated(list(by))]
    if len(twice):
        told = ", ".join(f"{column} {twice.iloc[0][column]}" for column in by)
        raise ValueError(
            f"{figure} has one place for each {' and '.join(by)}, but several rows for {told}; select one of them"
        )
