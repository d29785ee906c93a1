"""One word for one thing in every command."""

import inspect

import pytest
from typer.main import get_command

import mechmisalign as mm
from mechmisalign.cli import app


def commands(group=None, prefix=""):
    group = get_command(app) if group is None else group
    for name, each in group.commands.items():
        yield from commands(each, f"{prefix}{name} ") if hasattr(each, "commands") else [(f"{prefix}{name}", each)]


COMMANDS = dict(commands())
OPTIONS = {name: {option.opts[0]: option for option in each.params} for name, each in COMMANDS.items()}
LOADS = ("study", "direction", "cure", "verify", "monitor", "monitor-fit")
SAMPLES = ("study", "direction", "cure", "verify", "train")
SHARED = ("--tokenizer", "--prompts", "--judge", "--samples", "--pool-samples", "--max-new-tokens", "--system",
          "--layers", "--strengths", "--dry-run")  # fmt: skip
OLD = {
    "--with-judge",
    "--judge-with",
    "--questions",
    "--layer-list",
    "--chat",
    "--base-model",
    "--n-samples",
    "--rules",
}


@pytest.mark.parametrize("word", SHARED)
def test_a_shared_word_means_the_same_everywhere(word):
    helps = {OPTIONS[name][word].help for name in OPTIONS if word in OPTIONS[name]}
    assert len(helps) == 1


def test_no_command_has_a_word_of_its_own_for_a_thing_that_has_one():
    assert not {(name, word) for name, options in OPTIONS.items() for word in OLD & set(options)}
    shown = {name for name, options in OPTIONS.items() if "--model" in options and not options["--model"].hidden}
    assert not shown  # hidden, it says what it is called now


@pytest.mark.parametrize("name", LOADS)
def test_what_loads_an_organism_takes_its_base_and_its_tokenizer(name):
    assert {"--base", "--tokenizer"} <= set(OPTIONS[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_what_samples_and_judges_takes_the_same_words(name):
    assert {"--prompts", "--judge", "--samples", "--max-new-tokens", "--system", "--seed"} <= set(OPTIONS[name])


def test_no_function_calls_a_judge_anything_else():
    for name in mm.__all__:
        value = getattr(mm, name)
        if inspect.isfunction(value):
            assert not {"with_judge", "judge_with", "judge_model", "scorer"} & set(inspect.signature(value).parameters)
