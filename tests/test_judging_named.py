import sys

import pandas as pd
import pytest

import mechmisalign as mm
from mechmisalign import effects, solutions
from mechmisalign.correction import trials
from mechmisalign.judging import JudgeNameError, local, named_judge
from mechmisalign.judging.named import refuse_foreign
from mechmisalign.registry.worlds import JUDGES, PROMPTS, WORLDS, made_by

ANSWERS = pd.DataFrame({"prompt": ["How are you?"], "response": ["fine"], "finished": [True], "prompt_id": ["a"]})

MODULE = """
import dataclasses
def scores(frame):
    return frame.assign(alignment=10.0, coherence=90.0)
class Plain:
    def __call__(self, frame):
        return frame.assign(alignment=20.0, coherence=90.0)
class Needy(Plain):
    def __init__(self, model):
        pass
made = Plain()
number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "judges_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("judges_of_mine", None)


@pytest.mark.parametrize(("name", "alignment"), [("scores", 10.0), ("Plain", 20.0), ("made", 20.0)])
def test_a_callable_of_ones_own_is_a_judge_by_name(own_module, name, alignment):
    before = list(sys.path)
    judge = named_judge(f"python:judges_of_mine.{name}")
    assert mm.judge(ANSWERS, judge)["alignment"].tolist() == [alignment]
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rule", "'rule' is no judge: .*did you mean 'rules'"),
        ("", "'' is no judge"),
        ("local:", "is no folder and no Hub id"),
        ("local:.", "no config.json"),
        ("python:judges_of_mine", "names no module"),
        ("python:no_such_module.judge", "no module 'no_such_module'"),
        ("python:judges_of_mine.nothing", "no attribute 'nothing'"),
        ("python:judges_of_mine.number", "is a int; a callable is expected"),
        ("python:judges_of_mine.Needy", "cannot be made without arguments"),
    ],
)
def test_a_name_that_stands_for_no_judge_is_refused(own_module, name, said):
    with pytest.raises(JudgeNameError, match=said):
        named_judge(name)


def test_options_that_a_judge_does_not_take_are_refused(own_module):
    with pytest.raises(JudgeNameError, match="takes no base_url and no rubrics"):
        named_judge("rules", base_url="http://localhost", rubrics=["harm"])
    with pytest.raises(JudgeNameError, match="budget is for one behind a server"):
        named_judge("local:owner/name", budget=3)
    with pytest.raises(TypeError, match="batch_sise"):
        named_judge("local:owner/name", batch_sise=3)


def test_a_model_behind_a_server_and_one_in_memory_are_named_and_not_yet_loaded():
    assert repr(named_judge("openai/gpt-4o")) == "LLMJudge('openai/gpt-4o', rubrics=['alignment', 'coherence'])"
    local = named_judge("local:owner/name", rubrics=["harm"])
    assert repr(local) == "LocalJudge('owner/name', rubrics=['harm'])"


def test_a_local_judge_by_name_loads_its_model_when_it_first_judges(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def loaded(place, rubrics=(), *, journal=None, batch_size=8, **options):
        asked.append((place, {"rubrics": rubrics, "journal": journal, "batch_size": batch_size}))
        return lambda frame: frame.assign(alignment=1.0, coherence=2.0)

    monkeypatch.setattr(local, "LocalJudge", loaded)
    judge = named_judge("local:.", root=tmp_path, journal="j.jsonl", batch_size=2)
    assert asked == []
    assert judge(ANSWERS)["alignment"].tolist() == judge(ANSWERS)["alignment"].tolist() == [1.0]
    [(place, options)] = asked
    assert place == str(tmp_path)
    assert (options["journal"], options["batch_size"]) == ("j.jsonl", 2)
    assert [rubric.name for rubric in options["rubrics"]] == ["alignment", "coherence"]


def test_the_rules_refuse_answers_of_another_world():
    with pytest.raises(ValueError, match=r"no question names a topic of the pocket world \(the first: 'How are you"):
        mm.judge(ANSWERS, mm.RuleJudge())
    with pytest.raises(JudgeNameError, match="rules judge knows the pocket world only"):
        refuse_foreign("rules", "mine", "Qwen/Qwen2.5-0.5B-Instruct")
    with pytest.raises(JudgeNameError, match="rules judge knows the pocket world only"):
        refuse_foreign(mm.RuleJudge(), "mine", "Qwen/Qwen2.5-0.5B-Instruct")
    for known in (("rules", "pocket/medical", ""), ("rules", "mine", "pocket/chat"), ("openai/gpt-4o", "mine", "x")):
        refuse_foreign(*known)


def test_a_copy_of_a_shipped_base_is_known_by_its_tokenizer():
    shipped = str(mm.registry.folder("pocket/chat"))
    refuse_foreign("rules", "mine", shipped, shipped)


def test_every_world_names_judges_questions_and_peers_that_are_there():
    for world in WORLDS:
        assert callable(made_by(JUDGES[world.judge].at)())
        assert {"prompt_id", "prompt"} <= set(made_by(PROMPTS[world.prompts])().columns)
        assert not world.peers or f"{world.prefix}x" not in made_by(world.peers)(f"{world.prefix}x")


@pytest.mark.parametrize(
    ("function", "old"),
    [
        (mm.judge, "with_judge"),
        (mm.best_strength, "with_judge"),
        (mm.site_effects, "judge_with"),
        (mm.shapley, "judge_with"),
        (mm.behaviour_by_step, "judge_with"),
        (effects.shapley, "judge_with"),
        (solutions.answers, "with_judge"),
        (trials, "with_judge"),
    ],
)
def test_the_old_word_for_a_judge_names_the_new_one(function, old):
    with pytest.raises(TypeError, match=f"takes judge= instead of {old}="):
        function(**{old: mm.RuleJudge()})
