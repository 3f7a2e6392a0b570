"""Lines on disk: whole, bounded, cut back, and read whatever state they are in."""

import errno
import json
import os

import pytest

from dmpo_lightning.reports.lines import (
    RotatedLines,
    append,
    encoded,
    finite,
    keep_before,
    keep_lines,
    raw_lines,
    read_lines,
)


def rotated(folder, **options):
    return RotatedLines(folder / "rollouts", "rank0", header={"seed": 1}, **{"max_bytes": 4096, "files": 4} | options)


def lines(iteration, count=8, size=60):
    return [encoded({"iteration": iteration, "rollout": number, "text": "x" * size}) for number in range(count)]


def kept(folder):
    records = [record for path in sorted((folder / "rollouts").iterdir()) for record in read_lines(path)]
    return [(record["iteration"], record["rollout"]) for record in records if "iteration" in record]


def test_each_file_begins_with_the_header_and_all_stay_below_the_bytes(tmp_path):
    written = rotated(tmp_path)
    for iteration in range(20):
        written.append(lines(iteration))
        files = written.paths()
        assert sum(path.stat().st_size for path in files) <= 4096
        assert all(next(read_lines(path)) == {"header": {"seed": 1}} for path in files)
    found = kept(tmp_path)
    assert found == sorted(found)
    assert found[-1] == (19, 7)
    assert (0, 0) not in found


def test_a_line_that_no_file_holds_is_left_out_and_counted(tmp_path):
    written = rotated(tmp_path)
    written.append([*lines(0, 1), encoded({"iteration": 0, "rollout": 1, "text": "x" * 5000}), *lines(1, 1)])
    assert kept(tmp_path) == [(0, 0), (1, 0)]
    assert written.too_long == 1


@pytest.mark.parametrize("first", [0, 3, 4, 6])
def test_lines_that_come_again_are_removed_from_all_files(tmp_path, first):
    written = rotated(tmp_path, max_bytes=8192, files=8)
    for iteration in range(6):
        written.append(lines(iteration))
    assert len(written.paths()) > 3
    written.paths()[-1].open("ab").write(b'{"iteration":5,"rollo')
    written.keep_before(first)
    assert {iteration for iteration, _ in kept(tmp_path)} == set(range(first))
    for iteration in range(first, 6):
        written.append(lines(iteration))
    assert kept(tmp_path) == [(iteration, rollout) for iteration in range(6) for rollout in range(8)]


def test_files_of_ranks_that_are_no_more_are_cut_back_too(tmp_path):
    for rank in range(3):
        written = RotatedLines(tmp_path, f"rank{rank}", header={}, max_bytes=4096)
        written.append(line for iteration in range(2) for line in lines(iteration, 1))
    keep_before(tmp_path, 1, ranks=1)
    found = {path.name: [each.get("iteration") for each in read_lines(path)] for path in sorted(tmp_path.iterdir())}
    assert list(found.values()) == [[None, 0, 1], [None, 0], [None, 0]]


def test_a_full_disk_leaves_whole_lines(tmp_path):
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        append(full, b'{"a":1}\n')


def test_what_is_no_record_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = encoded({"a": 1})
    path.write_bytes(b"[1]\n" + whole + b'\xff\xfe\n{"a":\n' + b"[" * 100_000 + b"\n" + whole + b'{"a":1}')
    # The last line has no end, so that more of it may have been meant.
    assert list(read_lines(path)) == [{"a": 1}, {"a": 1}]
    assert [path.read_bytes()[start:][: len(line)] for start, line in raw_lines(path)] == [
        line for _, line in raw_lines(path)
    ]
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_keeping_all_lines_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(encoded({"a": 1}) + encoded({"a": 2}))
    inode = path.stat().st_ino
    assert not keep_lines(path, lambda record: True)
    assert path.stat().st_ino == inode
    assert keep_lines(path, lambda record: record["a"] == 2)
    assert list(read_lines(path)) == [{"a": 2}]


def test_no_character_ends_a_line_and_no_number_is_beyond_json():
    texts = ["a\u2028b", "\x85\x0b\x1e", "\r\n", "\ud800", "\x00", "</script>"]
    line = encoded({"texts": texts})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line)["texts"] == texts
    assert finite({"a": [float("nan"), 1.5, (float("inf"),)], "b": "nan"}) == {"a": [None, 1.5, [None]], "b": "nan"}
