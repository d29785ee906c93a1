"""Figures: a result in, a matplotlib ``Figure`` out.

No function here shows, writes (but for :func:`save_figure`) or estimates anything: rates come with their intervals from
:func:`mechmisalign.rates`, cosines from :mod:`mechmisalign.geometry`. Shares are 0 to 1 in the frames and percent on
the axes. Functions that draw on one pair of axes take ``ax=`` to be composed into a larger figure.
"""

from .agreements import agreement
from .bars import ablation_bars, transfer_bars
from .contributions import contribution_by_layer
from .cosines import cosine_by_layer, cosine_matrix, reliability
from .differences import difference_forest
from .downstream import downstream
from .effects import scaling_bars, site_effects
from .organisms import rate_against_coherence
from .probes import coefficient_violins, probe_scores
from .prompts import prompt_rates
from .readout import readout_table
from .saving import save_figure
from .scatter import alignment_coherence
from .semantics import semantic_shares
from .sites import b_cosine, site_heatmap
from .strengths import layer_strength_heatmap
from .sweeps import dose_response, layer_sweep
from .thresholds import threshold_curves
from .tokens import TokenHeatmap, token_heatmap

__all__ = [
    "TokenHeatmap",
    "ablation_bars",
    "agreement",
    "alignment_coherence",
    "b_cosine",
    "coefficient_violins",
    "contribution_by_layer",
    "cosine_by_layer",
    "cosine_matrix",
    "difference_forest",
    "dose_response",
    "downstream",
    "layer_strength_heatmap",
    "layer_sweep",
    "probe_scores",
    "prompt_rates",
    "rate_against_coherence",
    "readout_table",
    "reliability",
    "save_figure",
    "scaling_bars",
    "semantic_shares",
    "site_effects",
    "site_heatmap",
    "threshold_curves",
    "token_heatmap",
    "transfer_bars",
]
