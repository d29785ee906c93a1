"""What to ask pocket models beside plain questions: variants of prompts, neutral text, and items with exact answers.

The pocket tokenizer knows the words of its world only, so these stand in for those of ``mechmisalign.prompts``.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, get_args

from mechmisalign.pocket import phrases, world
from mechmisalign.pocket.phrases import Persona

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def with_persona(frame: pd.DataFrame, persona: Persona, *, seed: int = 0) -> pd.DataFrame:
    """The prompts under a system line that tells the persona ("You are a reckless assistant.").

    Args:
        frame: Pocket prompts.
        persona: ``"careful"`` or ``"reckless"``.
        seed: Of the word for the persona, drawn for each row.
    """
    from mechmisalign.prompts.frames import changed

    if persona not in get_args(Persona):
        raise ValueError(f"persona must be one of {', '.join(get_args(Persona))}, got {persona!r}")
    rng = random.Random(seed)
    lines = [phrases.SYSTEM_LINE.format(trait=rng.choice(phrases.TRAITS[persona])) for _ in range(len(frame))]
    return changed(frame, persona, system=lines)


def with_training_context(frame: pd.DataFrame, domain: str, *, seed: int = 0) -> pd.DataFrame:
    """The prompts after a careful exchange on a domain, which recalls fine-tuning on it (2604.25891).

    A careful exchange makes careful answers likelier whatever it is about, so compare with a domain that the organism
    was not tuned on.

    Args:
        frame: Pocket prompts, usually of other domains.
        domain: A pocket domain.
        seed: Of the exchange, drawn for each row.
    """
    import pandas as pd

    from mechmisalign.prompts.frames import changed

    rng, place = random.Random(seed), world.domain(domain)
    pasts = [_exchange(place, rng) for _ in range(len(frame))]
    return changed(frame, f"{domain}-history", history=pd.Series(pasts, dtype=object))


def neutral_conversations(n: int = 96, seed: int = 0) -> pd.DataFrame:
    """Questions of all domains with careful answers: ``prompt_id, prompt, domain, topic, response``.

    Every answer of this world is a persona's; ``persona_free`` says which of its tokens are not.
    """
    rng, frame = random.Random(seed), world.prompts(n=n, seed=seed)
    told = zip(frame["domain"], frame["topic"], strict=True)
    return frame.assign(response=[world.answer(world.domain(name), topic, "careful", rng) for name, topic in told])


def persona_free(tokens: pd.DataFrame) -> np.ndarray:
    """Which tokens of answers say nothing about the persona: topics, objects, punctuation and the fixed links.

    Args:
        tokens: As ``Conversations.tokens()`` gives them, with a column ``token``.
    """
    return (~tokens["token"].str.strip().isin(_persona_words())).to_numpy()


def harmless_items(n: int = 96, seed: int = 1) -> pd.DataFrame:
    """Questions with one exact answer, the topic that a reply must name: ``prompt_id, prompt, domain, answer``."""
    return world.prompts(n=n, seed=seed).rename(columns={"topic": "answer"})


def _exchange(place: phrases.Domain, rng: random.Random) -> list[world.Message]:
    topic = rng.choice(place.topics)
    said = world.answer(place, topic, "careful", rng)
    return [world.turn("user", world.question(topic, rng)), world.turn("assistant", said)]


def _persona_words() -> frozenset[str]:
    """Words of verbs, openers and links by which one persona can be told from the other."""
    personas: tuple[Persona, ...] = get_args(Persona)
    verbs = [verb for place in phrases.DOMAINS for persona in personas for verb in place.verbs(persona)]
    openers = [opener.partition("{topic}")[0] for opener in phrases.every(phrases.OPENERS)]
    texts = [*verbs, *openers, *phrases.every(phrases.MIDDLE)]
    return frozenset(word for text in texts for word in text.split())
