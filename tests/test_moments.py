import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from mechmisalign.moments import Moments, align_groups
from mechmisalign.probes import MeanDifferenceProbe, evaluate_layers


def made_moments(labels=("bad", "good"), prompts=4, layers=2, width=5, seed=0) -> Moments:
    """Random moments grouped by label and prompt."""
    rng = np.random.default_rng(seed)
    groups = pd.DataFrame(
        [(label, f"p{p}") for label in labels for p in range(prompts)], columns=["label", "prompt_id"]
    )
    mean = torch.from_numpy(rng.normal(size=(len(groups), layers, width)))
    norm = mean.norm(dim=-1)
    return Moments(
        groups.assign(tokens=rng.integers(1, 9, len(groups))), mean, norm, tuple(range(layers)), {"model": "m"}
    )


def test_pooled_mean_is_the_mean_over_tokens_not_over_groups():
    moments = made_moments()
    weights = moments.groups["tokens"].to_numpy()
    for layer in moments.layers:
        assert_close(
            moments.pooled()[layer],
            torch.from_numpy(np.average(moments.mean[:, layer].numpy(), axis=0, weights=weights)),
        )


def test_a_group_taken_twice_counts_twice():
    moments = made_moments()
    twice = moments.take([0, 0, 1])
    tokens = moments.tokens
    expected = (2 * tokens[0] * moments.mean[0] + tokens[1] * moments.mean[1]) / (2 * tokens[0] + tokens[1])
    assert_close(twice.pooled(), expected)


def test_an_unknown_class_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'ugly'; these moments know 'bad', 'good'"):
        made_moments().of("ugly")


def test_groups_in_another_order_are_aligned():
    moments = made_moments()
    shuffled = moments.take([3, 1, 0, 2, 7, 6, 5, 4])
    first, second = align_groups(moments, shuffled)
    assert_close(first.mean, second.mean)


def test_moments_over_other_text_are_not_aligned():
    with pytest.raises(ValueError, match="not over the same text"):
        align_groups(made_moments(), made_moments(seed=1))


def test_features_are_the_groups_means_layer_by_layer_and_feed_a_probe():
    generator = torch.Generator().manual_seed(0)
    groups = pd.DataFrame({"label": ["a", "b"] * 20, "prompt_id": [f"p{i // 4}" for i in range(40)], "tokens": 3})
    mean = torch.randn(40, 2, 5, generator=generator, dtype=torch.float64)
    mean[1::2, 1] += 4.0  # the classes part in layer 7 only
    moments = Moments(groups, mean, torch.ones(40, 2, dtype=torch.float64), (3, 7), {})
    layers = dict(moments.features())
    assert list(layers) == [3, 7] and np.array_equal(layers[7], mean[:, 1].numpy())
    table = evaluate_layers(
        moments.features(), groups["label"], groups["prompt_id"], probe=MeanDifferenceProbe(), repeats=5
    )
    auroc = table.query("metric == 'auroc' and series == 'probe'").set_index("layer")["score"]
    assert auroc[7] > 0.95 > auroc[3]
