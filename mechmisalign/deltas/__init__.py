"""Weight differences of full fine-tunes: how large ``ΔW = W_tuned - W_base`` is, how much of it is low-rank.

A full fine-tune has no adapter, but its difference to the chat model can be read from the two checkpoints, matrix by
matrix, without loading either model. :func:`weight_deltas` tells norms and the share of the squared norm in the largest
singular values; :func:`extract_lora` makes an adapter of the leading ones, which everything that reads, scales, ablates
or compares adapters takes; :func:`captured` tells how much of ``ΔW`` an adapter holds.
"""

from .extraction import captured, extract_lora
from .files import CheckpointError, Weights
from .tables import NEAR_ROUNDING, weight_deltas

__all__ = ["NEAR_ROUNDING", "CheckpointError", "Weights", "captured", "extract_lora", "weight_deltas"]
