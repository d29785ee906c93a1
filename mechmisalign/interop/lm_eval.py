"""The ``steered`` model of lm-evaluation-harness: a ``.pt`` file of hook points, vectors, coefficients and actions.

``{"layers.12": {"steering_vector": float[d_model], "steering_coefficient": 4.0, "action": "add", "bias": None}}``. A
hook point is a module inside ``model.base_model``, so ``layers.k`` is the output of block ``k``: layer ``k`` here.
``add`` is ``x + coefficient · vector`` (:class:`mechmisalign.Steer`), ``clamp`` sets the component along the unit
vector to the coefficient (:class:`mechmisalign.Clamp`). Its CSV files name features of sparse autoencoders instead of
vectors; they need those libraries, and are not read here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechmisalign._writing import whole
from mechmisalign.directions import Direction
from mechmisalign.interventions import Clamp, Steer

from ._reading import Model, imported, read_torch, vectors

_HOOK = re.compile(r"(?P<prefix>(?:[a-z_]+\.)*)layers\.(?P<layer>\d+)")


def read_lm_eval(path: str | Path, *, model: Model | None = None) -> tuple[Steer | Clamp, ...]:
    """Interventions from a steering file of the harness: what ``organism.apply(*…)`` takes.

    Args:
        path: The ``.pt`` file.
        model: The base, for the header: a name, or ``organism.provenance``.

    Returns:
        One ``Steer`` for all added vectors (coefficients multiplied in), then one ``Clamp`` for each value.

    Raises:
        UnsafeFileError: If the file holds anything but tensors, numbers and text.
        ValueError: If a hook point is not the output of a block, or an entry has what the interventions here cannot say
            (a head, a bias).

    Example:
        >>> with organism.apply(*read_lm_eval("steer.pt")): ...  # doctest: +SKIP
    """
    if Path(path).suffix == ".csv":
        raise ValueError(
            f"{path} names features of sparse autoencoders; save their vectors as a .pt file of the harness"
        )
    stored = read_torch(path)
    if not isinstance(stored, Mapping) or not stored:
        raise ValueError(f"{path} holds a {type(stored).__name__}; a dict of hook points is expected")
    added: dict[int, Tensor] = {}
    clamped: dict[float, dict[int, Tensor]] = defaultdict(dict)
    for hook, entry in stored.items():
        layer, vector, coefficient, action = _entry(str(hook), entry, Path(path))
        if action == "add":
            added[layer] = vector * coefficient
        else:
            clamped[coefficient][layer] = vector
    steps: list[Steer | Clamp] = []
    if added:
        steps.append(Steer(imported(added, "lm-eval steered model, added", Path(path), model)))
    for value, rows in clamped.items():
        steps.append(Clamp(imported(rows, "lm-eval steered model, clamped", Path(path), model), value=value))
    return tuple(steps)


def write_lm_eval(
    steps: Steer | Clamp | Direction | Sequence[Steer | Clamp], path: str | Path, *, prefix: str = ""
) -> Path:
    """Write interventions for ``lm_eval --model steered --model_args pretrained=BASE,steer_path=FILE``.

    Args:
        steps: ``Steer`` and ``Clamp`` on all positions (or on all but the attention sink, which the harness cannot
            leave out: compare the logits on a model that has one), each layer once; a direction is steered with
            strength 1.
        path: The ``.pt`` file.
        prefix: What stands before ``layers.k`` among the modules of ``model.base_model``, such as ``"language_model."``
            in a multimodal wrapper; nothing in a text model.

    Raises:
        ValueError: If a layer is edited twice, only some positions are meant, or a strength is one per row.
        TypeError: On another kind of intervention.
    """
    given = [Steer(steps)] if isinstance(steps, Direction) else [steps] if isinstance(steps, (Steer, Clamp)) else steps
    entries: dict[str, dict[str, Any]] = {}
    for step in given:
        for layer in _checked(step).edited_layers:
            name = f"{prefix}layers.{layer}"
            if name in entries:
                raise ValueError(f"layer {layer} is edited twice; the harness has one edit for each hook point")
            entries[name] = _stored(step, layer)
    if not entries:
        raise ValueError("there is nothing to write: no layer is edited")
    with whole(Path(path)) as partial:
        torch.save(entries, partial)
    return Path(path)


def _entry(hook: str, entry: Any, path: Path) -> tuple[int, Tensor, float, str]:
    match = _HOOK.fullmatch(hook)
    if match is None:
        raise ValueError(
            f"{path} hooks {hook!r}; only the output of a block (layers.<k>) is a place of a direction here"
        )
    if not isinstance(entry, Mapping) or not {"steering_vector", "action"} <= entry.keys():
        raise ValueError(f"{hook} of {path} has no steering_vector and action; it is no steering file of the harness")
    if entry["action"] not in ("add", "clamp"):
        raise ValueError(f"{hook} of {path} has the action {entry['action']!r}; 'add' or 'clamp' are expected")
    for key, why in (("head_index", "acts on one attention head"), ("bias", "is clamped around a bias")):
        if entry.get(key) is not None:
            raise ValueError(
                f"{hook} of {path} {why} ({key} is set), which a direction of the residual stream cannot say"
            )
    coefficient = entry.get("steering_coefficient", 1.0)
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
        raise ValueError(f"steering_coefficient of {hook} of {path} is {coefficient!r}; a number is expected")
    vector = vectors(entry["steering_vector"], 1, f"{hook} of {path}")
    return int(match["layer"]), vector, float(coefficient), str(entry["action"])


def _checked(step: Any) -> Steer | Clamp:
    if not isinstance(step, (Steer, Clamp)):
        raise TypeError(f"{type(step).__name__} cannot be said to the harness; Steer and Clamp can")
    if step.positions in ("prompt", "response"):
        raise ValueError(f"positions={step.positions!r}: the harness steers every position; use positions='all'")
    return step


def _stored(step: Steer | Clamp, layer: int) -> dict[str, Any]:
    terms = step.terms(layer)
    if terms is None:
        raise ValueError("a strength per row cannot be said to the harness; give one number")
    if terms.add is not None:
        return {"steering_vector": terms.add.clone(), "steering_coefficient": 1.0, "action": "add", "bias": None}
    unit = step.direction.unit(layer).clone()
    return {"steering_vector": unit, "steering_coefficient": terms.value, "action": "clamp", "bias": None}
