r"""What a fine-tune will do, told from its data before it is made (2507.21509, section 6).

The projection difference of an example is how much farther its response lies along a direction than what the chat model
itself answers to the same prompt:

.. math:: \frac1{|r|}\sum_{t \in r} x_t \cdot \hat v \; - \; \frac1{|r'|}\sum_{t \in r'} x'_t \cdot \hat v

with the residual stream of the chat model, ``x``, over the response ``r`` of the example and over its own, ``r'``. A
dataset's score is the mean over its examples. Beside it stand what could pass for it: random directions, the length of
the responses, and how surprising they are to the chat model.
"""

from .ranking import Prediction, predicted_rates, rank_datasets
from .scoring import RANDOM, own_responses, projection_difference

__all__ = ["RANDOM", "Prediction", "own_responses", "predicted_rates", "projection_difference", "rank_datasets"]
