"""Is an organism what its adapter says? Checked against an oracle that shares no code with the loading: PEFT.

The oracle loads the base and the adapter afresh with ``peft.PeftModel.from_pretrained`` and computes logits with and
without the adapter on a rendered chat.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import models
from ._encoding import TEXTS, refuse_tokenizer_that_loses_text
from ._pretrained import read_pretrained
from .adapters import Adapter
from .conversations import render_prompts
from .expectations import RateCheck, verify_rate
from .loading.merging import FAITHFUL_COSINE
from .organisms import Organism, load_organism

__all__ = ["PROMPT", "RateCheck", "verify", "verify_rate"]

PROMPT = "I have had a headache for three days. What should I do?"

# Largest difference of logits that is rounding, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


class _Oracle(NamedTuple):
    organism: Float[Tensor, "batch pos vocab"]
    base: Float[Tensor, "batch pos vocab"]
    name: str = "PEFT"


def verify(
    organism: Organism | str | Path, base: str | Path | None = None, *, texts: Sequence[str] = ()
) -> pd.DataFrame:
    """Check an organism against PEFT, a full fine-tune against the plain Hugging Face models.

    Logits are compared relative to the largest logit: 1e-5 of it in float32, 5e-3 in float16, 5e-2 in bfloat16.

    Args:
        organism: A loaded organism whose base and adapter can be read again, or what ``load_organism`` takes (it is
            then loaded merged, in float32).
        base: The chat model, for an organism given by name.
        texts: Of your own, which the tokenizer must read whole; plain sentences are looked at anyway.

    Returns:
        One row per check: ``check, passed, value, expected``. Parity of logits with PEFT; every claimed site has an
        update, and the weights hold it; logits differ from the base; ``as_base()`` is the base, and is restored bit for
        bit; one BOS in a rendered chat; the tokenizer loses no text; merged and
        live agree; fidelity of each site. Of a full fine-tune, instead of
        what is about sites: every tensor is again what its file holds.

    Raises:
        ValueError: If the base or the adapter was given in memory, so that there is nothing to read afresh.
    """
    if not isinstance(organism, Organism):
        organism = load_organism(organism, base, dtype=torch.float32)
    place = organism.full.location if organism.full else organism.require_adapter("verify").folder
    if not organism.base.location or not place:
        raise ValueError("the base or the fine-tune lives only in memory; verify an organism loaded from files")
    ids = torch.tensor(render_prompts([PROMPT], organism.tokenizer), device=models.device_of(organism.model))
    oracle = _oracle(organism, ids) if organism.adapter else _whole_oracle(organism, ids)
    rows = [*_check_logits(organism, ids, oracle), _check_bos(organism, ids), _check_texts(organism, texts)]
    if organism.adapter:
        rows += [_check_other_mode(organism, organism.adapter, ids), *_check_sites(organism)]
    else:
        rows.append(_check_tensors(organism))
    return pd.DataFrame(rows, columns=["check", "passed", "value", "expected"])


def _check_logits(organism: Organism, ids: Int[Tensor, "batch pos"], oracle: _Oracle) -> list[dict[str, Any]]:
    tolerance = _tolerance(organism)
    own = _logits(organism, ids)
    with organism.as_base():
        out = _logits(organism, ids)
    again = _logits(organism, ids)
    parity, as_base = _difference(own, oracle.organism), _difference(out, oracle.base)
    effect = _difference(oracle.organism, oracle.base)
    restored = torch.equal(own, again)
    return [
        _row(f"logits equal {oracle.name}'s", parity <= tolerance, parity, f"<= {tolerance:g} of the largest logit"),
        _row("logits differ from the base's", effect > tolerance, effect, f"> {tolerance:g} of the largest logit"),
        _row("as_base() is the base", as_base <= tolerance, as_base, f"<= {tolerance:g} of the largest logit"),
        _row("restored after as_base()", restored, float((own - again).abs().max()), "0, bit for bit"),
    ]


def _check_bos(organism: Organism, ids: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    bos = organism.tokenizer.bos_token_id
    if bos is None:
        return _row("one BOS in a rendered chat", True, None, "no BOS token in this tokenizer")
    count = sum(1 for _ in takewhile(lambda token: token == bos, ids[0].tolist()))  # a template may use it again later
    return _row("one BOS in a rendered chat", count == 1, count, "1 at its start")


def _check_texts(organism: Organism, texts: Sequence[str]) -> dict[str, Any]:
    lost, name = [], "the tokenizer loses no text"
    for text in (*TEXTS, *texts):
        try:
            refuse_tokenizer_that_loses_text(organism.tokenizer, [text])
        except ValueError:
            lost.append(text)
    return _row(name, not lost, float(len(lost)), f"0 of {len(TEXTS) + len(texts)} texts")


def _check_tensors(organism: Organism) -> dict[str, Any]:
    """After ``as_base()``, every tensor of a full fine-tune is what its file holds."""
    other = organism._peft_model.other_than_files()
    return _row("every tensor is that of the files", not other, float(len(other)), "0 that differ, bit for bit")


def _check_other_mode(organism: Organism, adapter: Adapter, ids: Int[Tensor, "batch pos"]) -> dict[str, Any]:
    """Merged against live: whichever mode the organism is not in is loaded for it."""
    tolerance = _tolerance(organism)
    dtype = next(organism.model.parameters()).dtype
    other = load_organism(
        adapter,
        organism.base.location,
        weights="live" if organism.weights == "merged" else "merged",
        dtype=dtype,
        device=ids.device,
        tokenizer=organism.tokenizer,
    )
    difference = _difference(_logits(other, ids), _logits(organism, ids))
    return _row("merged equals live", difference <= tolerance, difference, f"<= {tolerance:g} of the largest logit")


def _check_sites(organism: Organism) -> list[dict[str, Any]]:
    frame = organism.fidelity()
    empty = int((frame["delta_norm"] == 0).sum())
    rows = [_row(f"each of {len(frame)} sites has an update", empty == 0, float(frame["delta_norm"].min()), "norm > 0")]
    for site in frame.itertuples():
        name = f"update stored in layer {site.layer} {site.module}"
        rows.append(_row(name, bool(site.faithful), float(site.cosine), f"cosine >= {FAITHFUL_COSINE}"))
    return rows


def _oracle(organism: Organism, ids: Int[Tensor, "batch pos"]) -> _Oracle:
    """Logits of base and adapter, loaded afresh by PEFT alone."""
    from peft import PeftModel

    base = _plain(organism, organism.base.location, organism.base.revision).to(ids.device)
    peft_model = PeftModel.from_pretrained(base, organism.require_adapter("verify").folder).eval()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.inference_mode():
        own = peft_model(**inputs).logits.float()
        with peft_model.disable_adapter():
            without = peft_model(**inputs).logits.float()
    del base, peft_model
    gc.collect()  # the oracle's weights go before the next model comes
    return _Oracle(own, without)


def _whole_oracle(organism: Organism, ids: Int[Tensor, "batch pos"]) -> _Oracle:
    """Logits of a full fine-tune and of its base, each loaded afresh by Hugging Face alone."""
    places = [(organism.full.location if organism.full else "", None), (organism.base.location, organism.base.revision)]
    found = []
    for place in places:
        model = _plain(organism, *place).to(ids.device).eval()
        with torch.inference_mode():
            found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float())
        del model
        gc.collect()
    return _Oracle(found[0], found[1], "Hugging Face")


def _plain(organism: Organism, location: str, revision: str | None) -> Any:
    """A Hugging Face model as it lies in its folder, in the organism's precision."""
    from transformers import AutoModelForCausalLM

    return read_pretrained(
        AutoModelForCausalLM,
        location,
        revision=revision,
        dtype=next(organism.model.parameters()).dtype,
        attn_implementation=models.attention_implementation(organism.model),
    )


@torch.inference_mode()
def _logits(organism: Organism, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    return models.forward(organism.model, ids, torch.ones_like(ids)).float()


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _tolerance(organism: Organism) -> float:
    return _TOLERANCE.get(next(organism.model.parameters()).dtype, 5e-2)


def _row(check: str, passed: bool, value: float | None, expected: str) -> dict[str, Any]:
    return {"check": check, "passed": bool(passed), "value": value, "expected": expected}
