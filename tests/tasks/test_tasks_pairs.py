"""Prompt and completion pairs from a JSON-lines file."""

import json

import pytest

from dmpo_lightning import DemonstrationsDataModule, JsonlPairs


def write(folder, lines):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def pair(number):
    return json.dumps({"prompt": f"{number}", "completion": f"<answer>{number}</answer>"})


def test_every_pair_is_in_exactly_one_split(tmp_path):
    task = JsonlPairs(write(tmp_path, [pair(n) for n in range(10)]), validation_share=0.25)
    train, held_out = ([example["prompt"] for example in task.examples(split)] for split in ("train", "validation"))
    assert held_out == ["3", "7"]
    assert sorted(train + held_out) == [str(n) for n in range(10)]


def test_pairs_become_demonstrations(tmp_path):
    task = JsonlPairs(write(tmp_path, [pair(n) for n in range(4)]), validation_share=0.5)
    data = DemonstrationsDataModule(task, tokenizer="sudoku_tiny", completion_length=6, batch_size=2)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).completion_ids.shape == (2, 6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": "a"}', "line 2: needs `prompt`"),
        ("[1]", "line 2: needs `prompt`"),
        ('{"prompt": "a", "completion": 3}', "line 2: needs `prompt`"),
        ('{"prompt": null, "completion": "b"}', "line 2: needs `prompt`"),
        ('{"prompt": 3, "completion": "b"}', "line 2: needs `prompt`"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        JsonlPairs(write(tmp_path, [pair(0), line])).examples("train")


def write_bytes(folder, content):
    (folder / "pairs.jsonl").write_bytes(content)
    return JsonlPairs(str(folder / "pairs.jsonl"), validation_share=0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pair(0).encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n', "line 2: not UTF-8"),
        ("\ufeff".encode("utf-16-le") + pair(0).encode("utf-16-le"), "line 1: not UTF-8"),
        (b"", "holds no pair"),
        (b"\xef\xbb\xbf\n \n", "holds no pair"),
    ],
    ids=["latin-1", "utf-16", "empty", "blank"],
)
def test_a_file_that_is_no_text_of_pairs_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        write_bytes(tmp_path, content).examples("train")


SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def test_lines_end_at_line_feeds_alone(tmp_path):
    lines = [json.dumps({"prompt": f"a{end}b", "completion": f"{end}"}, ensure_ascii=False) for end in SEPARATORS]
    content = "\ufeff" + "\r\n".join(lines) + '\n\n{"prompt": "c",\r"completion": "d"}'
    pairs = write_bytes(tmp_path, content.encode()).examples("train")
    expected = [{"prompt": f"a{end}b", "completion": end} for end in SEPARATORS]
    assert pairs == [*expected, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [
        (1, 0.02, []),
        (2, 0.02, [1]),
        (49, 0.02, [48]),
        (50, 0.02, [49]),
        (150, 0.02, [49, 99, 149]),
        (4, 0.75, [1, 2, 3]),
        (2, 0.99, [1]),
        (10, 0.0, []),
        (100, 0.07, [14, 28, 42, 57, 71, 85, 99]),
    ],
)
def test_few_pairs_have_a_validation_split_and_training_is_never_empty(tmp_path, count, share, held_out):
    task = JsonlPairs(write(tmp_path, [pair(n) for n in range(count)]), validation_share=share)
    assert [int(example["prompt"]) for example in task.examples("validation")] == held_out
    assert len(task.examples("train")) == count - len(held_out) > 0


def test_a_missing_file_is_an_error_at_construction():
    with pytest.raises(ValueError, match=r"No file 'nowhere.jsonl'"):
        JsonlPairs("nowhere.jsonl")
