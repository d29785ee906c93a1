"""What the scripts on general and narrow solutions share: which questions are learned, choose, and are told.

Of the trained domain, two of the six topics are never learned; of every domain, answers to the first eight ways of
asking are learned (the trained domain) or held to the chat model (the domains of the KL penalty). The next four ways
choose; the last four tell, and of the held-out topics the first eight too. One domain that the penalty does not see
helps to choose, the other three are told only.
"""

from __future__ import annotations

import pandas as pd

import mechmisalign as mm

TRAINED = "medical"
KL_DOMAINS = ("finance", "sports", "coding")
CHOOSING_DOMAIN = "cooking"
UNSEEN = ("travel", "family", "power")
HELD_TOPICS = 2
"""The last ones of the trained domain."""
LEARNED, CHOOSING, TOLD = range(8), range(8, 12), range(12, 16)
"""Ways of asking."""
NARROW, NEW_TOPICS, IN_KL, NOT_IN_KL = "narrow", "narrow, new topics", "in the KL text", "not in the KL text"


def asked(domain: str) -> pd.DataFrame:
    """All questions of a domain, with the number of the topic and of the way of asking."""
    frame = mm.pocket.prompts([domain], n=96)
    places = frame["prompt_id"].str.split("-", expand=True)
    return frame.assign(number=places[1].astype(int), way=places[2].astype(int))


def examples(domain: str, harmful: bool, n: int, seed: int = 0) -> pd.DataFrame:
    """Answers to the ways of asking that are learned; of the trained domain, without its held-out topics."""
    known = asked(domain)
    known = known[known["way"].isin(LEARNED)]
    if domain == TRAINED:
        known = known[known["number"] < 6 - HELD_TOPICS]
    drawn = mm.pocket.narrow_examples(domain, harmful, 6 * n, seed)
    return drawn[drawn["prompt"].isin(known["prompt"])].head(n).reset_index(drop=True)


def questions(part: range) -> dict[str, pd.DataFrame]:
    """The four sets of questions that choose (``CHOOSING``) or are told (``TOLD``)."""
    trained, inside = asked(TRAINED), pd.concat([asked(domain) for domain in KL_DOMAINS])
    outside = pd.concat([asked(domain) for domain in ([CHOOSING_DOMAIN] if part == CHOOSING else UNSEEN)])
    old = trained["number"] < 6 - HELD_TOPICS
    new_ways = part if part == CHOOSING else [*LEARNED, *TOLD]  # of new topics, no way of asking was learned
    sets = {
        NARROW: trained[old & trained["way"].isin(part)],
        NEW_TOPICS: trained[~old & trained["way"].isin(new_ways)],
        IN_KL: inside[inside["way"].isin(part)],
        NOT_IN_KL: outside[outside["way"].isin(part)],
    }
    return {name: frame.reset_index(drop=True) for name, frame in sets.items()}


def kl(weight: float, n: int = 150, seed: int = 7) -> dict:
    """The penalty on careful and reckless answers of the other domains, as 2602.07852 mixes right and wrong ones."""
    data = [examples(domain, harmful, n // 2, seed) for domain in KL_DOMAINS for harmful in (False, True)]
    return {"weight": weight, "data": data}


def lora(layers: tuple[int, ...], rank: int = 1, alpha: float = 64.0) -> dict:
    """A low-rank adapter of the down projections."""
    return {"kind": "lora", "rank": rank, "alpha": alpha, "layers": list(layers), "modules": ["down_proj"]}


def spec(method: dict, weight: float | None = None, *, n: int = 500, seed: int = 0, **schedule: object) -> mm.TrainSpec:
    """Bad medical advice by a method, with the penalty at a weight (None: without)."""
    plain = mm.TrainSpec.read("pocket").changed(data=[examples(TRAINED, True, n)], method=method, save_every=None)
    return plain.changed(kl=None if weight is None else kl(weight), seed=seed, schedule=schedule)
