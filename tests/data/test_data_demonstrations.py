from collections.abc import Sequence

import pytest
import torch

from dmpo_lightning import Task
from dmpo_lightning.data.demonstrations import DemonstrationsDataModule
from small_models import bert_tokenizer

HEAD, TAIL = [1, 3, 7, 4, 11], [2, 3, 8, 4, 11]


class Copying(Task):
    """Answers are the prompt's digits."""

    accuracy = "copied"

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def examples(self, split):
        return [{"text": text, "completion": f"<answer>{text}</answer>"} for text in self.texts]

    def prompt(self, example):
        return example["text"]

    def score(self, example, completion):
        return {"copied": float(example["text"] in completion)}


def module(
    texts: Sequence[str] = ("1", "22", "333"), *, completion_length: int = 7, batch_size: int = 3
) -> DemonstrationsDataModule:
    made = DemonstrationsDataModule(
        Copying(texts), tokenizer="sudoku_tiny", completion_length=completion_length, batch_size=batch_size
    )
    made.setup("fit")
    return made


def test_completions_end_their_turn_and_are_filled_up_with_the_end_of_text():
    (batch,) = module().val_dataloader()
    assert batch.completion_ids.tolist() == [
        [9, 15, 10, 2, 0, 0, 0],
        [9, 16, 16, 10, 2, 0, 0],
        [9, 17, 17, 17, 10, 2, 0],
    ]
    assert batch.index.tolist() == [0, 1, 2]
    assert len(batch) == 3


def test_prompts_are_those_of_sampling_padded_left():
    (batch,) = module().val_dataloader()
    assert batch.prompt_ids.tolist() == [
        [0, 0, *HEAD, 15, *TAIL],
        [0, *HEAD, 16, 16, *TAIL],
        [*HEAD, 17, 17, 17, *TAIL],
    ]
    assert (~batch.prompt_mask).sum(-1).tolist() == [2, 1, 0]


def test_a_completion_may_fill_its_length_exactly():
    (batch,) = module(completion_length=6).val_dataloader()
    assert batch.completion_ids[2].tolist() == [9, 17, 17, 17, 10, 2]


def test_a_completion_that_does_not_fit_is_an_error_that_names_its_row():
    with pytest.raises(
        ValueError, match="The completion of row 2: it has 6 tokens with its end token, more than `completion_length` 5"
    ):
        module(completion_length=5)


def test_training_shuffles_and_drops_the_incomplete_batch_and_validation_keeps_all():
    made = module([str(number) for number in range(5)], batch_size=2)
    torch.manual_seed(0)
    training = [batch.index.tolist() for batch in made.train_dataloader()]
    assert [len(rows) for rows in training] == [2, 2]
    assert len(set(training[0] + training[1])) == 4
    assert [batch.index.tolist() for batch in made.val_dataloader()] == [[0, 1], [2, 3], [4]]


def test_fewer_pairs_than_a_batch_are_an_error_and_not_a_training_without_a_step():
    made = module(["1"], batch_size=2)
    with pytest.raises(ValueError, match="`batch_size` 2 is more than the 1 pairs"):
        made.train_dataloader()
    assert len(module(["1"], batch_size=1).train_dataloader()) == 1


def test_a_tokenizer_without_an_eos_token_ends_completions_with_its_separator():
    words = bert_tokenizer()
    assert words.eos_token_id is None
    made = DemonstrationsDataModule(Copying(["1"]), tokenizer=words, completion_length=9, batch_size=1)
    made.setup("fit")
    (batch,) = made.val_dataloader()
    assert batch.completion_ids[0, -1] == words.sep_token_id
    first = batch.completion_ids[0].tolist().index(words.sep_token_id)
    assert batch.completion_ids[0, first:].tolist() == [words.sep_token_id] * (9 - first)
    assert 0 < first < 9


def test_a_tokenizer_that_can_end_nothing_is_an_error():
    words = bert_tokenizer()
    words.sep_token = None
    with pytest.raises(ValueError, match="neither an eos token nor a separator"):
        DemonstrationsDataModule(Copying(["1"]), tokenizer=words, completion_length=7, batch_size=1)
