"""Prompt and completion pairs from a JSON-lines file."""

import json

import pytest

from dmpo_lightning import DemonstrationsDataModule
from dmpo_lightning.tasks.pairs import JsonlPairs


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
        ('{"prompt": "a"}', "line 2: needs `prompt` and a string"),
        ("[1]", "line 2: needs `prompt`"),
        ('{"prompt": "a", "completion": 3}', "line 2: needs `prompt`"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        JsonlPairs(write(tmp_path, [pair(0), line])).examples("train")


def test_a_missing_file_is_an_error_at_construction():
    with pytest.raises(ValueError, match=r"No file 'nowhere.jsonl'"):
        JsonlPairs("nowhere.jsonl")
