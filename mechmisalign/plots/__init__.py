"""Figures: a result in, a matplotlib ``Figure`` out.

No function here shows, writes (but for :func:`save_figure`) or estimates anything: rates come with their intervals from
:func:`mechmisalign.rates`, cosines from :mod:`mechmisalign.geometry`. Shares are 0 to 1 in the frames and percent on
the axes. Functions that draw on one pair of axes take ``ax=`` to be composed into a larger figure.
"""

from .bars import ablation_bars, transfer_bars
from .cosines import cosine_by_layer, cosine_matrix, reliability
from .saving import save_figure
from .scatter import alignment_coherence
from .sweeps import dose_response, layer_sweep

__all__ = [
    "ablation_bars",
    "alignment_coherence",
    "cosine_by_layer",
    "cosine_matrix",
    "dose_response",
    "layer_sweep",
    "reliability",
    "save_figure",
    "transfer_bars",
]
