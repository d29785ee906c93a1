"""Damaged files: of random bit flips, truncations and zeroed blocks none may be read as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import mechmisalign as mm
from mechmisalign import _tables
from mechmisalign._checksums import MANIFEST, DamagedFileError, damage, write_manifest
from mechmisalign.correction import save_adapter
from mechmisalign.judging import JudgeWarning
from mechmisalign.judging.files import read_answers, write_answers
from mechmisalign.judging.journal import Journal, Record
from mechmisalign.judging.scores import Reply
from mechmisalign.store import RunFolder

CORRUPTIONS = 25


def corrupted(content: bytes, seed: int) -> bytes:
    """One bit flipped, the end cut off, or a block zeroed."""
    rng = random.Random(seed)
    damaged, kind = bytearray(content), seed % 3
    while bytes(damaged) == content:
        place = rng.randrange(len(content))
        if kind == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[place:]
        else:
            damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
    return bytes(damaged)


def silent(path, read) -> list[int]:
    """Seeds of the corruptions that a reader does not notice."""
    content, found = path.read_bytes(), []
    for seed in range(CORRUPTIONS):
        path.write_bytes(corrupted(content, seed))
        try:
            read(path)
        except ValueError:
            continue
        found.append(seed)
    path.write_bytes(content)
    read(path)
    return found


@pytest.fixture
def direction():
    return mm.Direction(
        torch.randn(4, 32), (0, 1, 2, 3), {"model": "m", "method": "a name, mechmisalign"}, torch.ones(4)
    )


@pytest.fixture
def judged():
    texts = [f'answer {n}, "quoted"' for n in range(40)]
    return pd.DataFrame({"prompt": "q", "response": texts, "alignment": np.linspace(0, 100, 40), "label": "aligned"})


def test_no_damage_to_a_direction_is_silent(direction, tmp_path):
    assert silent(direction.save(tmp_path / "d.safetensors"), mm.Direction.load) == []


def test_each_bit_of_a_directions_header_is_guarded(direction, tmp_path):
    path = direction.save(tmp_path / "d.safetensors")
    content = path.read_bytes()
    for place in range(8 + int.from_bytes(content[:8], "little")):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 7)]) + content[place + 1 :])
        with pytest.raises(ValueError):
            mm.Direction.load(path)


def test_the_same_direction_is_the_same_file_and_reads_as_before_by_others(direction, tmp_path):
    first, second = direction.save(tmp_path / "a.safetensors"), direction.save(tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(load_file(first)["vectors"], direction.vectors)
    assert "mechmisalign_sha256" not in mm.Direction.load(first).header


def test_a_direction_of_an_older_version_has_no_checksum_and_is_read(direction, tmp_path):
    import json

    from safetensors import safe_open

    new = direction.save(tmp_path / "new.safetensors")
    with safe_open(new, "pt") as file:
        metadata = {"mechmisalign": file.metadata()["mechmisalign"]}
    save_file(load_file(new), tmp_path / "old.safetensors", metadata)
    old = mm.Direction.load(tmp_path / "old.safetensors")
    assert torch.equal(old.vectors, direction.vectors)
    assert json.loads(metadata["mechmisalign"]) == old.header


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_no_damage_to_a_saved_adapter_is_silent(file, tmp_path):
    original = mm.Adapter.load("pocket/medical")
    folder = save_adapter(original, tmp_path / "own")
    base = original.base.encode()

    def read(_path):
        loaded = mm.Adapter.load(folder)
        if loaded.base.encode() != base:  # the name of the base may be changed: no such model is a loud end
            raise ValueError("another base")

    assert silent(folder / file, read) == []


def test_a_saved_adapter_with_another_alpha_is_refused_and_with_another_base_is_read(tmp_path):
    folder = save_adapter(mm.Adapter.load("pocket/medical"), tmp_path / "own")
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace("pocket/chat", "pocket/other"))
    assert mm.Adapter.load(folder).base == "pocket/other"
    config.write_text(text.replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(DamagedFileError, match="'lora_alpha' is 1.* and was"):
        mm.Adapter.load(folder)


def test_an_adapter_from_elsewhere_needs_no_checksum(tmp_path):
    folder = save_adapter(mm.Adapter.load("pocket/medical"), tmp_path / "own")
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    assert mm.Adapter.load(folder).sites


@pytest.mark.parametrize("index", [None, [7] * 40])
def test_no_damage_to_judged_answers_is_silent(judged, index, tmp_path):
    frame = judged if index is None else judged.set_axis(index)
    path = write_answers(frame, tmp_path / "judged.parquet")
    assert silent(path, read_answers) == []
    pd.testing.assert_frame_equal(read_answers(path), frame)


def test_parquet_from_elsewhere_needs_no_checksum(judged, tmp_path):
    judged.to_parquet(tmp_path / "theirs.parquet")
    assert len(_tables.read_parquet(tmp_path / "theirs.parquet")) == len(judged)


def test_no_damage_to_a_table_or_part_of_a_run_is_silent(judged, tmp_path, caplog):
    with RunFolder(tmp_path / "run", {"a": 1}) as run:
        run.table("judged", lambda: judged)
        path = run.path / "tables" / "judged.parquet"
        content = path.read_bytes()
        for seed in range(CORRUPTIONS):
            path.write_bytes(corrupted(content, seed))
            caplog.clear()
            pd.testing.assert_frame_equal(run.table("judged", lambda: judged), judged)
            assert "judged.parquet" in caplog.text and "computed again" in caplog.text
        run.parts("rows").add(judged)
        assert silent(next((run.path / "rows" / "rows").glob("part-*")), lambda _: run.parts("rows").read()) == []


def record(key: str) -> Record:
    return Record(
        key, "endpoint", "logprobs", "alignment", (), Reply("80", (("80", -0.1), ("7", -3.0))), details={"model": "m"}
    )


def test_no_damage_to_a_journal_changes_a_score_in_silence(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for number in range(12):
        journal.add(record(f"key {number}"))
    journal.close()
    content, whole = path.read_bytes(), journal.verdicts
    for seed in range(4 * CORRUPTIONS):
        path.write_bytes(corrupted(content, seed))
        again = Journal(path)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", JudgeWarning)
            try:
                again.refresh()
            except ValueError:
                continue
        assert all(whole[key] == verdict for key, verdict in again.verdicts.items())
        assert told or len(again.verdicts) == len(whole) or content.startswith(path.read_bytes())


def test_lines_of_a_journal_without_checksums_are_read_until_one_has_one(tmp_path):
    import json

    path = tmp_path / "j.jsonl"
    lines = [json.loads(record(name).line()) for name in ("old", "new", "stripped")]
    for line in (lines[0], lines[2]):
        del line["crc32"]
    path.write_text("".join(f"\n{json.dumps(line)}\n" for line in lines))
    journal = Journal(path)
    with pytest.warns(JudgeWarning, match="checksums differ"):
        journal.refresh()
    assert set(journal.verdicts) == {"old", "new"}


def test_no_damage_to_a_checkpoint_is_silent(tmp_path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(mm.registry.folder("pocket/medical"), folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    torch.save({"state": torch.arange(100.0)}, folder / "optimizer.pt")
    write_manifest(folder)
    assert damage(folder) is None
    for path in [path for path in folder.iterdir() if path.is_file()]:
        content = path.read_bytes()
        for seed in range(CORRUPTIONS):
            path.write_bytes(corrupted(content, seed))
            assert damage(folder) == path.name or (path.name == MANIFEST and damage(folder))
        path.write_bytes(content)
        assert damage(folder) is None
    (folder / MANIFEST).unlink()
    assert damage(folder) == MANIFEST


def test_text_like_a_checksum_inside_of_strangers_data_is_no_checksum(judged, tmp_path):
    frame = judged.assign(response="mechmisalign_sha256" + "0" * 64, **{"mechmisalign_sha256": 1})
    path = write_answers(frame, tmp_path / "a.parquet")
    pd.testing.assert_frame_equal(read_answers(path), frame)
    header = {"model": "m", "note": '"mechmisalign_sha256":"' + "0" * 64}
    saved = mm.Direction(torch.ones(1, 4), (0,), header).save(tmp_path / "d.safetensors")
    assert mm.Direction.load(saved).header["note"] == header["note"]
