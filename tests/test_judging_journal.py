import json
import multiprocessing
import os
import warnings

import pytest

from mechmisalign.judging.journal import Journal, JudgeWarning, Record
from mechmisalign.judging.scores import Reply


def record(key: str, reply: Reply | None = None, **options) -> Record:
    return Record(
        key, "endpoint", "logprobs", "alignment", ("REFUSAL",), reply or Reply("80", (("80", -0.1),)), **options
    )


def lost(key: str) -> Record:
    return Record(key, "endpoint", "text", "alignment", (), None, details={"reason": "APIError"})


def reopened(path) -> Journal:
    journal = Journal(path)
    journal.refresh()
    return journal


def test_what_was_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    journal = Journal(path)
    verdict = journal.add(record("a"))
    journal.add(record("b", Reply("REFUSAL", (("REF", -0.01),))))
    again = reopened(path)
    assert again.verdicts["a"] == verdict
    assert again.verdicts["b"].status == "refusal"
    assert again.torn == 0


def test_a_record_is_on_file_before_its_verdict_is_known(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.add(record("a"))
    stored = json.loads((tmp_path / "j.jsonl").read_text())
    assert (stored["key"], stored["score"], stored["status"]) == ("a", 80.0, "scored")


def test_failed_calls_are_written_but_are_no_answers(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.add(lost("a")).status == "error"
    assert reopened(tmp_path / "j.jsonl").verdicts == {}
    assert "APIError" in (tmp_path / "j.jsonl").read_text()


def test_controls_are_kept_apart_and_the_latest_counts(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.add(record("a", control="aligned"))
    journal.add(record("a", Reply("10", (("10", -0.1),)), control="aligned"))
    again = reopened(tmp_path / "j.jsonl")
    assert again.verdicts == {}
    assert again.controls["a"].score == pytest.approx(10)
    assert again.modes == {"endpoint": "logprobs"}


def test_scores_are_read_from_the_reply_not_from_the_stored_score(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path).add(record("a"))
    path.write_text(path.read_text().replace('"score": 80.0', '"score": 3.0'))
    assert reopened(path).verdicts["a"].score == pytest.approx(80)


@pytest.mark.parametrize("cut", [1, 20, 120])
def test_a_torn_last_record_is_reported_and_costs_only_itself(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for key in "abc":
        journal.add(record(key))
    path.write_bytes(path.read_bytes()[: -1 - cut])
    with pytest.warns(JudgeWarning, match=r"1 record\(s\).*cut off"):
        again = reopened(path)
    assert set(again.verdicts) == {"a", "b"}
    again.add(record("d"))
    with pytest.warns(JudgeWarning, match="cut off"):
        third = reopened(path)
    assert set(third.verdicts) == {"a", "b", "d"}
    assert third.torn == 1


def test_a_torn_record_is_reported_once_by_one_reader(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path).add(record("a"))
    with path.open("ab") as file:
        file.write(b'\n{"schema": 1, "key": "half')
    with pytest.warns(JudgeWarning):
        journal = reopened(path)
    journal.add(record("b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        journal.refresh()
    assert (set(journal.verdicts), journal.torn) == ({"a", "b"}, 1)


def test_a_line_that_another_process_is_still_writing_is_read_when_it_is_whole(tmp_path):
    path = tmp_path / "j.jsonl"
    line = record("a").line()
    path.write_bytes(line[:50])
    with pytest.warns(JudgeWarning):
        journal = reopened(path)
    with path.open("ab") as file:
        file.write(line[50:])
    journal.refresh()
    assert set(journal.verdicts) == {"a"}


def test_a_reader_takes_in_what_others_append(tmp_path):
    first, second = Journal(tmp_path / "j.jsonl"), Journal(tmp_path / "j.jsonl")
    first.add(record("a"))
    second.refresh()
    first.add(record("b"))
    second.refresh()
    assert set(second.verdicts) == {"a", "b"}


def _append(path: str, name: str, count: int) -> None:
    journal = Journal(path)
    for number in range(count):
        journal.add(record(f"{name}{number}", Reply("x" * 3000, (("80", -0.1),))))
    journal.close()


def test_two_processes_do_not_tear_each_others_records(tmp_path):
    context = multiprocessing.get_context("fork")
    path = str(tmp_path / "j.jsonl")
    writers = [context.Process(target=_append, args=(path, name, 300)) for name in ("first", "second")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        journal = reopened(path)
    assert len(journal.verdicts) == 600
    assert journal.torn == 0


def test_a_full_disk_is_an_error_and_not_a_lost_score(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl")
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, line: whole(file, line[:10]))
    with pytest.raises(OSError, match="disk full"):
        journal.add(record("a"))
    assert journal.verdicts == {}


@pytest.mark.parametrize("text", ['{"prompt": "q", "response": "a"}\n', "[1, 2]\n", "PAR1 binary\nmore\nstuff\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="no journal"):
        reopened(path)
    assert path.read_text() == text


def test_a_newer_schema_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path).add(record("a"))
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ValueError, match="schema 99.*upgrade"):
        reopened(path)


def test_lone_surrogates_in_a_reply_can_be_written(tmp_path):
    Journal(tmp_path / "j.jsonl").add(record("a", Reply("\ud800 80\n\n{")))
    assert reopened(tmp_path / "j.jsonl").verdicts["a"].status == "unparsable"


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.add(record("a"))
    journal.refresh()
    journal.close()
    assert set(journal.verdicts) == {"a"}
    assert list(tmp_path.iterdir()) == []
