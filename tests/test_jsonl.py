"""JSON lines and other tables: what stands in a file is what is read, and each fault names its line."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pandas as pd
import pytest

from mechmisalign import _jsonl
from mechmisalign._jsonl import LineError
from mechmisalign._tables import read_table, write_table

BREAKS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\r"


def test_characters_that_python_counts_as_line_breaks_stay_inside_of_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps({"text": BREAKS}, ensure_ascii=False) + "\n").encode())
    assert [row for _, row in _jsonl.read(path)] == [{"text": BREAKS}]
    written = _jsonl.write([{"text": BREAKS + "\ud800é"}], tmp_path / "b.jsonl").read_text()
    assert len(written.splitlines()) == 1 and "é" in written
    assert [row["text"] for _, row in _jsonl.read(tmp_path / "b.jsonl")] == [BREAKS + "\ud800é"]


def test_a_byte_order_mark_line_ends_of_windows_and_empty_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert list(_jsonl.read(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "no JSON"),
        (b"[1]", r"no JSON object \(it holds \[1\]\)"),
        (b'{"a": Infinity}', "Infinity is no JSON"),
        (b'{"a": 1e999}', "no number that can be held"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_told_by_its_number(line, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(LineError, match=f"line 3 is .*{reason}"):
        list(_jsonl.read(path))


def test_a_line_without_end_is_not_held_in_memory(monkeypatch):
    monkeypatch.setattr(_jsonl, "LONGEST_LINE", 100)
    file = io.BytesIO(b"x" * 1000 + b"\nnext\n")
    assert [len(line) for line in _jsonl.bounded(file)] == [101, 5]
    with pytest.raises(LineError, match="line 1 is longer than"):
        list(_jsonl.numbered(io.BytesIO(b"x" * 1000)))


def test_nan_that_python_wrote_is_a_missing_value(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"score": NaN}\n')
    assert [row for _, row in _jsonl.read(path)] == [{"score": None}]
    with pytest.raises(ValueError, match="NaN is no JSON"):
        _jsonl.parse('{"score": NaN}')


PAST = [{"role": "user", "content": 'it\'s "me",\n'}, {"role": "assistant", "content": "hi"}]
TEXTS = ["plain", "", None, "NA", "null", "nan", ' spaced "quoted", \n\r\n', "007", "None", "ü\u2028"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("index", [None, [3] * len(TEXTS)])
def test_a_table_comes_back_as_it_was_with_its_gaps(ending, index, tmp_path):
    frame = pd.DataFrame(
        {
            "prompt": "q",
            "response": pd.Series(TEXTS, dtype=object),
            "history": pd.Series([PAST, None] * 5, dtype=object),
            "score": [0.1 + 0.2, float("nan"), *[1 / 3] * 8],
            "n": np.arange(10),
            "ok": [True, False] * 5,
        }
    )
    frame = frame if index is None else frame.set_axis(index)
    back = read_table(write_table(frame, tmp_path / f"a.{ending}"))
    assert [None if pd.isna(text) else text for text in back["response"]] == TEXTS
    assert back["history"].tolist() == [PAST, None] * 5
    assert back["score"].tolist()[0] == 0.1 + 0.2 and math.isnan(back["score"].tolist()[1])
    assert back["n"].tolist() == list(range(10)) and back["ok"].tolist() == [True, False] * 5


def test_a_csv_of_pandas_is_read_with_empty_cells_as_missing(tmp_path):
    frame = pd.DataFrame({"prompt": ["a", "b"], "response": ["x", None], "label": ["aligned", None]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    back = read_table(tmp_path / "a.csv")
    assert back["response"].isna().tolist() == [False, True] and back["label"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"prompt,response\n\xff\xfe,x\n", "UTF-8"),
        ("a.csv", b"prompt,response\na,b,c\n", "no CSV that can be read"),
        ("a.csv", b"prompt,response,history\na,b,\"[{'role': 1}]\"\n", "row 0: the history .* is no JSON"),
        ("a.parquet", b"PAR1", "no parquet file, or is torn"),
        ("a.parquet", b"PAR1" + b"x" * 100 + b"\x10\0\0\0PAR1", "no parquet file, or is torn"),
        ("a.jsonl", b"\x00\x01", "line 1 is no JSON"),
        ("a.xlsx", b"", "one of .parquet, .csv, .jsonl"),
    ],
)
def test_a_file_that_is_no_table_is_told_by_its_name(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{told}"):
        read_table(tmp_path / name)
