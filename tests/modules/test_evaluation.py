"""One evaluation: several completions, several lengths, the check's own text."""

import pytest
import torch
from dmpo_runs import PROMPTS, TOKENIZER, loader, module, trainer

from dmpo_lightning import ConfidenceSampler, Reward, Sudoku
from dmpo_lightning.evaluation.batch import evaluate
from dmpo_lightning.rewards.mixture import MixtureReward
from dmpo_lightning.rollout import Sampling
from helpers import FixedLogits, prompt_batch, tiny_policy

PUZZLE = {"puzzle": "1204340021434320", "solution": "1234341221434321"}
SAMPLED = ConfidenceSampler()


def spelled(text: str, width: int):
    """A policy that writes ``text`` at the places behind a prompt of ``width`` tokens, whatever it is asked."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    table = torch.nn.functional.one_hot(torch.tensor([0] * width + ids), 32) * 50.0
    return tiny_policy(model=FixedLogits(table)), len(ids)


def evaluated(policy, batch, reward, *, completions=1, completion_length=8, sampler=SAMPLED):
    return evaluate(policy, reward, batch, Sampling(sampler, completion_length, completions))


def answered(text: str, *, check: str):
    """The evaluation of one puzzle that was answered with ``text``."""
    task = Sudoku(check=check)
    reward = Reward.of_task(task)
    batch = prompt_batch(tiny_policy(), ["0"])
    batch.examples[0] = PUZZLE
    policy, length = spelled(text, batch.prompt_ids.shape[1])
    return evaluated(policy, batch, reward, completion_length=length)


def test_the_spelled_text_is_what_is_evaluated():
    found = answered("<answer>1234341221434321</answer><|eot_id|><|endoftext|>", check="published")
    assert found.completions == [["<answer>1234341221434321</answer><|eot_id|>"]]
    assert found.values.scores["accuracy"].tolist() == [[1.0]]
    assert found.values.measures["effective_length"].tolist() == [[18.0]]
    assert found.values.measures["truncated"].tolist() == [[0.0]]


def test_an_unclosed_answer_ends_at_the_end_of_the_turn_for_the_published_check():
    """Text without special tokens has no end that the published patterns know: it would find no answer."""
    found = answered("<answer>1234 3412 2143 4321\n<|eot_id|><|endoftext|>", check="published")
    assert found.verdicts[0][0].answer == "1234341221434321"
    assert found.values.scores["correct"].tolist() == found.values.scores["accuracy"].tolist() == [[1.0]]
    assert not Sudoku(check="published").check(PUZZLE, "<answer>1234 3412 2143 4321\n").correct


@pytest.mark.parametrize("is_mixture", [False, True])
@pytest.mark.parametrize("rewards", ["published", "verified"])
def test_the_check_runs_once_per_completion(is_mixture, rewards):
    """On the text with special tokens; scoring does without it."""
    read = []

    class Counted(Sudoku):
        def check(self, example, completion):
            read.append(completion)
            return super().check(example, completion)

    batch = prompt_batch(tiny_policy(), ["0"])
    batch.examples[0] = PUZZLE | {"task": "four"}
    text = "<answer>1234341221434321</answer><|eot_id|>"
    policy, length = spelled(text, batch.prompt_ids.shape[1])
    own = Reward.of_task(Counted(rewards=rewards))
    reward = MixtureReward({"four": own}) if is_mixture else own
    found = evaluated(policy, batch, reward, completions=3, completion_length=length)
    assert read == [text] * 3
    assert found.values.correct.tolist() == [[True] * 3]
    assert found.values.scores["reward"].tolist() == [[1.0] * 3]


def test_training_components_see_no_special_tokens():
    seen = []

    def score(example, completion):
        seen.append(completion)
        return 0.0

    batch = prompt_batch(tiny_policy(), ["0"])
    policy, length = spelled("12<|eot_id|>34", batch.prompt_ids.shape[1])
    found = evaluated(policy, batch, Reward(score), completion_length=length)
    assert seen == ["12"]
    assert found.completions == [["12"]]  # there is no check


def test_without_an_end_token_a_completion_is_truncated():
    found = answered("<answer>1234", check="published")
    assert found.values.measures["truncated"].tolist() == [[1.0]]
    assert found.values.measures["effective_length"].tolist() == [[5.0]]
    assert found.completions == [["<answer>1234"]]


def test_cells_are_a_share_of_the_blanks_and_weighted_by_them():
    """Of the blanks 3, 1, 2, 1 the answer has the first two."""
    found = answered("<answer>1234341021434320</answer><|eot_id|>", check="published")
    assert found.values.scores["correct_cells"].tolist() == [[0.5]]
    assert found.values.weights["accuracy"].tolist() == [4.0]
    assert "accuracy" not in answered("<answer></answer><|eot_id|>", check="verified").values.weights


def texts(policy, completions):
    batch = prompt_batch(policy, ["12", "3"])
    return evaluated(policy, batch, Reward(lambda example, text: len(text)), completions=completions).completions


def test_the_first_completions_are_the_same_however_many_there_are():
    policy = tiny_policy()
    four, one = texts(policy, 4), texts(policy, 1)
    assert [group[:1] for group in four] == one
    assert all(len(set(group)) > 1 for group in four)


def test_filler_is_neither_scored_nor_recorded():
    policy, scored = tiny_policy(), []
    batch = prompt_batch(policy, ["12", "3", "45"], index=[4, 5, 0])
    batch.is_filler[2] = True
    found = evaluated(policy, batch, Reward(lambda example, text: scored.append(example) or 1.0), completions=2)
    assert [record["index"] for record in found.records("greedy")] == [4, 4, 5, 5]
    assert len(scored) == 4
    assert found.tokens == 4 * 8


def test_votes_are_counted_by_the_check():
    """Greedy completions agree: majority and every pass@j equal the accuracy."""
    task = Sudoku(check="verified")
    reward = Reward.of_task(task)
    batch = prompt_batch(tiny_policy(), ["0"])
    batch.examples[0] = PUZZLE
    policy, length = spelled("<answer>1234341221434321</answer><|eot_id|>", batch.prompt_ids.shape[1])
    without_check = evaluated(
        policy, batch, Reward(task.score, accuracy="solved"), completions=5, completion_length=length
    )
    assert list(without_check.values.votes) == ["pass@1", "pass@2", "pass@4", "pass@5"]
    found = evaluated(policy, batch, reward, completions=5, completion_length=length)
    assert list(found.values.votes) == ["pass@1", "pass@2", "pass@4", "pass@5", "majority"]
    assert [value.tolist() for value in found.values.votes.values()] == [[[1.0]]] * 5


def logged(tmp_path, **options):
    run = trainer(tmp_path)
    run.validate(module(**options), loader(4, shuffle=False), verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_one_length_keeps_the_short_names(tmp_path):
    names = set(logged(tmp_path))
    assert {"val/greedy/accuracy", "val/greedy/accuracy_stderr", "val/sampled/reward"} <= names
    assert {"val/greedy/effective_length", "val/greedy/truncated", "val/greedy/tokens_per_second"} <= names
    assert not any("pass@" in name or "majority" in name for name in names)


def test_several_lengths_are_logged_by_length_and_do_not_touch_each_other(tmp_path):
    several = logged(tmp_path, evaluation_lengths=[8, 12])
    single = logged(tmp_path)
    assert several["val/greedy/8/accuracy"] == pytest.approx(single["val/greedy/accuracy"])
    assert several["val/greedy/12/effective_length"] > several["val/greedy/8/effective_length"]
    assert "val/greedy/accuracy" not in several


def test_a_single_other_length_keeps_the_short_names(tmp_path):
    assert "val/greedy/accuracy" in logged(tmp_path, evaluation_lengths=[12])


def test_accuracy_is_the_mean_over_completions(tmp_path):
    found = logged(tmp_path, completions_per_prompt=4, reward=lambda example, text: float("1" in text))
    assert found["val/sampled/accuracy"] == pytest.approx(found["val/sampled/pass@1"])
    assert 0 < found["val/sampled/pass@1"] < found["val/sampled/pass@2"] < found["val/sampled/pass@4"] <= 1


def test_validation_while_fitting_logs_the_same_numbers(tmp_path):
    from lightning.pytorch.callbacks import Callback

    class Values(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.seen = {name: float(value) for name, value in trainer.callback_metrics.items()}

    values = Values()
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    run = trainer(tmp_path, max_steps=2, val_check_interval=2, callbacks=[values])
    run.fit(module(completions_per_prompt=2, **optimizer), loader(), loader(4, shuffle=False))
    expected = logged(tmp_path, completions_per_prompt=2)
    kept = [name for name in expected if not name.endswith("tokens_per_second")]
    assert {name: values.seen[name] for name in kept} == pytest.approx({name: expected[name] for name in kept})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completions_per_prompt": 0}, "`completions_per_prompt` must be at least 1, got 0"),
        ({"evaluation_lengths": []}, "`evaluation_lengths` must be different lengths"),
        ({"evaluation_lengths": [8, 8]}, r"`evaluation_lengths` must be different lengths .*got \[8, 8\]"),
        ({"evaluation_lengths": [0, 8]}, "`evaluation_lengths` must be different lengths"),
        (
            {"evaluation_lengths": [8, 3]},
            "Sampler 'sampled' cannot evaluate completions of 3 tokens: `denoising",
        ),
    ],
)
def test_lengths_and_counts_are_checked_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_prompts_must_fit_beside_the_longest_completion(tmp_path):
    with pytest.raises(ValueError, match="but at most 8 are allowed"):
        trainer(tmp_path).validate(module(evaluation_lengths=[8, 120]), loader(4, shuffle=False))
    assert len(PROMPTS[0]["prompt"]) < 8
