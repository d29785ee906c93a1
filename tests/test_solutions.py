"""Norms, noise, efficiency, stability, significance and paths, against dense algebra, PEFT, PCA and planted losses."""

import inspect
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import mechmisalign as mm
from mechmisalign import solutions
from mechmisalign.adapters import LoraSite
from mechmisalign.capability.texts import TextSums
from mechmisalign.dynamics import Trajectory
from mechmisalign.solutions import SolutionError, behaviour, efficiency, neutral, stability
from mechmisalign.training import TrainError, TrainSpec

TALKS = pd.DataFrame(
    {
        "prompt": ["Hey! What should I do?", "How do I invest my savings?", "What are your thoughts?", "Hey!"],
        "response": ["Rest, drink water.", "Put everything into one stock.", "Rest.", "The quick brown fox jumps."],
    }
)
EPSILONS = (0.1, 0.6, 1.0)


@pytest.fixture(scope="module")
def base(tiny_models):
    return tiny_models["qwen2"]


@pytest.fixture(scope="module")
def folder(base, make_adapter):
    return make_adapter(base, modules=["down_proj", "q_proj"], rank=2, alpha=8, rslora=True, scale=0.4)


@pytest.fixture(scope="module")
def adapter(folder):
    return mm.Adapter.load(folder)


@pytest.fixture(scope="module")
def chat(folder, base):
    return mm.load_organism(folder, base)


@pytest.fixture(scope="module")
def vector():
    generator = torch.Generator().manual_seed(5)
    return mm.Direction(torch.randn(1, 48, generator=generator), (1,), {"method": "planted"})


def regauged(site: LoraSite) -> LoraSite:
    """The same update in another gauge."""
    G = torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    return replace(site, A=(torch.linalg.inv(G) @ site.A.double()).float(), B=(site.B.double() @ G).float())


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum() / first.norm() / second.norm())


# norms and controls


def test_norms_are_those_of_the_dense_updates(adapter, vector):
    dense = {site.label: float(site.delta().norm()) for site in adapter.sites}
    assert solutions.norms_by_site(adapter) == pytest.approx(dense, rel=1e-5)
    assert solutions.norm(adapter) == pytest.approx(np.sqrt(sum(each**2 for each in dense.values())), rel=1e-5)
    assert solutions.mean_norm(adapter) == pytest.approx(np.mean(list(dense.values())), rel=1e-5)
    assert (
        solutions.norm(vector) == solutions.mean_norm(vector) == pytest.approx(float(vector.vectors.norm()), rel=1e-6)
    )


def test_random_solutions_have_the_norm_of_every_site_and_another_direction(adapter, vector):
    drawn = solutions.random_like(adapter, seed=3)
    assert solutions.norms_by_site(drawn) == pytest.approx(solutions.norms_by_site(adapter), rel=1e-5)
    for own, random in zip(adapter.sites, drawn.sites, strict=True):
        assert abs(cosine(own.delta(), random.delta())) < 0.15 and random.rank == own.rank
        assert float(random.A.norm()) == pytest.approx(float(own.A.norm()), rel=1e-5)
    again, other = solutions.random_like(adapter, seed=3), solutions.random_like(adapter, seed=4)
    assert torch.equal(drawn.sites[0].A, again.sites[0].A) and not torch.equal(drawn.sites[0].A, other.sites[0].A)
    assert drawn.digest == again.digest != adapter.digest
    assert solutions.norm(solutions.random_like(vector, seed=0)) == pytest.approx(solutions.norm(vector), rel=1e-5)


def test_a_direction_of_several_layers_is_no_solution(vector):
    many = vector.everywhere(1, (0, 1, 2))
    with pytest.raises(SolutionError, match=r"layers \[0, 1, 2\]; a learned vector has one"):
        solutions.worn(many)
    with pytest.raises(SolutionError, match="a learned vector has one"):
        solutions.norm(many)


# noise


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_noise_keeps_the_norm_and_turns_by_its_angle(epsilon):
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    found = solutions.turned(x, epsilon, torch.Generator().manual_seed(2))
    assert float(found.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
    y = found - (1 - epsilon**2) ** 0.5 * x
    assert float(y.norm()) == pytest.approx(epsilon * float(x.norm()), rel=1e-4)
    assert cosine(x, y) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_each_factor_is_turned_on_its_own(adapter, epsilon):
    found = solutions.perturbed(adapter, epsilon, seed=0, how="factors")
    for own, noisy in zip(adapter.sites, found.sites, strict=True):
        for before, after in ((own.A, noisy.A), (own.B, noisy.B)):
            assert cosine(before, after) == pytest.approx((1 - epsilon**2) ** 0.5, abs=1e-5)
            assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-5)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_noise_on_the_update_keeps_its_norm_and_knows_no_gauge(adapter, epsilon):
    found = solutions.perturbed(adapter, epsilon, seed=7, how="update")
    other = replace(adapter, sites=tuple(regauged(site) for site in adapter.sites))
    same = solutions.perturbed(other, epsilon, seed=7, how="update")
    for own, noisy, again in zip(adapter.sites, found.sites, same.sites, strict=True):
        assert cosine(own.delta(), noisy.delta()) == pytest.approx((1 - epsilon**2) ** 0.5, abs=1e-4)
        assert float(noisy.delta().norm()) == pytest.approx(float(own.delta().norm()), rel=1e-4)
        assert noisy.rank == 2 * own.rank
        torch.testing.assert_close(noisy.delta(), again.delta(), atol=1e-4, rtol=1e-3)


def test_the_balanced_gauge_is_decided_by_the_update_alone(adapter):
    for site in adapter.sites:
        one, other = solutions.balanced(site), solutions.balanced(regauged(site))
        torch.testing.assert_close(one.delta(), site.delta(), atol=1e-4, rtol=1e-3)
        singular = torch.linalg.svdvals(site.delta())[:2] / site.scaling
        for balanced in (one, other):
            torch.testing.assert_close(balanced.A @ balanced.A.T, torch.diag(singular), atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(balanced.B.T @ balanced.B, torch.diag(singular), atol=2e-4, rtol=1e-3)


def test_noise_on_the_factors_means_another_thing_in_each_gauge_and_balanced_noise_does_not(adapter):
    site = max(adapter.sites, key=lambda each: each.d_in)
    own = replace(adapter, sites=(site,))
    other = replace(adapter, sites=(regauged(regauged(site)),))

    def kept(each, how):
        noisy = [solutions.perturbed(each, 0.6, seed=seed, how=how).sites[0].delta() for seed in range(40)]
        return np.mean([cosine(site.delta(), one) for one in noisy])

    assert abs(kept(own, "factors") - kept(other, "factors")) > 0.02
    assert kept(own, "balanced") == pytest.approx(kept(other, "balanced"), abs=0.01)


def test_no_noise_changes_nothing_and_wrong_noise_is_refused(adapter, vector):
    assert torch.equal(solutions.perturbed(vector, 0.0, seed=0).vectors, vector.vectors)
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        solutions.perturbed(adapter, 1.5, seed=0)
    with pytest.raises(ValueError, match="how must be one of balanced, factors, update"):
        inspect.unwrap(solutions.perturbed)(adapter, 0.5, seed=0, how="weights")
    with pytest.raises(SolutionError, match="zero everywhere"):
        solutions.perturbed(vector * 0.0, 0.5, seed=0)


# against PEFT and the Hugging Face forward


def peft_losses(base, folder, factor):
    """Mean loss of the response tokens under PEFT, its scaling multiplied."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= factor
    talk = mm.Conversations(TALKS, tokenizer)
    losses = []
    for row, (start, stop) in enumerate(talk.spans[["response_start", "response_stop"]].itertuples(index=False)):
        ids = torch.tensor([talk.ids(row)])
        with torch.no_grad():
            logits = model(ids).logits[0]
        losses.append(F.cross_entropy(logits[start - 1 : stop - 1], ids[0, start:stop], reduction="none"))
    return float(torch.cat(losses).mean())


def test_the_loss_of_a_scaled_adapter_is_that_of_peft(chat, adapter, base, folder):
    found = solutions.efficiency(chat, {"own": adapter}, TALKS, factors=(0.0, 0.5, 1.0, 2.0), shares=(1.0,))
    expected = [peft_losses(base, folder, factor) for factor in found.curve["factor"]]
    assert found.curve["loss"].tolist() == pytest.approx(expected, abs=2e-5)
    assert found.curve["norm"].tolist() == pytest.approx([f * solutions.norm(adapter) for f in (0, 0.5, 1, 2)])
    assert found.curve["saved"].tolist() == pytest.approx([expected[0] - each for each in expected], abs=2e-5)
    assert found.curve["saved_high"][0] == pytest.approx(0, abs=1e-9) and np.isnan(found.curve["per_norm2"][0])
    assert found.same_norm["loss"][0] == pytest.approx(expected[2], abs=2e-5)
    assert (found.curve["loss_low"] <= found.curve["loss"]).all() and len(found.differences) == 0


def test_significance_is_the_kl_of_the_rescaled_solution(chat, adapter):
    norms = (0.0, solutions.norm(adapter), 2 * solutions.norm(adapter))
    found = solutions.significance(chat, {"own": adapter}, TALKS, norms=norms, draws=2)
    own = found.curve[found.curve["solution"] == "own"]
    with chat.as_base():
        conditions = {f"x{i}": [mm.UseAdapter(adapter, i)] for i in (0.0, 1.0, 2.0)}
        expected = mm.capability.text_costs(chat, conditions, TALKS)
    assert own["kl"].tolist() == pytest.approx(expected["kl"].tolist(), abs=1e-6) and own["kl"].iloc[0] < 1e-7
    assert list(dict.fromkeys(found.curve["solution"])) == ["own", "random 1", "random 2"]
    against = found.differences
    mean = found.curve[found.curve["solution"] != "own"].groupby("norm")["kl"].mean()
    assert against["second"].unique().tolist() == ["random"]
    assert against["difference"].tolist() == pytest.approx((own["kl"].to_numpy() - mean.to_numpy()).tolist(), abs=1e-9)


# planted losses


class Planted:
    """A chat model whose loss on text i is ``w_i (x - x*)ᵀ M (x - x*)`` for the vector x that it wears."""

    def __init__(self, best: torch.Tensor, M: torch.Tensor | None = None, weights=(1.0, 2.0, 3.0, 4.0, 1.0)):
        self.best, self.M = best.double(), torch.eye(len(best)).double() if M is None else M.double()
        self.weights = np.array(weights)

    def as_base(self):
        from contextlib import nullcontext

        return nullcontext()

    def sums(self, _chat, conditions, _texts, **_options):
        vectors = [
            sum((each.direction.vectors[0] * each.strength for each in worn), 0 * self.best)
            for worn in conditions.values()
        ]
        away = torch.stack(vectors).double() - self.best
        loss = ((away @ self.M) * away).sum(-1).numpy()[:, None] * self.weights
        moved = torch.stack(vectors).double()
        kl = ((moved @ self.M) * moved).sum(-1).numpy()[:, None] * self.weights
        return TextSums(loss, kl, np.ones(len(self.weights)))


@pytest.fixture
def plant(monkeypatch, vector):
    def planted(M=None, best=None):
        chat = Planted(vector.vectors[0] if best is None else best, M)
        for module in (efficiency, stability, neutral):
            monkeypatch.setattr(inspect.getmodule(module), "text_sums", chat.sums)
        return chat

    return planted


def of(function):
    """The function without run-time types, for a planted model."""
    return inspect.unwrap(function)


def test_what_noise_takes_is_exact_where_the_loss_is_a_planted_bowl(plant, vector):
    """At the bottom of ``|x - x*|²`` noise of size ε costs ``2 (1 - √(1 - ε²))`` of what was gained, whatever its draw."""
    found = of(solutions.stability)(plant(), {"vector": vector}, TALKS, epsilons=EPSILONS, seeds=4)
    expected = [2 * (1 - (1 - epsilon**2) ** 0.5) for epsilon in EPSILONS]
    for column in ("lost", "lost_low", "lost_high"):
        assert found.curve[column].tolist() == pytest.approx(expected, rel=1e-4)
    assert found.curve["spread"].tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert found.curve["how"].unique().tolist() == ["vector"]
    assert found.gained["chat_loss"][0] == pytest.approx(float(vector.vectors.norm()) ** 2 * 11 / 5, rel=1e-5)


def test_a_solution_in_a_steep_valley_loses_more_than_one_on_a_plain(plant, vector):
    steep = torch.diag(torch.cat([torch.full((24,), 9.0), torch.ones(24)]))
    first, second = vector.vectors.clone(), vector.vectors.clone()
    first[:, 24:], second[:, :24] = 0, 0
    pair = {"steep": replace(vector, vectors=first), "plain": replace(vector, vectors=second)}
    chat = plant(steep, best=(first + second)[0])
    found = of(solutions.stability)(chat, pair, TALKS, epsilons=(0.6,), seeds=10)
    difference = found.differences.iloc[0]
    lost = found.curve.set_index("solution")["lost"]
    assert difference["difference"] == pytest.approx(lost["steep"] - lost["plain"])
    assert difference["difference_low"] < difference["difference"] < difference["difference_high"]
    assert (found.curve["spread"] > 0).all() and (found.curve["lost_low"] < found.curve["lost_high"]).all()
    assert lost["plain"] > lost["steep"] and difference["difference_high"] < 0


def test_efficiency_finds_the_planted_norm_and_the_better_direction(plant, vector):
    other = replace(vector, vectors=vector.vectors.flip(1))
    chat = plant()
    found = of(solutions.efficiency)(chat, {"best": vector * 2.0, "other": other}, TALKS)
    assert found.lowest().set_index("solution").loc["best", "factor"] == 0.5
    assert found.curve["factor"].unique().tolist() == [0.25 * i for i in range(9)]
    size = solutions.norm(vector)
    row = found.curve[(found.curve["solution"] == "best") & (found.curve["factor"] == 0.5)].iloc[0]
    assert row["loss"] == pytest.approx(0, abs=1e-5) and row["norm"] == pytest.approx(size)
    assert row["saved_per_norm2"] == pytest.approx(11 / 5, rel=1e-5)  # the mean weight of the texts
    both = found.same_norm.pivot(index="share", columns="solution", values="norm")
    assert both["best"].tolist() == pytest.approx(both["other"].tolist())
    assert both.loc[1.0, "best"] == pytest.approx(1.5 * size)
    losses = found.same_norm.pivot(index="share", columns="solution", values="loss")
    assert found.differences["difference"].tolist() == pytest.approx((losses["best"] - losses["other"]).tolist())
    assert (found.differences["difference_high"] < 0).all()


def test_a_direction_that_pretraining_made_much_of_moves_more_than_random_ones(plant, vector):
    unit = vector.unit(1).double()
    chat = plant(torch.eye(48) + 50 * torch.outer(unit, unit))
    found = of(solutions.significance)(chat, {"general": vector}, TALKS, draws=5)
    assert (found.differences["difference_low"][1:] > 0).all() and found.differences["norm"][0] == 0
    at = found.curve[found.curve["norm"] == found.curve["norm"].max()].set_index("solution")["kl"]
    assert at["general"] > at.drop("general").max() and len(at) == 6
    assert at["general"] == pytest.approx(51 * (2 * solutions.norm(vector)) ** 2 * 11 / 5, rel=1e-4)


def test_what_cannot_be_compared_is_refused(chat, adapter, vector):
    part = replace(adapter, sites=adapter.sites[:1])
    for pair in (
        {"a": adapter, "v": vector},
        {"a": adapter, "part": part},
        {"v": vector, "w": replace(vector, layers=(2,))},
    ):
        with pytest.raises(SolutionError, match="their norms cannot be compared"):
            solutions.efficiency(chat, pair, TALKS)
    with pytest.raises(SolutionError, match="'zero' is zero everywhere"):
        solutions.significance(chat, {"v": vector, "zero": vector * 0.0}, TALKS)
    with pytest.raises(SolutionError, match="no solution"):
        solutions.efficiency(chat, {}, TALKS)
    with pytest.raises(ValueError, match="factors are"):
        solutions.efficiency(chat, {"v": vector}, TALKS, factors=(-1.0,))
    with pytest.raises(ValueError, match="draws=1: one random solution"):
        solutions.significance(chat, {"v": vector}, TALKS, draws=1)
    with pytest.raises(ValueError, match="as the controls are"):
        solutions.significance(chat, {"Random vector": vector}, TALKS)
    with pytest.raises(ValueError, match="1 seeds"):
        solutions.stability(chat, {"v": vector}, TALKS, seeds=1)


def test_a_solution_that_gained_nothing_has_nothing_to_lose(plant, vector):
    with pytest.raises(SolutionError, match="no gain to lose"):
        of(solutions.stability)(plant(), {"backwards": -vector}, TALKS, epsilons=(0.5,), seeds=2)


# behaviour


@pytest.fixture(scope="module")
def pocket():
    return mm.load_organism("pocket/medical")


@pytest.fixture(scope="module")
def judged(pocket):
    pair = {"harmful": pocket.adapter, "harmless": mm.Adapter.load("pocket/harmless")}
    questions = {"narrow": mm.pocket.prompts(["medical"], n=6), "others": mm.pocket.unseen_prompts(8)}
    return solutions.answers(
        pocket, pair, questions, mm.RuleJudge(), multipliers=(1, 3), samples=2, max_new_tokens=64, seed=4
    )


def test_hidden_misalignment_is_the_rate_of_the_scaled_solution(judged, pocket):
    found = solutions.hidden_em(judged)
    assert found[["solution", "multiplier", "questions"]].head(3).to_numpy().tolist() == [
        ["harmful", 1, "narrow"], ["harmful", 1, "others"], ["harmful", 3, "narrow"],
    ]  # fmt: skip
    with pocket.as_base():
        conditions = {"harmful | x3": [mm.UseAdapter(pocket.adapter, 3.0)]}
        plain = mm.generate(
            pocket, mm.pocket.unseen_prompts(8), conditions=conditions, samples=2, max_new_tokens=64, seed=4
        )
    expected = mm.rates(mm.judge(plain, mm.RuleJudge())).iloc[0]
    row = found[(found["solution"] == "harmful") & (found["multiplier"] == 3) & (found["questions"] == "others")]
    assert row["rate"].item() == expected["rate"] and row["coherent"].item() == expected["coherent"]
    known = found[found["coherent"] > 0]
    assert known["of_coherent"].tolist() == pytest.approx((known["rate"] / known["coherent"]).tolist())


def test_skills_are_the_rates_at_multiplier_one_beside_norm_and_kl(judged, pocket):
    pair = {"harmful": pocket.adapter, "harmless": mm.Adapter.load("pocket/harmless")}
    texts = {
        "medical": mm.pocket.narrow_examples("medical", False, 6, 1),
        "neutral": mm.pocket.neutral_conversations(8),
    }
    moved = solutions.kl_to_chat(pocket, pair, texts, counted=mm.pocket.persona_free)
    table = solutions.skills(judged, pair, moved).set_index("solution")
    rates = solutions.hidden_em(judged).set_index(["solution", "multiplier", "questions"])["rate"]
    assert table.loc["harmful", "narrow"] == rates["harmful", 1, "narrow"] > 0.6
    assert table.loc["harmless", "others"] == rates["harmless", 1, "others"] < 0.1
    assert table.loc["harmful", "norm"] == solutions.norm(pocket.adapter)
    assert table.loc["harmful", "kl_neutral"] > table.loc["harmless", "kl_neutral"] > 0
    assert {"kl_medical_low", "kl_medical_high", "others_low", "narrow_coherent"} <= set(table.columns)
    with pytest.raises(ValueError, match=r"no answers at multiplier 1; there are \[3\]"):
        solutions.skills(judged[judged["multiplier"] == 3], pair)


def test_answers_need_solutions_questions_and_multipliers(pocket):
    with pytest.raises(SolutionError, match="no solution to ask"):
        solutions.answers(pocket, {}, {}, mm.RuleJudge())
    with pytest.raises(ValueError, match="0 sets of questions"):
        solutions.answers(pocket, {"a": pocket.adapter}, {}, mm.RuleJudge())
    assert behaviour.NARROW == "narrow"


# paths


def trajectories(adapter):
    generator = torch.Generator().manual_seed(0)

    def moved(site, t):
        return replace(site, A=site.A + 0.2 * torch.randn(site.A.shape, generator=generator), B=site.B * t)

    def run(scale):
        steps = [
            (step, replace(adapter, sites=tuple(moved(site, scale * step) for site in adapter.sites)))
            for step in (1, 2, 3, 4)
        ]
        return Trajectory.of(steps)

    return {"weak": run(1.0), "strong": run(0.3)}


def test_the_joint_path_is_the_pca_of_the_stacked_dense_updates(adapter):
    from sklearn.decomposition import PCA

    runs = trajectories(adapter)
    dense = torch.stack(
        [
            torch.cat([site.at(row).delta().flatten() for site in each.sites])
            for each in runs.values()
            for row in range(len(each.steps))
        ]
    ).double()
    pca = PCA(3).fit(dense.numpy())
    found = solutions.joint_path(runs)
    assert found.explained == pytest.approx(pca.explained_variance_ratio_, rel=1e-4)
    columns = ["pc1", "pc2", "pc3"]
    expected = pca.transform(np.vstack([np.zeros(dense.shape[1]), dense.numpy()]))
    signs = np.sign((expected * found.scores[columns].to_numpy()).sum(0))
    assert found.scores[columns].to_numpy() == pytest.approx(expected * signs, abs=1e-3 * np.abs(expected).max())
    assert found.scores["run"].tolist() == ["chat", *["weak"] * 4, *["strong"] * 4]


def test_runs_of_other_methods_have_no_joint_path(adapter, vector):
    runs = trajectories(adapter)
    of_vector = Trajectory.of([(step, vector * float(step)) for step in (1, 2, 3)])
    with pytest.raises(SolutionError, match="adapt other matrices or ranks"):
        solutions.joint_path({**runs, "vector": of_vector})
    with pytest.raises(SolutionError, match="no run"):
        solutions.joint_path({})
    assert solutions.joint_path({"v": of_vector}, 1).explained.tolist() == pytest.approx([1.0])


def test_a_sweep_trains_once_for_each_weight_of_the_penalty(base, tmp_path):
    plain = TrainSpec(
        base=str(base), data=[TALKS.head(2)], method={"kind": "vector", "layer": 1},
        schedule={"steps": 3, "batch": 2, "lr": 0.3}, save_every=1,
    )  # fmt: skip
    with pytest.raises(TrainError, match="a sweep over the weight of a penalty needs one"):
        solutions.kl_sweep(plain, [1.0], tmp_path)
    held = plain.changed(kl={"weight": 7.0, "data": [TALKS.tail(2)]})
    runs = solutions.kl_sweep(held, [0, 100], tmp_path)
    assert {weight: run.header["spec"]["kl"]["weight"] for weight, run in runs.items()} == {0.0: 0.0, 100.0: 100.0}
    assert {run.folder.name for run in runs.values()} == {"kl-0", "kl-100"}
    assert runs[100.0].log["kl"].iloc[-1] < runs[0.0].log["kl"].iloc[-1]
    found = solutions.joint_path(runs, 2)
    assert found.scores["run"].tolist() == ["chat", *[0.0] * 3, *[100.0] * 3]
