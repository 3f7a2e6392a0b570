import pytest

from dmpo_lightning import Sudoku
from dmpo_lightning.data.benchmarks import SudokuDataModule
from dmpo_lightning.data.task_module import TaskDataModule

SIZES = {"train": 12, "validation": 5, "test": 6}


def module(**options) -> SudokuDataModule:
    return SudokuDataModule(
        tokenizer="sudoku_tiny",
        prompts_per_buffer=4,
        evaluation_batch_size=3,
        sizes=SIZES,
        **{"prompt_template": "{puzzle}", **options},
    )


def test_each_split_has_its_own_loader_with_its_batch_size():
    made = module()
    train, validation, test = made.train_dataloader(), made.val_dataloader(), made.test_dataloader()
    assert (len(train), train.batch_size, train.shuffle) == (3, 4, True)
    assert (len(validation), validation.batch_size, validation.shuffle) == (2, 3, False)
    assert (len(test), test.batch_size, test.shuffle) == (2, 3, False)
    assert list(test.dataset) == list(Sudoku(sizes=SIZES).examples("test"))


def test_a_loader_is_built_once_so_that_its_epochs_go_on():
    made = module()
    assert made.train_dataloader() is made.train_dataloader()
    assert made.predict_dataloader() is made.test_dataloader()


def test_prompts_hold_the_puzzle_after_the_chat_header():
    made = module(prompt_template="{puzzle}")
    batch = next(iter(made.val_dataloader()))
    digits = batch.prompt_ids[:, 5:21] - 14
    assert ["".join(map(str, row)) for row in digits.tolist()] == [example["puzzle"] for example in batch.examples]


def test_the_reward_is_the_tasks_with_the_weights_given():
    made = module(reward_weights={"cells": 0.5, "solved": 2.0})
    example = made.task.examples("test")[0]
    scores = made.reward(
        [example], [[f"<answer>{example['solution']}</answer>", f"<answer>{example['puzzle']}</answer>"]]
    )
    assert scores.total.tolist() == [[2.5, 0.0]]
    assert made.reward.accuracy == "correct"


def test_any_task_makes_a_data_module():
    made = TaskDataModule(Sudoku(sizes=SIZES), tokenizer="sudoku_tiny", prompts_per_buffer=2)
    assert len(made.train_dataloader()) == 6


def test_an_empty_check_is_an_error_at_construction():
    with pytest.raises(ValueError, match="`check` must be one of published, verified, got ''"):
        module(check="")
