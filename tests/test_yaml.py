"""YAML as people mean it, bounded, with errors of one line."""

from __future__ import annotations

import pytest

from mechmisalign import _yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on: 1e-3\nno: off", {"on": 0.001, "no": "off"}),
        ("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        (
            "a: &a {x: 1}\nb: &b {x: 2, z: 3}\nc: {<<: [*a, *b]}",
            {"a": {"x": 1}, "b": {"x": 2, "z": 3}, "c": {"x": 1, "z": 3}},
        ),
        ("b: {<<: &q {<<: {k: 1}, k: 2}}\nc: *q", {"b": {"k": 2}, "c": {"k": 2}}),
        ("a: &a [1]\nb: [*a, *a]", {"a": [1], "b": [[1], [1]]}),
        ("", None),
    ],
)
def test_values_aliases_and_merge_keys_are_read(text, value):
    assert _yaml.read(text) == value


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (laughs(9), "aliases stand for more than 100,000 values"),
        ("a: &a {<<: *a}", "an alias stands inside of what it names"),
        ("a: &a [*a]", "an alias stands inside of what it names"),
        ("a: 1\nb: 2\na: 3", r"the key 'a' stands twice \(line 3, column 1, at 'a: 3'\)"),
        ("a: {<<: {x: 1}, <<: {y: 1}}", "the key '<<' stands twice"),
        ("[" * 5000, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_what_cannot_be_read_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        _yaml.read(text)


def test_a_long_document_without_aliases_is_no_bomb():
    assert len(_yaml.read("\n".join(f"- [{n}, a, b, c]" for n in range(3_000)))) == 3_000


def test_an_error_quotes_at_most_a_line_and_not_a_long_one():
    with pytest.raises(ValueError) as caught:
        _yaml.read("a: [1, 2\nsecret: " + "y" * 5000 + "\nother: line")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value) and "other" not in str(caught.value)


def test_a_value_that_is_no_mapping_is_quoted_in_brief(tmp_path):
    (tmp_path / "a.yaml").write_text("- " + "x" * 5000)
    with pytest.raises(ValueError, match="no mapping with a, b") as caught:
        _yaml.read_mapping(tmp_path / "a.yaml", "a, b")
    assert len(str(caught.value)) < 200
