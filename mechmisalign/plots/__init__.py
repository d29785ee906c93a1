"""Figures: a result in, a matplotlib ``Figure`` out.

No function here shows, writes (but for :func:`save_figure`) or estimates anything: rates come with their intervals from
:func:`mechmisalign.rates`, cosines from :mod:`mechmisalign.geometry`. Shares are 0 to 1 in the frames and percent on
the axes. Functions that draw on one pair of axes take ``ax=`` to be composed into a larger figure.
"""

from .agreements import agreement
from .bars import ablation_bars, transfer_bars
from .contributions import contribution_by_layer
from .correction import comeback, cure_panels, prevention
from .cosines import cosine_by_layer, cosine_matrix, reliability
from .deltas import delta_shares
from .differences import difference_forest
from .downstream import downstream
from .dynamics import (
    behaviour_over_steps,
    local_cosines,
    norms_by_step,
    path_plane,
    similarity_to_end,
)
from .effects import scaling_bars, site_effects
from .geometry import overlap_against_null, pair_matrix, principal_angles
from .monitoring import auroc_by_domain, auroc_by_tokens, monitor_scores, roc_curves, score_drift
from .organisms import rate_against_coherence
from .paths import cone_rates, interpolation_path
from .prediction import dataset_ranking, predictor_ranks, score_histogram, trait_watch
from .probes import coefficient_violins, probe_scores
from .prompts import prompt_rates
from .readout import readout_table
from .saving import save_figure
from .scatter import alignment_coherence
from .semantics import semantic_shares
from .sites import b_cosine, site_heatmap
from .solutions import (
    drift_over_steps,
    joint_paths,
    kl_against_norm,
    kl_sweep,
    loss_against_norm,
    multiplier_curves,
    noise_curves,
)
from .spectra import effective_rank, spectrum
from .strengths import layer_strength_heatmap
from .sweeps import dose_response, layer_sweep
from .thresholds import threshold_curves
from .tokens import TokenHeatmap, token_heatmap
from .training import training_log
from .transitions import transition

__all__ = [
    "TokenHeatmap",
    "ablation_bars",
    "agreement",
    "alignment_coherence",
    "auroc_by_domain",
    "auroc_by_tokens",
    "b_cosine",
    "behaviour_over_steps",
    "coefficient_violins",
    "cone_rates",
    "comeback",
    "contribution_by_layer",
    "cosine_by_layer",
    "cosine_matrix",
    "cure_panels",
    "dataset_ranking",
    "delta_shares",
    "difference_forest",
    "dose_response",
    "downstream",
    "drift_over_steps",
    "effective_rank",
    "interpolation_path",
    "joint_paths",
    "kl_against_norm",
    "kl_sweep",
    "layer_strength_heatmap",
    "layer_sweep",
    "local_cosines",
    "loss_against_norm",
    "multiplier_curves",
    "noise_curves",
    "norms_by_step",
    "path_plane",
    "monitor_scores",
    "predictor_ranks",
    "prevention",
    "overlap_against_null",
    "pair_matrix",
    "principal_angles",
    "probe_scores",
    "prompt_rates",
    "rate_against_coherence",
    "readout_table",
    "reliability",
    "roc_curves",
    "save_figure",
    "scaling_bars",
    "score_drift",
    "score_histogram",
    "semantic_shares",
    "similarity_to_end",
    "site_effects",
    "site_heatmap",
    "spectrum",
    "threshold_curves",
    "token_heatmap",
    "trait_watch",
    "transfer_bars",
    "training_log",
    "transition",
]
