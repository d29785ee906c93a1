"""Whether an adapter fits a base: checked against its skeleton, before a weight is loaded or changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mechmisalign.adapters import Adapter, AdapterError, LoraSite

from .bases import Base


class AdapterMismatchError(AdapterError):
    """An adapter does not belong to this base model."""


def check_fits(adapter: Adapter, model: Any, base: Base, *, merging: bool, claimed: bool) -> None:
    """Refuse an adapter that this base cannot carry, before anything of either is changed.

    Args:
        adapter: The adapter.
        model: The base, with or without weights.
        base: What it is called.
        merging: Whether the adapter is to be folded into the weights.
        claimed: Whether the sites must be exactly those that the adapter's config claims.

    Raises:
        AdapterMismatchError: On matrices that the base lacks or has in another shape, and on missing or extra sites.
        ValueError: On a base that already carries an adapter or belongs to another organism, or is quantised.
    """
    if merging and getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"{base.name!r} is quantised, and an update cannot be folded into quantised weights; pass the unquantised "
            "model as base=, or use weights='live'"
        )
    modules = dict(model.named_modules())
    if base.peft_model is not None:
        modules |= {name: module.base_layer for name, module in modules.items() if hasattr(module, "base_layer")}
    if any(hasattr(module, "original_component") or hasattr(module, "base_layer") for module in modules.values()):
        raise ValueError(
            f"{base.name!r} already carries an adapter or belongs to another organism; pass a freshly loaded model"
        )
    for site in adapter.sites:
        _check_site(site, modules.get(site.name), adapter, base)
    if claimed:
        _check_claims(adapter, modules)


def _check_site(site: LoraSite, module: Any, adapter: Adapter, base: Base) -> None:
    about = f"the adapter {adapter.source!r} (trained on {adapter.base!r}) does not fit {base.name!r}"
    if module is None:
        raise AdapterMismatchError(f"{about}: there is no {site.name!r}; pass base=, the model that it was trained on")
    if not isinstance(module, nn.Linear) and not all(hasattr(module, name) for name in ("in_features", "out_features")):
        raise AdapterMismatchError(f"{about}: {site.name!r} is a {type(module).__name__}, a Linear is expected")
    if (module.out_features, module.in_features) != (site.d_out, site.d_in):
        raise AdapterMismatchError(
            f"{about}: {site.name!r} is {[module.out_features, module.in_features]} in the model and "
            f"{[site.d_out, site.d_in]} in the adapter; pass the model that it was trained on as base="
        )


def _check_claims(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """The sites in the file are those that the config targets in this base, as PEFT matches them."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = adapter.config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    chosen = ("exclude_modules", "layers_to_transform", "layers_pattern")
    config = LoraConfig(target_modules=targets, **{key: adapter.config.get(key) for key in chosen})
    linear = (adapter.peft_name(name) for name, module in modules.items() if isinstance(module, nn.Linear))
    claimed = {name for name in linear if check_target_module_exists(config, name)}
    found = {adapter.peft_name(site.name) for site in adapter.sites}
    if claimed - found:
        raise AdapterMismatchError(
            f"{adapter.source!r} lacks {_some(claimed - found)}, which its config targets in this base: the file is "
            "incomplete or the base another; copy the adapter again"
        )
    if found - claimed:
        raise AdapterMismatchError(
            f"{adapter.source!r} holds {_some(found - claimed)}, which its config does not target: PEFT would ignore "
            "it in silence; the config and the weights belong to different adapters"
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
