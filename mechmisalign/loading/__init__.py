"""From names and files to a model in memory: the parts of ``load_organism``.

``reading`` takes apart what was given, ``bases`` finds the chat model, ``fitting`` refuses an adapter that does not
belong to it before anything is loaded, ``placing`` reads the weights onto their device, ``merging`` folds the adapter
in or attaches it, and takes it out again, ``switching`` lends the model to another adapter, ``full_models`` loads a
full fine-tune, ``origins`` finds what it was tuned from, ``alike`` compares the two, ``swapping`` puts the chat model's
weights in its place for a while.
"""

from .bases import Base
from .fitting import AdapterMismatchError
from .merging import BaseMatrices

__all__ = ["AdapterMismatchError", "Base", "BaseMatrices"]
