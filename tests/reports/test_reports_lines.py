"""Lines on disk: whole, cut back, and read whatever state they are in."""

import json
import math

import pytest

from dmpo_lightning.reports.lines import (
    append,
    encoded,
    finite,
    keep_lines,
    read_file,
    read_lines,
    replace,
    set_aside,
    write_object,
)


def test_what_is_no_record_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = encoded({"a": 1})
    path.write_bytes(b"[1]\n" + whole + b'\xff\xfe\n{"a":\n' + whole + b'{"a":')
    with pytest.warns(UserWarning, match="a.jsonl: 4 parts are left out, such as: no JSON object but list"):
        assert list(read_lines(path)) == [{"a": 1}, {"a": 1}]
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_a_file_is_cut_back_to_the_lines_that_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, encoded({"a": 1, "b": 0.1}) + encoded({"a": 2}) + b"half a li")
    keep_lines(path, 1)
    append(path, encoded({"a": 3}))
    assert list(read_lines(path)) == [{"a": 1, "b": 0.1}, {"a": 3}]
    keep_lines(tmp_path / "none.jsonl", 1)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path):
    (tmp_path / "a.json.new").mkdir()
    (tmp_path / "a.json").write_text("whole")
    with pytest.raises(OSError, match="directory"):
        replace(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "whole"


def test_no_character_ends_a_line_and_no_number_is_beyond_json():
    texts = ["a\u2028b", "\x85\x0b\x1e", "\r\n", "\ud800", "\x00", "</script>"]
    line = encoded({"texts": texts})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line)["texts"] == texts
    assert finite({"a": [float("nan"), 1.5, (float("inf"),)], "b": "nan"}) == {"a": [None, 1.5, [None]], "b": "nan"}


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "own").write_text("mine")
    for name in ("a.json", "a.json.new"):
        (tmp_path / name).symlink_to(tmp_path / "own")
    replace(tmp_path / "a.json", b"new")
    assert ((tmp_path / "own").read_text(), (tmp_path / "a.json").read_text()) == ("mine", "new")


def test_numbers_that_json_does_not_have_are_none_wherever_they_stand(tmp_path):
    hostile = {"a": [math.nan, {"b": (math.inf, 1.5)}], "c": -math.inf}
    write_object(tmp_path / "a.json", hostile)
    append(tmp_path / "a.jsonl", encoded(hostile) + b'{"a": [NaN], "b": -Infinity}\n')
    expected = {"a": [None, {"b": [None, 1.5]}], "c": None}
    assert read_file(tmp_path / "a.json") == expected
    assert list(read_lines(tmp_path / "a.jsonl")) == [expected, {"a": [None], "b": None}]


def test_what_is_set_aside_keeps_every_part(tmp_path):
    for number in range(3):
        set_aside(tmp_path / "a.csv")
        (tmp_path / "a.csv").write_text(str(number))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a_part1.csv": "0",
        "a_part2.csv": "1",
        "a.csv": "2",
    }
