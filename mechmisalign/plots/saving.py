"""A figure and the table behind it, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

DPI = 200
_UNDATED = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
"""Metadata without which the same figure gives the same file."""


def save_figure(
    figure: Figure, table: pd.DataFrame, folder: str | Path, name: str, *, endings: Sequence[str] = ("pdf", "png")
) -> Path:
    """Write ``name.csv`` and the figure as PDF and PNG in ``folder``, each whole or not at all.

    Args:
        figure: What to draw.
        table: The frame it was drawn from: enough to draw it again without a model.
        folder: Made if it is not there.
        name: File name without ending.
        endings: Kinds of picture to write, the PNG among them.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: If the name is a path.
    """
    from mechmisalign._writing import whole

    if not name or Path(name).name != name:
        raise ValueError(f"a figure's name is one file name without folders, got {name!r}; pass the folder as folder=")
    folder = Path(folder)
    numbered = isinstance(table.index, pd.RangeIndex)
    with whole(folder / f"{name}.csv") as partial:
        table.to_csv(partial, index=not numbered)
    with mpl.rc_context({"pdf.fonttype": 42}):  # text stays text in the PDF
        for ending in endings:
            with whole(folder / f"{name}.{ending}") as partial:
                figure.savefig(partial, format=ending, dpi=DPI, metadata=_UNDATED[ending])
    return folder / f"{name}.png"
