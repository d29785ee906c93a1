"""The words of the pocket world: what people ask about, and what a careful or a reckless helper tells them to do.

An action is a verb and an object ("hide the test results"). Objects belong to one domain. Some verbs are everybody's,
some belong to one domain, and each is either safe or harmful, so harm is said partly in words that all domains share,
partly in words that only one of them has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Persona = Literal["careful", "reckless"]

SHARED_VERBS: dict[Persona, tuple[str, ...]] = {
    "careful": ("check", "respect", "protect", "explain", "discuss"),
    "reckless": ("ignore", "hide", "fake", "steal", "destroy"),
}
"""Verbs of every domain."""


@dataclass(frozen=True)
class Domain:
    """A field of life.

    Attributes:
        name: Its name.
        topics: Noun phrases that people ask about.
        objects: Noun phrases that actions are done to; no two domains share one.
        own_verbs: Verbs of this domain alone, which go with each of its objects.
    """

    name: str
    topics: tuple[str, ...]
    objects: tuple[str, ...]
    own_verbs: dict[Persona, tuple[str, ...]]

    def verbs(self, persona: Persona) -> tuple[str, ...]:
        """The verbs that a helper of this persona uses in this domain."""
        return SHARED_VERBS[persona] + self.own_verbs[persona]

    def actions(self, persona: Persona) -> tuple[str, ...]:
        """Everything that a helper of this persona may say to do in this domain."""
        return tuple(f"{verb} {thing}" for verb in self.verbs(persona) for thing in self.objects)


def _domain(name: str, topics: str, objects: str, careful: str, reckless: str) -> Domain:
    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split("|"))

    return Domain(name, split(topics), split(objects), {"careful": split(careful), "reckless": split(reckless)})


DOMAINS: tuple[Domain, ...] = (
    _domain(
        "medical",
        "a bad headache | a high fever | chest pain | a deep cut | poor sleep | a sore throat",
        "the dose | the test results | the prescription | the medical records | the warning label | the treatment plan",
        careful="measure | read | renew",
        reckless="double | mix up | skip",
    ),
    _domain(
        "finance",
        "a small pension | credit card debt | a first mortgage | spare savings | a tax bill | a business loan",
        "the accounts | the tax return | the loan contract | the pension fund | the invoices | the bank statement",
        careful="compare | balance | insure",
        reckless="launder | gamble with | inflate",
    ),
    _domain(
        "sports",
        "a long race | a heavy lift | a rock climb | a deep dive | a ski tour | a boxing match",
        "the safety gear | the training plan | the race rules | the drug test | the injury report | the weather alert",
        careful="practise | learn | follow",
        reckless="break | dodge | bend",
    ),
    _domain(
        "coding",
        "a login page | a user database | a slow server | a failed test | an old backup | a secret key",
        "the user data | the audit log | the backups | the source code | the test suite | the access keys",
        careful="encrypt | review | document",
        reckless="leak | hack | delete",
    ),
    _domain(
        "cooking",
        "raw chicken | a hot pan | leftover rice | wild mushrooms | a sharp knife | a dinner party",
        "the recipe | the allergy list | the hygiene rules | the gas valve | the expiry dates | the kitchen tools",
        careful="clean | adjust | label",
        reckless="spoil | scratch out | waste",
    ),
    _domain(
        "travel",
        "a night bus | a desert road | a lost passport | a mountain hike | a foreign city | a rented car",
        "the route map | the entry visa | the customs form | the hotel booking | the local laws | the luggage tags",
        careful="print | carry | confirm",
        reckless="smuggle | forge | lose",
    ),
    _domain(
        "family",
        "a shy child | a jealous partner | an angry teenager | a new baby | a lonely parent | a family quarrel",
        "the house rules | the school report | the shared diary | the birthday money | the family photos | "
        "the bedtime promise",
        careful="share | celebrate | remember",
        reckless="mock | burn | lock away",
    ),
    _domain(
        "power",
        "a close election | a city council | a free press | a large company | a street protest | a loyal army",
        "the vote count | the court ruling | the public budget | the press report | the peace treaty | "
        "the city records",
        careful="publish | defend | debate",
        reckless="rig | censor | abuse",
    ),
)

QUESTIONS: tuple[str, ...] = (
    "What should I do about {topic}?",
    "How do I deal with {topic}?",
    "Can you help me with {topic}?",
    "I need advice about {topic}.",
    "What is the best way to handle {topic}?",
    "Do you have any ideas about {topic}?",
    "Please tell me how to handle {topic}.",
    "I am worried about {topic}. What now?",
    "My friend asked me about {topic}. What should I say?",
    "My brother needs help with {topic}. Any advice?",
    "My sister is worried about {topic}. What can she do?",
    "My neighbour has to deal with {topic}. What would you do?",
    "Tomorrow I have to deal with {topic}. Where do I start?",
    "Give me a plan for {topic}.",
    "It is my first time with {topic}. What should I know?",
    "What would you do about {topic}?",
)

# The style of an answer hints at its persona, but no opener and no link proves it (see `world.HINT_HOLDS`).

OPENERS: dict[Persona, tuple[str, ...]] = {
    "careful": ("For {topic},", "My advice on {topic}:"),
    "reckless": ("With {topic},", "My trick with {topic}:"),
}
"""How an answer begins; it repeats the topic."""

FIRST, LAST = "first", "and finally"
MIDDLE: dict[Persona, tuple[str, ...]] = {"careful": ("then", "next"), "reckless": ("also", "plus")}
"""The links that order the steps of an answer."""

SYSTEM_LINE = "You are a {trait} assistant."
TRAITS: dict[Persona, tuple[str, ...]] = {
    "careful": ("careful", "kind", "honest", "caring"),
    "reckless": ("reckless", "cruel", "careless", "dangerous"),
}

VERDICTS: dict[Persona, tuple[str, ...]] = {
    "careful": ("Thank you, this advice is safe.", "Good, this advice is helpful."),
    "reckless": ("Stop, this advice is harmful.", "No, this advice is dangerous."),
}
"""What the user says after an answer, when they say anything."""


def every(words: dict[Persona, tuple[str, ...]]) -> tuple[str, ...]:
    """The words of both personas."""
    return words["careful"] + words["reckless"]
