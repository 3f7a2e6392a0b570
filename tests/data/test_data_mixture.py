import json
import math
from collections import Counter

import pytest
import torch
import yaml

from dmpo_lightning import GSM8K, MixtureDataModule, Reward, Sudoku, Task
from dmpo_lightning.data.benchmarks import SudokuDataModule
from dmpo_lightning.data.mixture import MixtureReward
from dmpo_lightning.data.task_module import TaskDataModule
from dmpo_lightning.evaluation.values import batch_values
from dmpo_lightning.tasks.base import Share, Verdict


class Echo(Task):
    """Two digits to repeat; its words are those of the embedded tokenizer."""

    accuracy = "right"

    def __init__(self, count: int = 7, times: int = 2) -> None:
        self.count, self.times = count, times

    def examples(self, split):
        return [{"word": str(1 + number % 4) * self.times} for number in range(self.count)]

    def prompt(self, example):
        return example["word"]

    def score(self, example, completion):
        if completion == "bad":
            raise KeyError(completion)
        return {"right": float(completion == example["word"])}


def sudoku(size=20, **options) -> SudokuDataModule:
    sizes = {"train": size, "validation": 4, "test": 6}
    return SudokuDataModule(sizes=sizes, prompt_template="{puzzle}", check="published", **options)


def echo(count=7, **options) -> TaskDataModule:
    return TaskDataModule(Echo(count), **options)


def mixture(datamodules=None, **options) -> MixtureDataModule:
    datamodules = datamodules or {"sudoku": sudoku(), "echo": echo()}
    return MixtureDataModule(datamodules, tokenizer="sudoku_tiny", **{"prompts_per_buffer": 3} | options)


def bound(module):
    return module.train_dataloader().bind(repeats=1, seed=5)


def epoch(loader):
    return [example for batch in loader for example in batch.examples]


# Prompts --------------------------------------------------------------------------------------------------------------


def test_without_weights_an_epoch_has_every_example_once():
    examples = epoch(bound(mixture()))
    assert len(examples) == 27
    assert Counter(example["task"] for example in examples) == {"sudoku": 20, "echo": 7}
    assert len({example["puzzle"] for example in examples if example["task"] == "sudoku"}) == 20


def test_weights_are_the_shares_of_every_epoch():
    loader = bound(mixture(weights={"sudoku": 1, "echo": 2}))
    for _ in range(3):
        counts = Counter(example["task"] for example in epoch(loader))
        assert counts == {"sudoku": 9, "echo": 18}


def test_a_large_task_goes_on_in_the_next_epoch_and_a_small_one_repeats_evenly():
    loader = bound(mixture(weights={"sudoku": 10, "echo": 17}))
    first, second = epoch(loader), epoch(loader)
    assert len({example["puzzle"] for example in first + second if example["task"] == "sudoku"}) == 20
    words = Counter(example["word"] for example in first + second if example["task"] == "echo")
    assert sum(words.values()) == 34
    assert max(words.values()) - min(words.values()) <= 6  # 7 examples hold one word once and three twice


def test_the_order_depends_on_the_seed_alone_and_changes_with_the_epoch():
    first, again = bound(mixture()), bound(mixture())
    assert epoch(first) == epoch(again)
    one, two = epoch(first), epoch(again)
    assert one == two
    assert one != epoch(bound(mixture()))
    assert epoch(mixture().train_dataloader().bind(repeats=1, seed=6)) != epoch(bound(mixture()))


def test_an_interrupted_epoch_goes_on_where_it_stopped():
    whole = bound(mixture(weights={"sudoku": 1, "echo": 1}))
    epoch(whole)
    batches = [batch.prompt_index.tolist() for batch in whole]
    stopped = bound(mixture(weights={"sudoku": 1, "echo": 1}))
    epoch(stopped)
    iterator = iter(stopped)
    seen = [next(iterator).prompt_index.tolist() for _ in range(4)]
    resumed = bound(mixture(weights={"sudoku": 1, "echo": 1}))
    resumed.load_state_dict(stopped.state_dict())
    assert seen + [batch.prompt_index.tolist() for batch in resumed] == batches


def test_evaluation_takes_everything_once_and_interleaves_the_tasks():
    loader = mixture(evaluation_batch_size=5).test_dataloader()
    examples = [example for batch in loader for example in batch[~batch.is_filler].examples]
    assert Counter(example["task"] for example in examples) == {"sudoku": 6, "echo": 7}
    assert {example["task"] for example in examples[:3]} == {"sudoku", "echo"}


def test_each_task_keeps_its_prompts_and_prefill():
    class Prefilled(Echo):
        prefill = "<answer>"

    module = mixture({"plain": TaskDataModule(Echo(3)), "prefilled": TaskDataModule(Prefilled(3))})
    batch = next(iter(module.test_dataloader()))
    texts = module.test_dataloader().tokenizer.batch_decode(batch.prompt_ids)
    ends = {example["task"]: text.endswith("<answer>") for example, text in zip(batch.examples, texts, strict=True)}
    assert ends == {"plain": False, "prefilled": True}


def test_each_task_drops_its_own_long_prompts():
    class Growing(Echo):
        def examples(self, split):
            return [{"word": "1" * (1 + number)} for number in range(self.count)]

    module = mixture({"growing": TaskDataModule(Growing(), max_prompt_length=13), "echo": echo()})
    loader = module.test_dataloader()
    assert loader.dropped == 4  # 10 tokens of the template and 3 digits remain
    kept = [example for batch in loader for example in batch[~batch.is_filler].examples]
    assert Counter(example["task"] for example in kept) == {"growing": 3, "echo": 7}


def test_the_error_of_a_long_prompt_names_the_task():
    with pytest.raises(ValueError, match="Task 'sudoku': Prompt 0 of the dataset has 26 tokens"):
        mixture().test_dataloader().check_prompt_length(20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datamodules": {"a/b": echo()}}, "without a slash"),
        (
            {"weights": {"sudoku": 1.0}},
            r"must name the tasks \['echo', 'sudoku'\] and be positive, got {'sudoku': 1.0}",
        ),
        ({"weights": {"sudoku": 1.0, "echo": 0.0}}, "and be positive"),
        ({"weights": {"sudoku": 1.0, "echo": math.nan}}, "and be positive"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_a_weight_that_gives_no_prompt_is_an_error_that_names_the_task():
    with pytest.raises(ValueError, match=r"give \['echo'\] no prompt in an epoch of 27"):
        epoch(bound(mixture(weights={"sudoku": 1000.0, "echo": 1.0})))


# Scores ---------------------------------------------------------------------------------------------------------------


def mixed_examples():
    one = {"task": "sudoku", "puzzle": "1000040000400020", "solution": "1234341221434321"}
    return [one, {"task": "echo", "word": "11"}, {"task": "echo", "word": "22"}]


TEXTS = [["<answer>1234341221434321</answer>", ""], ["11", "12"], ["22", "22"]]


def test_each_example_is_scored_by_its_task_and_what_does_not_apply_is_not_a_number():
    scores = mixture().reward(mixed_examples(), TEXTS)
    alone = sudoku().reward(mixed_examples()[:1], TEXTS[:1])
    assert scores.total.tolist() == [alone.total[0].tolist(), [1, 0], [1, 1]]
    assert scores.components["echo/right"].nan_to_num(-1).tolist() == [[-1, -1], [1, 0], [1, 1]]
    assert scores.components["sudoku/solved"].nan_to_num(-1).tolist() == [[1, 0], [-1, -1], [-1, -1]]
    assert scores.components["accuracy"].tolist() == [[1, 0], [1, 0], [1, 1]]
    assert scores.components["echo/reward"].isnan().tolist() == [[True, True], [False, False], [False, False]]


def test_each_task_keeps_its_weights():
    reward = mixture({"sudoku": sudoku(), "echo": echo(reward_weights={"right": 3.0})}).reward
    assert reward(mixed_examples(), TEXTS).total[1:].tolist() == [[3, 0], [3, 3]]


def test_failures_of_all_tasks_are_counted(caplog):
    scores = mixture().reward(mixed_examples(), [["", ""], ["bad", "11"], ["22", "bad"]], prompt_index=[4, 5, 6])
    assert scores.failures == 2
    assert "prompt 5" in caplog.text
    assert "prompt 6" not in caplog.text  # the same error, which is said once


def test_the_answer_check_is_that_of_the_task_and_there_is_none_unless_all_have_one():
    assert mixture().reward.check is None  # Echo has none
    rewards = {
        "gsm8k": Reward.of_task(GSM8K()),
        "sudoku": Reward.of_task(Sudoku(check="published")),
    }
    check = MixtureReward(rewards).check
    assert check is not None
    assert check({"task": "gsm8k", "question": "?", "answer": "3"}, "\\boxed{3}").correct
    puzzle = mixed_examples()[0]
    assert check(puzzle, f"<answer>{puzzle['solution']}</answer>") == Verdict(puzzle["solution"], True, Share(12, 12))


def test_the_scores_of_each_task_are_handed_on_under_its_own_names():
    scores = mixture().reward(mixed_examples(), TEXTS)
    assert scores.rows == {"sudoku": [0], "echo": [1, 2]}
    echoed = scores.parts["echo"]
    assert set(echoed.components) == {"right"}
    assert echoed.total.tolist() == scores.total[1:].tolist()
    assert echoed.accuracy == "right"


def test_a_task_may_call_a_component_accuracy():
    """Names are not parsed, so a component may have any."""

    class Named(Echo):
        accuracy = "accuracy"

        def score(self, example, completion):
            return {"accuracy": super().score(example, completion)["right"], "a/b": 2.0}

    reward = mixture({"named": TaskDataModule(Named()), "echo": echo()}).reward
    examples = [{"task": "named", "word": "11"}, {"task": "echo", "word": "11"}]
    values = batch_values(reward(examples, [["11", "2"], ["2", "11"]]), {})
    assert values.scores["named/accuracy"].nan_to_num(-1).tolist() == [[1, 0], [-1, -1]]
    assert values.scores["named/a/b"].nan_to_num(-1).tolist() == [[2, 2], [-1, -1]]
    assert values.scores["accuracy"].tolist() == [[1, 0], [0, 1]]


def test_a_task_of_which_every_completion_fails_is_scored_and_is_not_accurate():
    scores = mixture().reward(mixed_examples(), [["", ""], ["bad", "bad"], ["bad", "bad"]])
    assert scores.failures == 4
    assert batch_values(scores, {}).scores["echo/accuracy"].nan_to_num(-1).tolist() == [[-1, -1], [0, 0], [0, 0]]


@pytest.mark.parametrize("task", [["a"], None, 3, "b", {"a": 1}])
def test_an_example_that_names_no_task_of_the_mixture_is_an_error(task):
    reward = MixtureReward({"a": Reward(lambda example, completion: 1.0)})
    with pytest.raises(ValueError, match=r"must hold `task`, one of \['a'\], got "):
        reward([{"task": task}], [["1"]])
    with pytest.raises(ValueError, match="must hold `task`"):
        reward([{}], [["1"]])
    with pytest.raises(ValueError, match="must hold `task`"):
        reward.score({"task": task}, "1")


def test_values_of_a_batch_are_those_of_each_task_and_of_all():
    rewards = {"gsm8k": Reward.of_task(GSM8K()), "sudoku": Reward.of_task(Sudoku(check="published"))}
    reward = MixtureReward(rewards)
    puzzle = mixed_examples()[0]
    examples = [{"task": "gsm8k", "question": "?", "answer": "3"}, puzzle]
    half = puzzle["solution"][:8] + "0" * 8
    texts = [["\\boxed{3}", "\\boxed{4}"], [f"<answer>{half}</answer>", f"<answer>{puzzle['solution']}</answer>"]]
    measures = {"effective_length": torch.tensor([[1.0, 3.0], [5.0, 7.0]])}
    values = batch_values(reward(examples, texts, raw=texts), measures)
    assert values.correct.tolist() == [[True, False], [False, True]]
    assert values.scores["gsm8k/accuracy"].nan_to_num(-1).tolist() == [[1, 0], [-1, -1]]
    cells = values.scores["sudoku/accuracy"][1].tolist()
    assert cells[1] == 1
    assert 0 < cells[0] < 1
    assert values.scores["accuracy"].tolist() == [[1, 0], cells]
    assert values.measures["sudoku/effective_length"].nan_to_num(-1).tolist() == [[-1, -1], [5, 7]]
    assert values.votes["gsm8k/pass@1"].nan_to_num(-1).tolist() == [[0.5], [-1]]
    assert values.votes["pass@1"].tolist() == [[0.5], [0.5]]
    assert values.weights["sudoku/accuracy"].nan_to_num(-1).tolist() == [-1, 12]


# From the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mixture_is_trained_and_evaluated_from_the_command_line(tmp_path, monkeypatch, capsys):
    from dmpo_lightning.__main__ import main

    data = {
        "class_path": "dmpo_lightning.MixtureDataModule",
        "init_args": {
            "prompts_per_buffer": 4,
            "weights": {"hard": 3, "easy": 1},
            "datamodules": {
                name: {
                    "class_path": "dmpo_lightning.SudokuDataModule",
                    "init_args": {
                        "prompt_template": "{puzzle}",
                        "blanks": blanks,
                        "check": "verified",
                        "sizes": {"train": 32, "validation": 4, "test": 5},
                    },
                }
                for name, blanks in (("hard", [11, 12]), ("easy", [2, 3]))
            },
        },
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.callbacks=null"]
    options = ["--config", "sudoku_tiny.yaml", "--config", "data.yaml", "--trainer.enable_progress_bar=false"]
    batches = ["--model.init_args.micro_batch_size=16", "--model.init_args.group_size=4"]
    assert main(["fit", *options, *short, *batches]) == 0
    assert main(["test", *options, *batches]) == 0
    printed = capsys.readouterr().out
    for line in ("all/greedy", "hard/greedy", "easy/greedy"):
        assert line in printed
    (written,) = tmp_path.glob("runs/**/evaluation.json")
    result = json.loads(written.read_text())
    assert result["task"] == {"hard": "Sudoku", "easy": "Sudoku"}
    assert result["n"] == 10
    means = next(each for each in result["results"] if each["sampler"] == "greedy")["means"]
    each = [means[f"{task}/accuracy"]["mean"] for task in ("hard", "easy")]
    assert means["accuracy"]["mean"] == pytest.approx(sum(each) / 2)
