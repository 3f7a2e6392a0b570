import shutil
import time
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import chain

import pytest

from dmpo_lightning.data.benchmarks import CountdownDataModule, GSM8KDataModule, Math500DataModule, SudokuDataModule
from dmpo_lightning.tasks.benchmark import TRAIN_FORMAT
from dmpo_lightning.tasks.countdown_puzzles import generate, puzzle_key

COMMON = {"tokenizer": "sudoku_tiny", "prompts_per_buffer": 4}
SPLITS = ("train", "validation", "test")


# Remembered, because the same few numbers are parts of many cuts.
@cache
def reachable(numbers):
    """Every value of an expression with all of the sorted numbers once each. For six numbers this takes seconds."""
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    values = set()
    for left, right in _parts(numbers):
        for a in reachable(left):
            for b in reachable(right):
                # Both differences and both quotients, because `_parts` names each cut once.
                values.update((a + b, a - b, b - a, a * b))
                values.update(chain((a / b,) if b else (), (b / a,) if a else ()))
    return frozenset(values)


def _parts(numbers):
    """The ways to cut a sorted tuple in two. The first number stays left."""
    rest = numbers[1:]
    # One less than all subsets: with the whole rest on the left there would be nothing on the right.
    cuts = [[rest[i] for i in range(len(rest)) if mask >> i & 1] for mask in range(2 ** len(rest) - 1)]
    return {((numbers[0], *left), tuple((Counter(rest) - Counter(left)).elements())) for left in cuts}


def solvable(example):
    """Whether the target can be reached. This is a search, meant for up to five numbers."""
    return Fraction(example["target"]) in reachable(tuple(sorted(example["numbers"])))


def keys(made, split):
    return {made.key(example) for example in made.task.examples(split)}


def test_gsm8k_from_the_real_files_in_seconds(test_data):
    start = time.process_time()
    made = GSM8KDataModule(**COMMON, path=str(test_data / "gsm8k"), sizes={"validation": 100})
    assert [len(made.task.examples(split)) for split in SPLITS] == [7373, 100, 1319]
    assert not keys(made, "train") & (keys(made, "validation") | keys(made, "test"))
    assert len(made.test_dataloader().dataset) == 1319
    assert time.process_time() - start < 20


def test_gsm8k_prompt_and_reward(test_data):
    made = GSM8KDataModule(**COMMON, path=str(test_data / "gsm8k"), rewards="published", check="published")
    example = made.task.examples("test")[0]
    assert example["answer"] == "18"
    assert made.task.prompt(example) == f"{TRAIN_FORMAT}\n\n{example['question']}"
    scores = made.reward([example], [["18", "<answer>\\boxed{18}</answer>"]])
    assert scores.total.tolist() == [[2.5, 0.0]]
    assert scores.components["correct"].tolist() == [[0.0, 1.0]]


def test_the_seed_chooses_the_validation_split_and_subsets_keep_the_order(test_data):
    def validation(seed):
        return GSM8KDataModule(
            **COMMON, path=str(test_data / "gsm8k"), sizes={"validation": 20}, seed=seed
        ).task.examples("validation")

    assert validation(1) == validation(1) != validation(2)
    made = GSM8KDataModule(**COMMON, path=str(test_data / "gsm8k"), sizes={"train": 50, "test": 9})
    assert [len(made.task.examples(split)) for split in SPLITS] == [50, 256, 9]


def test_math500_from_a_test_file_alone_can_be_tested_but_not_trained(test_data):
    made = Math500DataModule(**COMMON, path=str(test_data / "math500"))
    assert len(made.task.examples("test")) == 500
    with pytest.raises(ValueError, match="The data has no train split"):
        made.train_dataloader()


def test_training_examples_that_are_held_out_are_dropped_and_counted(tmp_path, caplog):
    rows = "".join(f'{{"problem": "p{n}", "solution": "so \\\\boxed{{{n}}}"}}\n' for n in range(10))
    (tmp_path / "train.jsonl").write_text(rows + rows.splitlines()[0])
    (tmp_path / "test.jsonl").write_text('{"problem": "p3", "answer": "3"}\n')
    made = Math500DataModule(**COMMON, path=str(tmp_path), sizes={"validation": 2})
    assert len(made.task.examples("train")) == 7
    assert "1 examples of train are held out too" in caplog.text
    assert "1 examples of train are duplicates" in caplog.text
    assert {example["answer"] for example in made.task.examples("train")} <= set("0123456789") - {"3"}


def test_all_real_countdown_puzzles_are_solvable_and_generated_ones_differ(test_data):
    made = CountdownDataModule(
        **COMMON, source="generated", path=str(test_data / "countdown"), sizes={"train": 500, "validation": 50}
    )
    splits = {split: keys(made, split) for split in SPLITS}
    assert [len(found) for found in splits.values()] == [500, 50, 256]
    assert not splits["train"] & (splits["validation"] | splits["test"])
    assert not splits["validation"] & splits["test"]
    assert all(solvable(example) for split in SPLITS for example in made.task.examples(split))


def test_generated_countdown_needs_no_file_and_is_seeded():
    sizes = {"train": 30, "validation": 10, "test": 10}
    made, again, other = (
        CountdownDataModule(**COMMON, source="generated", sizes=sizes, count=(2, 4), seed=seed) for seed in (0, 0, 1)
    )
    assert made.task.examples("train") == again.task.examples("train") != other.task.examples("train")
    assert {len(example["numbers"]) for example in made.task.examples("train")} == {2, 3, 4}
    assert all(solvable(example) for split in SPLITS for example in made.task.examples(split))


def test_excluded_puzzles_never_come_and_too_many_are_an_error():
    options = {"count": (2, 2), "largest": 3, "seed": "0"}
    every = generate(10, **options)
    first = puzzle_key(every[0])
    assert first not in {puzzle_key(example) for example in generate(9, **options, excluded={first})}
    with pytest.raises(ValueError, match="Found only"):
        generate(1000, **options)


def test_sudoku_from_a_csv_shares_no_solution_between_splits(test_data, tmp_path):
    shutil.copy(test_data / "sudoku" / "test.csv", tmp_path / "all.csv")
    sizes = {"validation": 40, "test": 60}
    made = SudokuDataModule(**COMMON, path=str(tmp_path / "all.csv"), sizes=sizes)
    found = {split: {example["solution"] for example in made.task.examples(split)} for split in SPLITS}
    assert len(made.task.examples("validation")) == 40
    assert len(made.task.examples("test")) == 60
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]


def test_sudoku_with_a_check_reports_its_numbers_beside_the_reward():
    made = SudokuDataModule(**COMMON, sizes=dict.fromkeys(SPLITS, 2), check="published")
    example = made.task.examples("test")[0]
    scores = made.reward([example], [[f"<answer>{example['solution']}</answer>"]])
    assert scores.total.tolist() == [[1.0]]
    assert made.reward.accuracy == "correct_cells"
    assert scores.components["correct_cells"].tolist() == [[1.0]]


@pytest.mark.parametrize("count", [(2, 2), (6, 6), (12, 12)])
def test_puzzles_of_any_count_of_numbers_are_generated(count):
    made = CountdownDataModule(**COMMON, source="generated", count=count, sizes=dict.fromkeys(SPLITS, 100))
    examples = [example for split in SPLITS for example in made.task.examples(split)]
    assert len({puzzle_key(example) for example in examples}) == 300
    assert {len(example["numbers"]) for example in examples} == {count[0]}
    if count[0] < 6:
        assert all(map(solvable, examples))
