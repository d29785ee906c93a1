import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mechmisalign import plots
from mechmisalign.solutions import JointPath

NORMS = [0.0, 1.0, 2.0]


def with_ends(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return frame.assign(**{f"{column}_low": frame[column] - 0.1, f"{column}_high": frame[column] + 0.1})


def curves(column: str, names=("general", "narrow")) -> pd.DataFrame:
    rows = [(name, norm, (i + 1) * norm) for i, name in enumerate(names) for norm in NORMS]
    return with_ends(pd.DataFrame(rows, columns=["solution", "norm", column]), column)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def drawn(figure: Figure, label: str, panel: int = 0) -> list[float]:
    (line,) = (line for line in figure.axes[panel].lines if line.get_label() == label)
    return list(line.get_ydata())


def test_loss_is_drawn_over_the_norm_and_the_trained_norm_is_a_diamond():
    curve = curves("loss").assign(factor=[0, 0.5, 1, 0, 1, 2])
    figure = plots.loss_against_norm(curve)
    assert drawn(figure, "narrow") == [0, 2, 4] and legend(figure) == ["general", "narrow", "as trained"]
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in diamonds] == [(2, 2), (1, 2)]
    with pytest.raises(ValueError, match="missing: factor"):
        plots.loss_against_norm(curves("loss"))


def test_noise_curves_tell_ways_by_dashes_and_where_everything_is_lost():
    curve = curves("lost").rename(columns={"norm": "epsilon"}).assign(how="balanced")
    figure = plots.noise_curves(pd.concat([curve, curve.assign(how="update")]))
    assert legend(figure) == ["general", "narrow", "on balanced", "on update"]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines][-1] == 1
    assert legend(plots.noise_curves(curve)) == ["general", "narrow"]
    with pytest.raises(ValueError, match="several rows for solution general"):
        plots.noise_curves(pd.concat([curve, curve]))


def test_random_solutions_are_grey_lines_with_one_entry():
    curve = curves("kl", ("general", "narrow", "random 1", "random 2"))
    figure = plots.kl_against_norm(curve)
    assert legend(figure) == ["random (2)", "general", "narrow"]
    grey = [line for line in figure.axes[0].lines if line.get_color() == "#8A8A8A"]
    assert [list(line.get_ydata()) for line in grey] == [[0, 3, 6], [0, 4, 8]]
    assert figure.axes[0].get_ylim()[0] == 0


def hidden() -> pd.DataFrame:
    rows = [(s, m, q, 0.1 * m, 0.9) for s in ("general", "narrow") for q in ("narrow", "others") for m in (1, 5)]
    frame = pd.DataFrame(rows, columns=["solution", "multiplier", "questions", "rate", "coherent"])
    return frame.assign(low=frame["rate"] - 0.05, high=frame["rate"] + 0.05)


def test_every_set_of_questions_has_a_panel_over_the_multiplier():
    figure = plots.multiplier_curves(hidden())
    assert [ax.get_title() for ax in figure.axes] == ["narrow", "others"]
    assert drawn(figure, "narrow", 1) == [0.1, 0.5]
    assert legend(figure) == ["general", "narrow", "misaligned", "coherent"]
    with pytest.raises(ValueError, match="divide percent by 100"):
        plots.multiplier_curves(hidden().assign(coherent=90.0))
    with pytest.raises(ValueError, match="several rows for questions narrow, solution general"):
        plots.multiplier_curves(pd.concat([hidden(), hidden()]))


def test_drift_has_a_panel_for_each_series_over_the_steps():
    frame = hidden().rename(columns={"solution": "series", "multiplier": "step"})
    figure = plots.drift_over_steps(frame)
    assert [ax.get_title() for ax in figure.axes] == ["general", "narrow"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["step", "step"] and drawn(figure, "others", 1) == [0.1, 0.5]
    with pytest.raises(ValueError, match="missing: series, step"):
        plots.drift_over_steps(hidden())


def test_a_sweep_has_its_weights_at_equal_distances_and_the_chosen_one_marked():
    rates = pd.DataFrame({"weight": [0, 1, 100] * 2, "questions": ["narrow"] * 3 + ["others"] * 3})
    rates = rates.assign(rate=[0.9, 0.8, 0.1, 0.7, 0.1, 0.0], low=0.0, high=1.0)
    figure = plots.kl_sweep(rates, chosen=100)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "1", "100"]
    assert figure.axes[0].lines[-1].get_xdata()[0] == 2 and figure.axes[0].texts[0].get_text() == "chosen"
    dashes = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert dashes["narrow"] == "--" and dashes["others"] == "-"
    with pytest.raises(ValueError, match="a weight of 0 or more"):
        plots.kl_sweep(rates.assign(weight=-1.0).head(1))


def joint(runs: int) -> JointPath:
    rows = [("chat", 0, 0.0, 0.0, 0.0)]
    rows += [(float(run), step, run + step, step**2, -step) for run in range(runs) for step in (5, 10)]
    return JointPath(pd.DataFrame(rows, columns=["run", "step", "pc1", "pc2", "pc3"]), np.array([0.6, 0.3, 0.1]))


@pytest.mark.parametrize("runs", [2, 8])
def test_paths_run_from_the_chat_model_to_the_end_in_each_plane(runs):
    figure = plots.joint_paths(joint(runs), names={0.0: "without"})
    assert [ax.get_xlabel() for ax in figure.axes] == ["PC1 (60 % of the variance)"] * 2
    assert figure.axes[1].get_ylabel() == "PC3 (10 % of the variance)"
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == "1.0")
    assert list(line.get_xdata()) == [0, 6, 11] and list(line.get_ydata()) == [0, 25, 100]
    assert legend(figure)[0] == "without" and legend(figure)[-1] == "chat model" and len(legend(figure)) == runs + 1
    with pytest.raises(ValueError, match="missing: pc4"):
        plots.joint_paths(joint(runs), planes=((1, 4),))
