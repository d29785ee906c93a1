"""Frames as they come from elsewhere, in the form that the rest of the package counts on."""

from __future__ import annotations

import pandas as pd


def plain_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows under 0, 1 …, with categorical columns as the values that they hold.

    A categorical column still groups by categories whose rows have been filtered out, and sorts by their order.
    """
    typed = [name for name, dtype in frame.dtypes.items() if isinstance(dtype, pd.CategoricalDtype)]
    plain = frame.reset_index(drop=True)
    return plain.assign(**{str(name): plain[name].to_numpy() for name in typed}) if typed else plain
