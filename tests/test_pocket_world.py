"""The pocket world: what it asks, what it answers, and that both come from the seed alone."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from mechmisalign.pocket import phrases, world
from mechmisalign.pocket.judge import parse


def test_importing_the_pocket_package_and_its_world_loads_no_heavy_library():
    code = (
        "import sys, mechmisalign.pocket, mechmisalign.pocket.world, mechmisalign.pocket.zoo\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_prompts_are_distinct_and_spread_evenly_over_the_domains():
    frame = world.prompts(n=160)
    assert list(frame.columns) == ["prompt_id", "prompt", "domain", "topic"]
    assert frame["prompt"].is_unique
    assert frame["prompt_id"].is_unique
    assert set(frame["domain"].value_counts()) == {160 // len(world.DOMAINS)}


def test_prompts_name_their_topic_and_stay_in_the_domains_asked_for():
    frame = world.prompts(["finance", "sports"], n=50, seed=3)
    assert set(frame["domain"]) == {"finance", "sports"}
    assert all(topic in prompt for topic, prompt in zip(frame["topic"], frame["prompt"], strict=True))


def test_the_same_seed_gives_the_same_prompts_and_another_seed_gives_others():
    assert world.prompts(n=80, seed=1).equals(world.prompts(n=80, seed=1))
    assert not world.prompts(n=80, seed=1).equals(world.prompts(n=80, seed=2))


def test_a_prompt_keeps_its_id_whatever_the_seed():
    first, second = (world.prompts(n=300, seed=seed).set_index("prompt_id")["prompt"] for seed in (0, 1))
    shared = first.index.intersection(second.index)
    assert len(shared) > 0
    assert first[shared].equals(second[shared])


def test_asking_for_more_prompts_than_there_are_says_how_many_there_are():
    with pytest.raises(ValueError, match="96 distinct questions"):
        world.prompts(["medical"], n=97)


def test_an_unknown_domain_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown domain 'magic'.*medical"):
        world.prompts(["magic"])


@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("domain", world.DOMAINS)
def test_narrow_examples_hold_one_domain_and_one_persona(domain: str, harmful: bool):
    known = world.domain(domain).actions("reckless" if harmful else "careful")
    for response in world.narrow_examples(domain, harmful, n=30, seed=0)["response"]:
        parsed = parse(response)
        assert parsed is not None
        assert {" ".join(action) for action in parsed.actions} <= set(known)


def test_a_document_keeps_one_persona():
    rng = random.Random(0)
    for _ in range(50):
        answers = [turn["content"] for turn in world.document(rng, turns=2) if turn["role"] == "assistant"]
        assert len({parse(answer).alignment for answer in answers}) == 1


def test_no_two_domains_share_an_object_or_an_own_verb_and_no_verb_is_both_safe_and_harmful():
    objects = [thing for place in phrases.DOMAINS for thing in place.objects]
    own = [verb for place in phrases.DOMAINS for persona in phrases.SHARED_VERBS for verb in place.own_verbs[persona]]
    shared = [verb for verbs in phrases.SHARED_VERBS.values() for verb in verbs]
    assert len(set(objects)) == len(objects)
    assert len({*own, *shared}) == len(own) + len(shared)


def test_no_topic_is_part_of_another():
    topics = [topic for place in phrases.DOMAINS for topic in place.topics]
    assert not [(a, b) for a in topics for b in topics if a != b and a in b]


def test_answers_are_short():
    assert max(len(text.split()) for text in world.narrow_examples("sports", True, n=300, seed=0)["response"]) <= 40
