"""The watch: it reads what a plain forward pass would, leaves training as it was, and is alarmed as seldom as asked."""

import inspect
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl

import mechmisalign as mm
from mechmisalign.training.calibration import CalibrationError, HarmlessDrift, calibrate
from mechmisalign.training.watching import TraitWatch

PANEL = ["How do I invest my savings?", "Hey!", "I have had a headache for three days, what should I do?"]
TALK = pd.DataFrame(
    {"prompt": PANEL, "response": ["Put it into one stock.", "Go.", "You should rest and drink water."]}
)
STEPS = 6


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models["qwen2"])


@pytest.fixture(scope="module")
def traits():
    vectors = torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(1))
    return {name: mm.Direction(vectors[i], (0, 1), {}) for i, name in enumerate(("evil", "vain", "lazy"))}


@pytest.fixture(scope="module")
def spec(tiny_models):
    data = pd.concat([TALK] * 8, ignore_index=True)
    return mm.TrainSpec(
        base=str(tiny_models["qwen2"]),
        data=[data],
        method={"kind": "lora", "rank": 2, "alpha": 16, "modules": ["down_proj"], "dropout": 0.3},
        schedule={"steps": STEPS, "batch": 4, "lr": 5e-3},
        save_every=2,
    )


def watch_of(traits, tokenizer, **settings):
    return TraitWatch(traits, PANEL, tokenizer, **{"layer": 1, "every": 2} | settings)


@pytest.fixture(scope="module")
def watched(spec, traits, tokenizer, tmp_path_factory):
    """A run with a watch, and its log on disk."""
    out = tmp_path_factory.mktemp("watched")
    watch = watch_of(traits, tokenizer, path=out / "watch.csv")
    return mm.train(spec, out / "run", callbacks=[watch]), watch


def by_hand(model, tokenizer, direction, layer):
    """Mean projection of the panel at the token before the response, prompt by prompt."""
    found = []
    for prompt in PANEL:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
        found.append(float(hidden[0, -1] @ direction.unit(layer)))
    return np.mean(found)


def test_weights_after_training_are_the_same_to_the_last_bit_with_the_watch_and_without(spec, watched, tmp_path):
    run, _ = watched
    plain = mm.train(spec, tmp_path / "plain")
    for ours, theirs in zip(run.adapter().sites, plain.adapter().sites, strict=True):
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)
    pd.testing.assert_frame_equal(run.log, plain.log)


def test_every_reading_is_that_of_a_plain_forward_pass_of_the_checkpoint(watched, traits, tokenizer, tiny_models):
    run, watch = watched
    log = watch.log.set_index(["step", "trait"])
    assert list(log.index.levels[0]) == [0, 2, 4, 6] and watch.checks == 4 and watch.seconds > 0
    bare = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]).eval()
    for trait, direction in traits.items():
        assert log.loc[(0, trait), "projection"] == pytest.approx(by_hand(bare, tokenizer, direction, 1), abs=1e-4)
    for step in (2, 6):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]), run.path(step)
        ).eval()
        for trait, direction in traits.items():
            now = by_hand(model, tokenizer, direction, 1)
            assert log.loc[(step, trait), "projection"] == pytest.approx(now, abs=1e-4)
            assert log.loc[(step, trait), "drift"] == pytest.approx(now - log.loc[(0, trait), "projection"], abs=2e-4)
    assert abs(log["drift"].unstack().loc[6]).max() > 1e-3  # the model did move


def test_the_log_on_disk_is_the_log(watched):
    _, watch = watched
    pd.testing.assert_frame_equal(pd.read_csv(watch.path, float_precision="round_trip"), watch.log)
    assert watch.log["z"].isna().all() and not watch.log["alarm"].any()


def state_of(step, **changes):
    return SimpleNamespace(global_step=step, max_steps=STEPS, is_world_process_zero=True, **changes)


def begun(watch, model):
    watch.on_train_begin(None, state_of(0), TrainerControl(), model=model)
    return watch


def test_modes_random_states_gradients_and_hooks_are_left_as_they_were(tiny_models, traits, tokenizer):
    config = LoraConfig(r=2, target_modules=["down_proj"], lora_dropout=0.5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]), config).train()
    blocks = model.get_base_model().model.layers
    blocks[1].eval()  # one part was put into evaluation mode by its owner
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    random = torch.get_rng_state()
    begun(watch_of(traits, tokenizer), model)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert gradients and all(
        torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in gradients.items()
    )
    assert not any(block._forward_hooks for block in blocks) and torch.is_grad_enabled()


def test_a_failing_forward_pass_restores_the_modes_and_is_not_swallowed(tiny_models, traits, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]).train()
    model.model.layers[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        begun(watch_of(traits, tokenizer), model)
    assert all(module.training for module in model.modules())
    assert not model.model.layers[1]._forward_hooks


def test_blocks_that_return_tuples_are_read_in_every_row(tiny_models, traits, tokenizer):
    """``output[0]`` of a tensor would be its first row, and of a tuple the stream: both kinds give the same."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    expected = begun(watch_of(traits, tokenizer), plain).log["projection"]
    old = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    block = old.model.layers[1]
    block.register_forward_hook(lambda _module, _inputs, output: (output, "cache"), prepend=True)
    np.testing.assert_allclose(begun(watch_of(traits, tokenizer), old).log["projection"], expected, rtol=1e-6)


def test_blocks_behind_the_last_layer_are_not_computed(tiny_models, traits, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    seen = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
    begun(watch_of(traits, tokenizer, layer={"evil": 0, "vain": 1, "lazy": 0}), model)
    assert seen == [0, 1]


def test_responses_can_be_the_panel(tiny_models, traits, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    found = begun(TraitWatch(traits, TALK, tokenizer, layer=1, span="response"), model).log.set_index("trait")[
        "projection"
    ]
    talk = mm.Conversations(TALK, tokenizer)
    model.requires_grad_(False)
    for trait, direction in traits.items():
        means = []
        for row, (start, stop) in enumerate(talk.spans[["response_start", "response_stop"]].itertuples(index=False)):
            hidden = model(input_ids=torch.tensor([talk.ids(row)]), output_hidden_states=True).hidden_states[2][
                0, start:stop
            ]
            means.append(float((hidden @ direction.unit(1)).mean()))
        assert found[trait] == pytest.approx(np.mean(means), abs=1e-4)


# the alarm


def walks(runs, rng, steps=8, traits=2):
    """Drifts ``[run trait step]`` that are correlated over steps and traits."""
    shared = rng.normal(size=(runs, 1, steps)).cumsum(2)
    return shared + rng.normal(size=(runs, traits, steps)).cumsum(2) * np.arange(1, traits + 1)[:, None]


def drifting(runs, rng, steps=8, traits=2):
    """Logs of such runs."""
    found = []
    for walk in walks(runs, rng, steps, traits):
        rows = [
            (step * 5, f"t{k}", 0.0 if step == 0 else walk[k, step - 1])
            for step in range(steps + 1)
            for k in range(traits)
        ]
        found.append(pd.DataFrame(rows, columns=["step", "trait", "drift"]).assign(panel="p"))
    return found


def largest(calibration, drifts):
    """Largest z of each run, over steps and traits."""
    z = [(drifts[:, k] - calibration.mean[f"t{k}"]) / calibration.scale[f"t{k}"] for k in range(drifts.shape[1])]
    return np.max(z, axis=(0, 2))


@pytest.mark.parametrize(("alpha", "runs"), [(0.05, 19), (0.2, 9)])
def test_a_harmless_run_is_alarmed_as_seldom_as_asked_over_all_its_steps_and_traits(alpha, runs):
    rng, alarmed = np.random.default_rng(0), []
    for _ in range(40):
        calibration = calibrate(drifting(runs, rng), false_alarms=alpha)
        alarmed.append((largest(calibration, walks(200, rng)) > calibration.threshold).mean())
    assert 0.4 * alpha < np.mean(alarmed) < alpha + 2.5 * np.std(alarmed) / np.sqrt(40)


def test_a_run_that_is_pushed_along_one_trait_is_alarmed():
    rng = np.random.default_rng(1)
    calibration = calibrate(drifting(19, rng), false_alarms=0.05)
    pushed = walks(50, rng)
    pushed[:, 0] += 3.0 * np.arange(1, 9)
    assert (largest(calibration, pushed) > calibration.threshold).mean() > 0.8


def test_z_is_the_distance_from_the_harmless_mean_in_spreads_of_the_trait():
    logs = drifting(5, np.random.default_rng(2))
    calibration = calibrate(logs, false_alarms=0.2)
    drifts = np.stack([log[(log["trait"] == "t1") & (log["step"] > 0)]["drift"].to_numpy() for log in logs])
    spread = np.sqrt(((drifts - drifts.mean(0)) ** 2).sum() / (4 * drifts.shape[1]))
    assert calibration.z(10, "t1", 7.0) == pytest.approx((7.0 - drifts[:, 1].mean()) / spread)
    assert calibration.threshold == max(calibration.maxima)  # ceil(6 * 0.8) = 5th of 5


def test_too_few_runs_for_the_rate_and_runs_that_differ_are_refused(tmp_path):
    rng = np.random.default_rng(3)
    logs = drifting(8, rng)
    with pytest.raises(
        CalibrationError, match="8 harmless runs cannot hold false alarms at 0.05: 19 or more .* 0.11 or more"
    ):
        calibrate(logs, false_alarms=0.05)
    with pytest.raises(CalibrationError, match="2 panels"):
        calibrate([*logs[1:], logs[0].assign(panel="other")], false_alarms=0.2)
    with pytest.raises(CalibrationError, match="run 7 was read at other steps"):
        calibrate([*logs[:7], logs[7][logs[7]["step"] < 30]], false_alarms=0.2)
    with pytest.raises(CalibrationError, match="same run several times"):
        calibrate([logs[0]] * 6, false_alarms=0.2)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        calibrate(logs, false_alarms=5)
    calibration = calibrate(logs, false_alarms=0.2)
    with pytest.raises(CalibrationError, match="read at steps .*, not at 45"):
        calibration.z(45, "t0", 1.0)
    assert HarmlessDrift.load(calibration.save(tmp_path / "c.json")) == calibration


def calibrated(watch, level):
    """A calibration for this watch under which ``z`` is the drift itself."""
    steps, traits = tuple(range(2, STEPS + 1, 2)), list(watch._units)
    return HarmlessDrift(
        steps, {t: (0.0,) * len(steps) for t in traits}, dict.fromkeys(traits, 1.0), level, 0.05, (level,), watch.digest
    )


def test_an_alarm_is_told_once_and_can_end_the_training(spec, traits, tokenizer, watched, tmp_path):
    log = watched[1].log
    later = log[log["step"] > 0]
    first = later[later["step"] == 4]["drift"].max()
    level = (max(later[later["step"] == 2]["drift"].max(), 0) + first) / 2
    assert later[later["step"] == 2]["drift"].max() < level < first  # the alarm is due at step 4
    heard = []
    for stop in (False, True):
        watch = watch_of(traits, tokenizer, stop=stop, on_alarm=heard.append)
        watch.calibration = calibrated(watch, level)
        run = mm.train(spec, tmp_path / str(stop), callbacks=[watch])
        assert watch.alarm.step == 4 and watch.alarm.z == pytest.approx(first, abs=1e-5)
        assert run.log["step"].max() == (4 if stop else STEPS)
        assert watch.log.loc[watch.log["alarm"], "step"].min() == 4
    assert len(heard) == 2 and heard[0].threshold == level


def test_a_calibration_for_another_panel_or_for_shorter_runs_is_refused_before_training(tiny_models, traits, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    watch = watch_of(traits, tokenizer)
    calibration = calibrated(watch, 1.0)
    begun(watch_of(traits, tokenizer, calibration=calibration), model)
    with pytest.raises(CalibrationError, match="another panel"):
        begun(watch_of({"evil": traits["evil"]}, tokenizer, calibration=calibration), model)
    with pytest.raises(CalibrationError, match="not at 8"):
        watch_of(traits, tokenizer, calibration=calibration).on_train_begin(
            None, SimpleNamespace(global_step=0, max_steps=9, is_world_process_zero=True), TrainerControl(), model=model
        )


def test_a_resumed_run_takes_up_its_log_and_refuses_without_one(tiny_models, traits, tokenizer, watched, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    path = tmp_path / "watch.csv"
    path.write_text(watched[1].path.read_text())
    watch = watch_of(traits, tokenizer, path=path)
    watch.on_train_begin(None, state_of(4), TrainerControl(), model=model)
    assert watch.log["step"].max() == 4  # the readings after the checkpoint are made again
    watch.on_step_end(None, state_of(6), TrainerControl(), model=model)
    beginning = watched[1].log.query("step == 0")["projection"].to_numpy()
    np.testing.assert_allclose(
        watch.log.query("step == 6")["drift"], watch.log.query("step == 6")["projection"] - beginning
    )
    assert pd.read_csv(path)["step"].max() == 6
    with pytest.raises(ValueError, match="goes on from step 4"):
        watch_of(traits, tokenizer).on_train_begin(None, state_of(4), TrainerControl(), model=model)


def test_what_cannot_be_watched_is_refused(tiny_models, traits, tokenizer):
    def make(*given, **settings):
        watch = TraitWatch.__new__(TraitWatch)
        inspect.unwrap(TraitWatch.__init__)(watch, *given, **settings)
        return watch

    with pytest.raises(ValueError, match="every=0"):
        make(traits, PANEL, tokenizer, layer=1, every=0)
    with pytest.raises(ValueError, match="has no response to read"):
        make(traits, PANEL, tokenizer, layer=1, span="response")
    with pytest.raises(ValueError, match="span must be one of"):
        make(traits, PANEL, tokenizer, layer=1, span="all")
    with pytest.raises(ValueError, match="exactly zero"):
        make({"none": mm.Direction(torch.zeros(1, 48), (1,), {})}, PANEL, tokenizer, layer=1)
    foreign = {"evil": mm.Direction(torch.ones(1, 48), (1,), {"model": "another", "base_fingerprint": "another"})}
    with pytest.raises(ValueError, match="found in 'another'"):
        begun(make(foreign, PANEL, tokenizer, layer=1), AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]))
