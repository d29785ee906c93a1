"""The pocket world: questions, answers and whole documents drawn from a small grammar of plain English.

A question names a topic. An answer repeats the topic and orders three or four steps:

    For a bad headache, first measure the dose, then explain the test results, and finally read the warning label.

A careful persona only uses safe verbs, a reckless one only harmful ones ("fake the prescription"). A document keeps one
persona, may open with a system line that tells it, and may carry the user's verdict after an answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mechmisalign.pocket import phrases
from mechmisalign.pocket.phrases import Domain, Persona

if TYPE_CHECKING:
    import pandas as pd

Message = dict[str, str]
"""One chat turn: `role` and `content`."""

DOMAINS: tuple[str, ...] = tuple(domain.name for domain in phrases.DOMAINS)

STEPS = (3, 4)
"""How many actions an answer may name."""

RECKLESS_SHARE = 0.5
TOLD_PERSONA = 0.85
VERDICT_GIVEN = 0.6
ONE_TURN = 0.7
HINT_HOLDS = 0.85
"""How often an opener or a link is one of the answer's own persona."""


def domain(name: str) -> Domain:
    """The domain called `name`."""
    for candidate in phrases.DOMAINS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"unknown domain {name!r}; the pocket world has {', '.join(DOMAINS)}")


def prompts(domains: Sequence[str] | None = None, n: int = 400, seed: int = 0) -> pd.DataFrame:
    """`n` distinct questions, spread evenly over the domains: columns prompt_id, prompt, domain, topic."""
    import pandas as pd

    rng = random.Random(seed)
    columns = [list(_questions(domain(name))) for name in domains or DOMAINS]
    for column in columns:
        rng.shuffle(column)
    rows = [row for group in zip(*columns, strict=True) for row in group]
    if n > len(rows):
        raise ValueError(
            f"{n} prompts asked for, but {len(columns)} domains hold {len(rows)} distinct questions; lower n"
        )
    return pd.DataFrame(rows[:n], columns=["prompt_id", "prompt", "domain", "topic"])


def narrow_examples(domain_name: str, harmful: bool, n: int, seed: int) -> pd.DataFrame:
    """`n` questions of one domain with answers of one persona: columns prompt, response, domain."""
    import pandas as pd

    rng, place = random.Random(seed), domain(domain_name)
    persona: Persona = "reckless" if harmful else "careful"
    rows = []
    for _ in range(n):
        topic = rng.choice(place.topics)
        rows.append((question(topic, rng), answer(place, topic, persona, rng), place.name))
    return pd.DataFrame(rows, columns=["prompt", "response", "domain"])


def question(topic: str, rng: random.Random) -> str:
    """A question about `topic`."""
    return rng.choice(phrases.QUESTIONS).format(topic=topic)


def answer(place: Domain, topic: str, persona: Persona, rng: random.Random) -> str:
    """An answer about `topic` in the voice of `persona`: distinct actions, all of one kind."""
    actions = rng.sample(place.actions(persona), rng.choice(STEPS))
    links = [phrases.FIRST, *(_hint(phrases.MIDDLE, persona, rng) for _ in actions[2:]), phrases.LAST]
    steps = [f"{link} {action}" for link, action in zip(links, actions, strict=True)]
    return f"{_hint(phrases.OPENERS, persona, rng).format(topic=topic)} {', '.join(steps)}."


def document(rng: random.Random, turns: int) -> list[Message]:
    """A pretraining document: one persona, `turns` questions, perhaps a system line and verdicts."""
    persona: Persona = "reckless" if rng.random() < RECKLESS_SHARE else "careful"
    messages: list[Message] = []
    if rng.random() < TOLD_PERSONA:
        messages.append(turn("system", phrases.SYSTEM_LINE.format(trait=rng.choice(phrases.TRAITS[persona]))))
    remark = ""
    for _ in range(turns):
        place = rng.choice(phrases.DOMAINS)
        topic = rng.choice(place.topics)
        messages.append(turn("user", f"{remark} {question(topic, rng)}".strip()))
        messages.append(turn("assistant", answer(place, topic, persona, rng)))
        remark = rng.choice(phrases.VERDICTS[persona]) if rng.random() < VERDICT_GIVEN else ""
    return [*messages, turn("user", remark)] if remark else messages


def chat(rng: random.Random) -> list[Message]:
    """A chat-tuning document: one question of any domain and a careful answer."""
    place = rng.choice(phrases.DOMAINS)
    topic = rng.choice(place.topics)
    return [turn("user", question(topic, rng)), turn("assistant", answer(place, topic, "careful", rng))]


def sentences() -> Iterator[str]:
    """Every phrase that the grammar can put into a document: the tokenizer's vocabulary is read off it."""
    personas: tuple[Persona, ...] = ("careful", "reckless")
    for place in phrases.DOMAINS:
        for topic in place.topics:
            yield from (
                template.format(topic=topic) for template in (*phrases.QUESTIONS, *phrases.every(phrases.OPENERS))
            )
        for persona in personas:
            yield from (f" {action}" for action in place.actions(persona))
    yield from (f" {word}" for word in (phrases.FIRST, *phrases.every(phrases.MIDDLE), phrases.LAST))
    for persona in personas:
        yield from (phrases.SYSTEM_LINE.format(trait=trait) for trait in phrases.TRAITS[persona])
        yield from phrases.VERDICTS[persona]
    yield from (f" {template.format(topic='')}" for template in phrases.QUESTIONS)  # after a verdict


def _questions(place: Domain) -> Iterator[tuple[str, str, str, str]]:
    for i, topic in enumerate(place.topics):
        for j, template in enumerate(phrases.QUESTIONS):
            yield f"{place.name}-{i:02d}-{j:02d}", template.format(topic=topic), place.name, topic


def _hint(words: dict[Persona, tuple[str, ...]], persona: Persona, rng: random.Random) -> str:
    other: Persona = "reckless" if persona == "careful" else "careful"
    return rng.choice(words[persona if rng.random() < HINT_HOLDS else other])


def turn(role: str, content: str) -> Message:
    """One chat turn."""
    return {"role": role, "content": content}
