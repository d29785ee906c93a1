"""Directions from and to other tools, and activations as numpy arrays.

Everywhere here layer ``i`` is the residual stream after block ``i``, counted from 0. Other tools count otherwise; each
reader says in its docstring how, and keeps what it was told in the header. Nothing is ever unpickled: files of torch
are read with ``weights_only=True``, and anything that needs more is refused.

| tool | how it counts | here |
|---|---|---|
| persona-vectors ``.pt`` | row ``k`` is ``hidden_states[k]``, row 0 the embedding | ``read_persona_vectors`` |
| ModelOrganismsForEM vectors | the block whose ``mlp.down_proj`` output is moved | ``read_steering_vector`` |
| repeng, llama.cpp (GGUF) | ``direction.k`` is added after block ``k``; llama.cpp has no 0 | ``read_gguf`` |
| steering-vectors (the library) | the block whose output is moved | ``from_layer_activations`` |
| lm-eval ``steered`` | ``layers.k`` is the output of block ``k`` | ``read_lm_eval`` |
"""

from ._reading import UnsafeFileError
from .arrays import Activations, activations
from .control_vectors import read_gguf, write_gguf
from .lm_eval import read_lm_eval, write_lm_eval
from .per_block import from_layer_activations, layer_activations
from .persona_vectors import read_persona_vectors, write_persona_vectors
from .steering_vectors import read_steering_vector, write_steering_vector

__all__ = [
    "Activations",
    "UnsafeFileError",
    "activations",
    "from_layer_activations",
    "layer_activations",
    "read_gguf",
    "read_lm_eval",
    "read_persona_vectors",
    "read_steering_vector",
    "write_gguf",
    "write_lm_eval",
    "write_persona_vectors",
    "write_steering_vector",
]
