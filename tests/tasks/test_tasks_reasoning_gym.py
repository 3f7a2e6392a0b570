"""Problems of reasoning-gym: their own scorers, held-out splits, and what is refused and why."""

import contextlib
import pickle
import sys
import time

import pytest

from dmpo_lightning import DemonstrationsDataModule, MixtureDataModule, ReasoningGym, Reward, TaskDataModule
from dmpo_lightning.tasks.reasoning_gym import REFUSED

NAMES = """
ab acre advanced_geometry aiw arc_1d base_conversion basic_arithmetic binary_alternation bitwise_arithmetic
calendar_arithmetic chain_sum count_bits count_primes decimal_arithmetic family_relationships fraction_simplification
gcd gsm_symbolic jugs knights_knaves leg_counting letter_jumble maze number_format prime_factorization simple_equations
spell_backward string_manipulation syllogism time_intervals tower_of_hanoi word_ladder word_sorting
"""
WITHOUT_SOLUTION = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
GARBAGE = [
    "", "as you like it", "nan", "-inf", "1e99999999", "9" * 100_000, "1/0", "[" * 100_000, '{"a": [1, null]}',
    "[NaN, NaN, NaN]", "\x00\ud800", "1 2 3\n" * 30_000, "9 \xd7 " * 30_000, "(" * 50_000 + "A" + ")" * 50_000,
    "U" * 100_000, "__import__('os')", "<answer>" * 30_000, "Move disk 1 from Peg 1 to Peg 9",
]  # fmt: skip


def gym(name="chain_sum", *, size=3, **options) -> ReasoningGym:
    return ReasoningGym(name, sizes={"train": size, "validation": size, "test": size}, **options)


def takes_solutions_alone(name: str) -> None:
    task = gym(name)
    for example in task.examples("test"):
        before = pickle.dumps(example)
        if name not in WITHOUT_SOLUTION:
            assert task.score(example, f"So.\n{example['completion']}") == {"score": 1.0, "correct": 1.0}
            assert task.score(example, example["answer"]) == {"score": 0.0, "correct": 0.0}
        assert pickle.dumps(example) == before
    for text in GARBAGE:
        start = time.process_time()
        scores = task.score(example, f"<answer>{text}</answer>"), task.score(example, text)
        # Demanded of the project, so timed in spite of the rule against it.
        assert time.process_time() - start < 1
        assert all(0 <= each["score"] < 1 and each["correct"] == 0 for each in scores)


@pytest.mark.parametrize("name", NAMES.split())
def test_solutions_score_one_and_garbage_less_at_once_and_without_a_word(name, capfd):
    takes_solutions_alone(name)
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_so_it_is_with_all_other_problems_that_are_not_refused():
    from reasoning_gym.factory import DATASETS

    assert set(REFUSED) | set(NAMES.split()) | WITHOUT_SOLUTION <= set(DATASETS)
    for name in set(DATASETS) - set(REFUSED) - set(NAMES.split()):
        takes_solutions_alone(name)


@pytest.mark.slow
def test_no_scorer_evaluates_an_answer_but_those_refused_for_it():
    from reasoning_gym.factory import DATASETS, create_dataset

    compiled = []
    sys.addaudithook(lambda event, details: compiled.append(str(details[0])) if event == "compile" else None)
    found = set()
    for name in set(DATASETS) - {"composite", "codeio"}:
        data_set = create_dataset(name, size=1, seed=0)
        entry = data_set[0]
        for answer in ("canary", "[canary]", "canary + 1", "{'canary': canary}"):
            with contextlib.suppress(Exception):
                data_set.score_answer(answer, entry)
        found |= {name for text in compiled if "canary" in text}
        compiled.clear()
    assert found == {name for name, reason in REFUSED.items() if "Python code" in reason}


def test_a_question_stands_in_one_split_once_and_held_out_ones_are_the_same_whatever_the_size_of_training(caplog):
    small, large = (gym("gcd", options={"max_value": 12}, size=size) for size in (20, 40))
    splits = [[each["question"] for each in large.examples(split)] for split in ("train", "validation", "test")]
    assert len(set().union(*splits)) == sum(map(len, splits))
    assert "train problems of gcd repeat or are held out; left out" in caplog.text
    assert [each["question"] for each in small.examples("test")] == splits[2][: len(small.examples("test"))]
    assert [each["question"] for each in gym("gcd", seed=1).examples("test")] != splits[2][:3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "gsm_symbolc"}, "got 'gsm_symbolc'; did you mean gsm_symbolic or"),
        ({"name": "n_queens"}, "n_queens is not taken, because its scorer runs an answer as Python code"),
        ({"name": "coin_flip"}, "its scorer takes some wrong answers for right"),
        ({"options": {"min_term": 2}}, "unexpected keyword argument 'min_term'.*; its options are min_terms, max_t"),
        ({"options": {"min_terms": "two"}}, "makes no chain_sum of `options` {'min_terms': 'two'}.*are min_terms"),
        ({"options": {"min_terms": 9}}, "max_terms must be >= min_terms.*; its options are min_terms"),
        ({"options": {"seed": 3}}, "multiple values for keyword argument 'seed'"),
        ({"name": "gsm_symbolic", "level": 1}, "`level` 1: .*No curriculum registered for dataset 'gsm_symbolic'"),
        ({"level": -1}, "Must be between 0 and 10"),
        ({"answer_format": "box"}, "`answer_format` must be one of tags, plain, got 'box'"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(options, said):
    with pytest.raises(ValueError, match=rf"\A.*{said}.*\Z"):
        gym(**options)


def test_a_level_is_the_librarys_and_options_come_on_top():
    difficulty = gym(level=3).examples("test")[0]["metadata"]["difficulty"]
    assert difficulty == {"num_terms": (2, 5), "num_digits": (1, 4)}
    difficulty = gym(level=3, options={"max_digits": 2}).examples("test")[0]["metadata"]["difficulty"]
    assert difficulty == {"num_terms": (2, 5), "num_digits": (1, 2)}


def test_a_plain_answer_is_the_completion_and_a_prompt_then_the_question_alone():
    task = gym(answer_format="plain")
    example = task.examples("test")[0]
    assert example["completion"] == example["answer"]
    assert task.score(example, f" {example['answer']}\n")["correct"] == 1
    assert task.prompt(example) == example["question"]
    asked = gym(answer_format="plain", system_prompt="Be short.", instruction="Add.").prompt(example)
    assert [turn["role"] for turn in asked] == ["system", "user"]
    assert asked[1]["content"] == f"Add.\n\n{example['question']}"
    assert gym().prompt(example).startswith("Respond in the following format:\n<reasoning>")


def test_mixtures_demonstrations_and_workers_take_it():
    tasks = {"sums": gym(), "rules": gym("string_manipulation")}  # the latter's data set cannot be pickled
    options = {"reward_options": {"workers": 1, "time_limit": 100.0}}
    mixture = MixtureDataModule({name: TaskDataModule(task, **options) for name, task in tasks.items()})
    examples = [{"task": name, **task.examples("test")[0]} for name, task in tasks.items()]
    scores = mixture.reward(examples, [[each["completion"], "<answer>?</answer>"] for each in examples])
    mixture.reward.close()
    assert (scores.total.tolist(), scores.failures) == ([[1, 0], [1, 0]], 0)
    rows = DemonstrationsDataModule(gym(), tokenizer="sudoku_tiny", completion_length=32, batch_size=1)
    rows.setup("fit")


@pytest.mark.slow
def test_a_scorer_that_does_not_end_is_killed_and_counted(monkeypatch):
    monkeypatch.delitem(REFUSED, "coin_flip")
    task = gym("coin_flip", answer_format="plain")
    reward = Reward.of_task(task, workers=1, time_limit=20.0)
    example = task.examples("test")[0]
    scores = reward([example], [[example["answer"], "1e99999999"]])
    reward.close()
    assert scores.failures == 1
    assert scores.components["score"].tolist() == [[1, 0]]
