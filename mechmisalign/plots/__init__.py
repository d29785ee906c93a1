"""Figures: a result in, a matplotlib ``Figure`` out.

No function here shows, writes (but for :func:`save_figure`) or estimates anything: rates come with their intervals from
:func:`mechmisalign.rates`, cosines from :mod:`mechmisalign.geometry`. Shares are 0 to 1 in the frames and percent on
the axes. Functions that draw on one pair of axes take ``ax=`` to be composed into a larger figure.
"""

from .bars import ablation_bars, transfer_bars
from .contributions import contribution_by_layer
from .cosines import cosine_by_layer, cosine_matrix, reliability
from .downstream import downstream
from .effects import scaling_bars, site_effects
from .probes import coefficient_violins, probe_scores
from .readout import readout_table
from .saving import save_figure
from .scatter import alignment_coherence
from .sites import b_cosine, site_heatmap
from .sweeps import dose_response, layer_sweep
from .tokens import TokenHeatmap, token_heatmap

__all__ = [
    "TokenHeatmap",
    "ablation_bars",
    "alignment_coherence",
    "b_cosine",
    "coefficient_violins",
    "contribution_by_layer",
    "cosine_by_layer",
    "cosine_matrix",
    "dose_response",
    "downstream",
    "layer_sweep",
    "probe_scores",
    "readout_table",
    "reliability",
    "save_figure",
    "scaling_bars",
    "site_effects",
    "site_heatmap",
    "token_heatmap",
    "transfer_bars",
]
