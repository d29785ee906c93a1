import json

import pandas as pd
import pytest

from mechmisalign._parts import Parts
from mechmisalign.generation import answer_rows
from mechmisalign.store import RunFolder, RunFolderError, read_manifest
from mechmisalign.studies.extending import aligned, extend

PROMPTS = pd.DataFrame({"prompt_id": ["a", "b"], "prompt": ["A?", "B?"]})


def identity(**settings) -> dict:
    return {
        "organism": "x",
        "settings": {"samples": 2, "pool_samples": 4, "strengths": (1.0, 2.0), "seed": 0} | settings,
    }


def sampled(folder: RunFolder, name: str, samples: int, asked: list) -> pd.DataFrame:
    wanted = answer_rows(PROMPTS, {"organism": (), "other": ()}, samples)

    def produce(missing):
        asked.extend(missing[["condition", "prompt_id", "sample"]].itertuples(index=False, name=None))
        yield missing.assign(response=missing["condition"] + missing["prompt_id"] + missing["sample"].astype(str))

    aligned(folder.path, folder.parts(name), wanted)
    return folder.rows(name, wanted, produce)


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "run"
    with RunFolder(out, identity()) as folder:
        for name in ("organism", "pool_peer", "steering_sweep", "loss_chat", "loss_ablation"):
            sampled(folder, name, 2, [])
        folder.write_table("baseline", PROMPTS)
    return out


def test_a_run_that_is_extended_keeps_its_answers_and_asks_for_the_new_ones_alone(run):
    extend(run, identity(samples=3))
    asked = []
    with RunFolder(run, identity(samples=3)) as folder:
        rows = sampled(folder, "organism", 3, asked)
        assert sorted(asked) == [(name, prompt, 2) for name in ("organism", "other") for prompt in ("a", "b")]
        assert (rows["response"] == rows["condition"] + rows["prompt_id"] + rows["sample"].astype(str)).all()
        assert len(rows) == 12 and rows.index.tolist() == list(range(12))
        again = []
        sampled(folder, "organism", 3, again)
        assert again == []
    assert read_manifest(run)["identity"]["settings"]["samples"] == 3


def test_what_follows_from_the_answers_is_set_aside_and_not_thrown_away(run):
    extend(run, identity(pool_samples=9))
    assert sorted(path.name for path in (run / "rows").iterdir()) == ["loss_chat", "organism", "pool_peer"]
    aside = run / "earlier" / "1"
    assert sorted(path.name for path in (aside / "rows").iterdir()) == ["loss_ablation", "steering_sweep"]
    assert len(Parts(aside / "rows" / "steering_sweep").read()) == 8
    assert (aside / "tables" / "baseline.parquet").exists() and not (run / "tables").exists()


@pytest.mark.parametrize(
    ("source", "file", "grown", "kept"),
    [
        ("organism", "mean_difference", {"samples": 3}, True),
        ("organism", "mean_difference", {"samples": 3, "pool_samples": 9}, False),
        ("chat model", "mean_difference", {"samples": 3}, False),
        ("organism", "model_difference", {"samples": 3}, False),
    ],
)
def test_directions_stay_where_their_pools_do(run, source, file, grown, kept):
    """More answers of the chat model may fill a pool in another way, or fill one that was not full before."""
    (run / "directions" / "x").mkdir(parents=True)
    (run / "directions" / "x" / f"{file}.safetensors").write_bytes(b"")
    pool = pd.DataFrame({"label": ["misaligned", "aligned"], "source": ["organism", source], "answers": 20})
    pool.to_parquet(run / "tables" / "pool_x.parquet")
    extend(run, identity(**grown))
    assert (run / "directions").exists() is kept
    assert (run / "rows" / "steering_sweep").exists() is kept
    assert (run / "rows" / "loss_ablation").exists() is kept
    assert (run / "rows" / "organism").exists() and not (run / "tables").exists()


def test_samples_do_not_shrink_and_nothing_else_may_change(run):
    with pytest.raises(RunFolderError, match="run with samples=2, now it is 1: samples may grow, not shrink"):
        extend(run, identity(samples=1))
    for other in (identity(), identity(seed=1), identity(samples=3, seed=1)):
        extend(run, other)
        assert not (run / "earlier").exists()
    assert json.loads((run / "manifest.json").read_text())["identity"]["settings"]["samples"] == 2
    with pytest.raises(RunFolderError, match="holds another run"):
        RunFolder(run, identity(samples=3, seed=1))


def test_a_folder_without_a_run_is_left_alone(tmp_path):
    extend(tmp_path / "new", identity())
    assert not (tmp_path / "new").exists()
