import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_lightning.data import prompts as prompts_module
from dmpo_lightning.data.prompts import PromptLoader, pad_left
from dmpo_lightning.data.tokens import tokenize_prompt
from dmpo_lightning.models.loading import load_tokenizer

HEAD, TAIL = [1, 3, 7, 4, 11], [2, 3, 8, 4, 11]
"""The published chat text around a user's turn: bos, opened user header; end of turn, opened assistant header."""
TOKENIZER = load_tokenizer("sudoku_tiny")
DATASET = [{"prompt": str(number)} for number in (1, 22, 333, 4, 55, 666, 7)]


@pytest.fixture
def tokenizer():
    return load_tokenizer("sudoku_tiny")


def loader(count: int = 7, *, batch_size: int = 2, repeats: int | None = None, **options) -> PromptLoader:
    """An evaluation loader, or with ``repeats`` a training loader as the module binds it."""
    made = PromptLoader(DATASET[:count], TOKENIZER, batch_size=batch_size, **options)
    return made if repeats is None else made.bind(repeats=repeats, seed=0)


def indices(batches) -> list[list[int]]:
    return [batch.prompt_index.tolist() for batch in batches]


def take(iterator, count: int) -> list:
    return [next(iterator) for _ in range(count)]


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_a_plain_string_is_the_users_turn_and_the_assistants_is_opened(tokenizer):
    assert tokenize_prompt(tokenizer, "12") == [*HEAD, 15, 16, *TAIL]


def test_a_conversation_keeps_its_roles(tokenizer):
    conversation = [{"role": "system", "content": "3"}, {"role": "user", "content": "12"}]
    assert tokenize_prompt(tokenizer, conversation) == [1, 3, 6, 4, 11, 17, 2, 3, 7, 4, 11, 15, 16, *TAIL]


def test_without_a_chat_template_a_string_is_taken_as_it_is(tokenizer):
    tokenizer.chat_template = None
    assert tokenize_prompt(tokenizer, "12") == [15, 16]
    with pytest.raises(ValueError, match=r"set tokenizer\.chat_template"):
        tokenize_prompt(tokenizer, [{"role": "user", "content": "12"}])


def test_padding_is_on_the_left():
    ids, mask = pad_left([[7], [8, 9, 10], [11, 12]], 0)
    assert ids.tolist() == [[0, 0, 7], [8, 9, 10], [0, 11, 12]]
    assert mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]


def test_a_batch_is_padded_left_and_names_its_prompts():
    (batch,) = loader(3, batch_size=3, shuffle=False)
    assert batch.prompt_ids.tolist() == [
        [0, 0, *HEAD, 15, *TAIL],
        [0, *HEAD, 16, 16, *TAIL],
        [*HEAD, 17, 17, 17, *TAIL],
    ]
    assert (~batch.prompt_mask).sum(-1).tolist() == [2, 1, 0]
    assert batch.prompt_mask[0].tolist() == [False] * 2 + [True] * 11
    assert batch.prompt_index.tolist() == [0, 1, 2]
    assert batch.examples == DATASET[:3]
    assert len(batch) == 3


def test_padding_that_is_also_an_end_token_inside_the_prompt_stays_attended(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}<|endoftext|>{{ message['content'] }}{% endfor %}"
    made = PromptLoader([{"prompt": "1"}, {"prompt": "12"}], tokenizer, batch_size=2, shuffle=False)
    (batch,) = made
    assert batch.prompt_ids.tolist() == [[0, 0, 15], [0, 15, 16]]
    assert batch.prompt_mask.tolist() == [[False, True, True], [True, True, True]]


def test_a_function_can_make_the_prompt(tokenizer):
    made = PromptLoader([5, 6], tokenizer, batch_size=2, prompt=lambda number: str(number + 1), shuffle=False)
    (batch,) = made
    assert batch.prompt_ids[:, 5].tolist() == [20, 21]
    assert batch.examples == [5, 6]


def test_a_batch_moves_as_a_whole():
    (batch,) = loader(2, shuffle=False)
    moved = batch.to("meta")
    tensors = [moved.prompt_ids, moved.prompt_mask, moved.prompt_index, moved.is_filler]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.examples == batch.examples
    assert batch.prompt_ids.device.type == "cpu"


# Epochs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "batch_size", "repeats", "length"),
    [(7, 2, 1, 4), (7, 2, 5, 20), (6, 2, 3, 9), (1, 2, 4, 4), (7, 7, 2, 2)],
)
def test_an_epoch_has_a_known_length(count, batch_size, repeats, length):
    made = loader(count, batch_size=batch_size, repeats=repeats)
    assert len(made) == length
    assert len(list(made)) == length


def test_each_batch_comes_as_often_as_its_rollouts_are_used():
    batches = indices(loader(6, repeats=3))
    assert batches[0] == batches[1] == batches[2]
    assert batches[3] == batches[4] == batches[5]
    assert sorted(batches[0] + batches[3] + batches[6]) == list(range(6))


def test_each_epoch_has_a_new_order_that_the_seed_determines():
    first, second = loader(repeats=2), loader(repeats=2)
    epochs = [indices(first), indices(first), indices(first)]
    assert [indices(second), indices(second), indices(second)] == epochs
    assert len({str(epoch) for epoch in epochs}) == 3
    assert indices(PromptLoader(DATASET, TOKENIZER, batch_size=2).bind(repeats=2, seed=1)) != epochs[0]


def test_the_order_does_not_depend_on_the_repeats():
    assert indices(loader(repeats=3))[::3] == indices(loader(repeats=1))


def test_without_shuffling_the_order_is_that_of_the_dataset():
    assert indices(loader(6, repeats=1, shuffle=False)) == [[0, 1], [2, 3], [4, 5]]


def test_in_training_the_last_batch_wraps_around_and_stays_full():
    batches = list(loader(5, repeats=1, shuffle=False))
    assert indices(batches) == [[0, 1], [2, 3], [4, 0]]
    assert not any(batch.is_filler.any() for batch in batches)


def test_in_evaluation_the_rows_that_fill_the_last_batch_are_marked():
    batches = list(loader(5, shuffle=False))
    assert [batch.is_filler.tolist() for batch in batches] == [[False, False], [False, False], [False, True]]
    assert indices(batches) == [[0, 1], [2, 3], [4, 0]]


# Ranks ----------------------------------------------------------------------------------------------------------------


def on_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(prompts_module, "own_rank", lambda: (rank, world_size))


def test_two_ranks_together_take_the_prompts_of_one(monkeypatch):
    alone = [indices(made) for made in [loader(batch_size=4, repeats=2)] for _ in range(2)]
    ranks = []
    for rank in (0, 1):
        on_rank(monkeypatch, rank, 2)
        made = loader(batch_size=2, repeats=2)
        assert len(made) == 4
        ranks.append([indices(made), indices(made)])
    together = [[a + b for a, b in zip(*epochs, strict=True)] for epochs in zip(*ranks, strict=True)]
    assert together == alone


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4))
def test_in_evaluation_every_example_comes_once_over_all_ranks_which_stay_in_step(count, batch_size, world_size):
    seen, lengths = [], set()
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world_size):
            on_rank(patch, rank, world_size)
            batches = list(loader(count, batch_size=batch_size, shuffle=False))
            lengths.add(len(batches))
            seen += [int(i) for batch in batches for i in batch.prompt_index[~batch.is_filler]]
            assert all(len(batch) == batch_size for batch in batches)
    assert sorted(seen) == list(range(count))
    assert len(lengths) == 1


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("handed_out", [1, 3, 11])
def test_a_resumed_epoch_continues_with_exactly_the_remaining_batches(epoch, handed_out):
    interrupted, resumed = loader(repeats=3), loader(repeats=3)
    for _ in range(epoch):
        list(interrupted)
    iterator = iter(interrupted)
    take(iterator, handed_out)
    resumed.load_state_dict(interrupted.state_dict())
    assert indices(resumed) == indices(iterator)
    assert indices(resumed) == indices(interrupted)


def test_resuming_at_the_end_of_an_epoch_starts_the_next():
    interrupted, resumed = loader(repeats=2), loader(repeats=2)
    list(interrupted)
    resumed.load_state_dict(interrupted.state_dict())
    assert resumed.state_dict() == interrupted.state_dict()
    assert indices(resumed) == indices(interrupted)


def test_a_state_taken_before_the_first_batch_starts_the_first_epoch():
    resumed = loader(repeats=2)
    resumed.load_state_dict(loader(repeats=2).state_dict())
    assert indices(resumed) == indices(loader(repeats=2))


def test_a_state_taken_right_after_resuming_is_the_same_state():
    interrupted, resumed = loader(repeats=2), loader(repeats=2)
    take(iter(interrupted), 3)
    resumed.load_state_dict(interrupted.state_dict())
    assert resumed.state_dict() == interrupted.state_dict()


def test_the_state_counts_what_was_handed_out():
    made = loader(repeats=2)
    take(iter(made), 3)
    assert made.state_dict() == {"epoch": 0, "handed_out": 3, "repeats": 2, "prompts_per_batch": made.batch_size}
    list(made)
    assert made.state_dict() | {"epoch": 1, "handed_out": 8} == made.state_dict()


# Long prompts and other bad input -------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_an_error_that_names_its_row():
    with pytest.raises(
        ValueError, match=r"Prompt 2 of the dataset has 13 tokens, but at most 12 are allowed \(2 of 7 prompts"
    ):
        loader().check_prompt_length(12)


def test_prompts_above_a_stated_length_are_left_out_and_counted():
    made = loader(max_prompt_length=12, shuffle=False)
    made.check_prompt_length(12)
    assert made.dropped == 2
    assert indices(made) == [[0, 1], [3, 4], [6, 0]]
    assert [batch.is_filler.tolist() for batch in made][-1] == [False, True]
    assert len(made) == 3


def test_a_length_that_no_prompt_exceeds_changes_nothing():
    made = loader(max_prompt_length=13, shuffle=False)
    assert made.dropped == 0
    assert len(made) == 4


def test_leaving_out_every_prompt_is_an_error():
    with pytest.raises(ValueError, match="All 7 prompts are longer than 5 tokens"):
        loader(max_prompt_length=5)


def test_an_empty_dataset_is_an_error():
    with pytest.raises(ValueError, match="`dataset` is empty"):
        loader(0)


def test_a_batch_needs_at_least_one_prompt():
    with pytest.raises(ValueError, match="`batch_size` must be at least 1 prompt, got 0"):
        loader(batch_size=0)


def test_a_single_process_is_the_only_rank():
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
    assert prompts_module.own_rank() == (0, 1)
