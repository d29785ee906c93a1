"""Combining adapters: weighted sums of updates, exact, as one more LoRA.

``Σ wᵢ ΔWᵢ`` is again of low rank: its factors are those of the parts, one under the other, so a site of the sum has the
sum of their ranks. This is ``add_weighted_adapter(combination_type="cat")`` of PEFT, without a model, and it also holds
where that (PEFT 0.21) goes wrong in silence: for rank-stabilised LoRA, which comes out too long by the square root of
the rank, and for layers that ``layers_to_transform`` of the first adapter does not name, which are left out.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .adapters import Adapter, AdapterError, LoraSite


def interpolate(first: Adapter, second: Adapter, t: float) -> Adapter:
    """The adapter ``(1 - t) ΔW₁ + t ΔW₂``: the first at 0, the second at 1, beyond them an extrapolation (2511.02022).

    A site that only one of them has stays in with its weight.

    Args:
        first: Where the path begins.
        second: Where it ends; on the same base.
        t: The place on the path, any finite number.

    Raises:
        AdapterError: If the two belong to different bases or shapes.
        ValueError: If ``t`` is not finite.

    Example:
        >>> halfway = interpolate(Adapter.load("pocket/medical"), Adapter.load("pocket/finance"), 0.5)
        >>> [(site.label, site.rank) for site in halfway.sites]
        [('1.down_proj', 2)]
    """
    if first is second:
        return combine({first: 1.0})
    return combine({first: 1.0 - t, second: t})


def combine(weights: Mapping[Adapter, float]) -> Adapter:
    """The adapter whose update is the weighted sum of theirs, site by site.

    Weight and scaling go into A, and B keeps the columns as they were trained. An adapter with the weight 0 is left
    out, with the sites that only it has.

    Args:
        weights: Adapters on one base, each with its weight.

    Raises:
        AdapterError: If they belong to different bases, or to different shapes of one matrix.
        ValueError: If a weight is not finite, or none differs from 0.
    """
    bad = [weight for weight in weights.values() if not math.isfinite(weight)]
    if bad:
        raise ValueError(f"a weight is {bad[0]}; finite numbers are expected")
    used = {adapter: weight for adapter, weight in weights.items() if weight}
    if not used:
        raise ValueError(f"the weights {list(weights.values())} leave no update; for none at all use the chat model")
    base, revision = one_base(used)
    parts: dict[str, list[LoraSite]] = {}
    for adapter, weight in used.items():
        for site in adapter.sites:
            parts.setdefault(site.name, []).append(_weighted(site, weight))
    sites = sorted((_stacked(each) for each in parts.values()), key=lambda site: (site.layer, site.module, site.name))
    return Adapter(
        sites=tuple(sites),
        base=base,
        source=" + ".join(f"{weight:g} * {_named(adapter)}" for adapter, weight in used.items()),
        revision=None,
        digest=_digest(sites),
        config=_config(sites, base, revision),
        wrapper=next(iter(used)).wrapper,
    )


def one_base(adapters: Iterable[Adapter]) -> tuple[str, str | None]:
    """Name and revision of the base that all of them were trained on.

    Raises:
        AdapterError: If there are several.
    """
    found = dict.fromkeys((adapter.base, adapter.config.get("revision")) for adapter in adapters)
    if len(found) != 1:
        raise AdapterError(
            f"adapters on different bases (name, revision): {list(found)}; updates of different matrices cannot be "
            "compared or added. If the bases are the same model, say so: dataclasses.replace(adapter, base=…, config=…)"
        )
    return next(iter(found))


def _weighted(site: LoraSite, weight: float) -> LoraSite:
    A = (site.A.double() * (weight * site.scaling)).float()
    return LoraSite(site.layer, site.module, site.name, A, site.B.float(), 1.0)


def _stacked(parts: list[LoraSite]) -> LoraSite:
    first = parts[0]
    shapes = {(part.d_out, part.d_in) for part in parts}
    if len(shapes) > 1:
        raise AdapterError(f"{first.name!r} has the shapes {sorted(shapes)} in these adapters; one base has one shape")
    A, B = torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts], dim=1)
    return LoraSite(first.layer, first.module, first.name, A, B, 1.0)


def _named(adapter: Adapter) -> str:
    return f"({adapter.source})" if " + " in adapter.source or " * " in adapter.source else adapter.source


def _digest(sites: Iterable[LoraSite]) -> str:
    digest = hashlib.sha256()
    for site in sites:
        digest.update(site.name.encode() + site.A.numpy().tobytes() + site.B.numpy().tobytes())
    return digest.hexdigest()


def _config(sites: Iterable[LoraSite], base: str, revision: str | None) -> dict[str, Any]:
    """A config of PEFT that claims exactly these sites: alpha is the rank everywhere, so the scaling is 1."""
    ranks = {site.name: site.rank for site in sites}
    rank = max(ranks.values())
    others = {re.escape(name): own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(ranks),
    }
