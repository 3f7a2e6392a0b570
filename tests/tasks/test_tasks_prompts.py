"""The prompts of the benchmarks. The golden files hold the published texts in LLaDA's chat template, written from the
publication and not by this package.
"""

import json
from pathlib import Path

import pytest

from dmpo_lightning import GSM8K, Countdown, Math500, Sudoku, load_tokenizer
from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.data.tokens import chat_text
from dmpo_lightning.models.llada import FAMILY
from dmpo_lightning.rewards.reward import Reward

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = {
    GSM8K: {
        "question": "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
        "muffins for her friends every day with four. She sells the remainder at the farmers' market daily for $2 "
        "per fresh duck egg. How much in dollars does she make every day at the farmers' market?",
        "answer": "18",
    },
    Math500: {
        "problem": "An equilateral triangle is inscribed in the parabola $x^2 = 8y,$ such that one of the vertices of "
        "the triangle coincides with the vertex of the parabola.  Find the side length of this equilateral triangle.",
        "answer": "16 \\sqrt{3}",
    },
    Countdown: {"numbers": [49, 55, 53], "target": 51},
    Sudoku: {"puzzle": "4320004330100004", "solution": "4321124334122134"},
}
TASKS = list(EXAMPLES)


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer("sudoku_tiny")
    made.chat_template = FAMILY.chat_template
    return made


def turn(content, role="user"):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("style", ["train", "eval"])
@pytest.mark.parametrize("kind", TASKS)
def test_templated_prompts_are_the_published_text(kind, style, tokenizer):
    task = kind(prompt_style=style)
    text = chat_text(tokenizer, task.prompt(EXAMPLES[kind])) + task.prefill
    assert text == (GOLDEN / f"{kind.__name__.lower()}_{style}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", TASKS)
def test_the_examples_are_the_first_of_the_published_completions(kind, test_data):
    file = test_data / "llada_8b_instruct_256" / f"{kind.__name__.lower()}.jsonl"
    record = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    if kind is Math500:
        assert record["question"] == EXAMPLES[kind]["problem"]
    elif kind is GSM8K:
        assert record["question"] == EXAMPLES[kind]["question"]
    else:
        assert kind.from_saved(record) == EXAMPLES[kind]


def test_white_space_at_the_ends_of_a_turn_is_kept_for_templates_that_do_not_trim():
    assert GSM8K().prompt(EXAMPLES[GSM8K]).startswith("\nRespond in the following format:\n")
    assert Sudoku().prompt(EXAMPLES[Sudoku]).endswith("puzzle: 4320004330100004\n")


@pytest.mark.parametrize("kind", TASKS)
def test_train_is_the_default_style_and_has_no_prefill(kind):
    assert kind().prompt(EXAMPLES[kind]) == kind(prompt_style="train").prompt(EXAMPLES[kind])
    assert kind().prefill == ""


@pytest.mark.parametrize("kind", TASKS)
def test_system_prompt_and_solved_examples_become_turns(kind, tokenizer):
    shots = [{"example": EXAMPLES[kind], "completion": "<reasoning>easy</reasoning>"}]
    task = kind(system_prompt="Be brief.", instruction="Solve:", few_shot=shots)
    question = turn(f"Solve:\n\n{task.task_text(EXAMPLES[kind]).strip()}")
    assert chat_text(tokenizer, task.prompt(EXAMPLES[kind])) == (
        "<|startoftext|>"
        + turn("Be brief.", "system")
        + question
        + turn("<reasoning>easy</reasoning>", "assistant")
        + question
        + ASSISTANT
    )


@pytest.mark.parametrize("kind", TASKS)
def test_an_empty_instruction_leaves_the_task_text_alone(kind):
    task = kind(instruction="")
    assert task.prompt(EXAMPLES[kind]) == task.task_text(EXAMPLES[kind])


def test_a_solved_example_needs_both_parts():
    with pytest.raises(ValueError, match=r"`few_shot` 1 must hold `example` and `completion`, got \['example'\]"):
        GSM8K(few_shot=[{"example": {}, "completion": ""}, {"example": {}}])


def test_an_unknown_style_is_an_error():
    with pytest.raises(ValueError, match="`prompt_style` must be one of train, eval, got 'test'"):
        Sudoku(prompt_style="test")


# Prefill --------------------------------------------------------------------------------------------------------------


def test_a_prefill_of_ones_own_replaces_that_of_the_style():
    assert Countdown(prompt_style="eval").prefill == "<reasoning>"
    assert Countdown(prompt_style="eval", prefill="").prefill == ""
    assert Countdown(prefill="Let me see.").prefill == "Let me see."


def test_the_loader_puts_the_prefill_behind_the_assistants_header(tokenizer):
    example = EXAMPLES[Sudoku]
    task = Sudoku(prompt_template="{puzzle}", prefill="<answer>1")
    (batch,) = PromptLoader([example], tokenizer, batch_size=1, prompt=task.prompt, prefill=task.prefill, shuffle=False)
    text = f"<|startoftext|>{turn(example['puzzle'])}{ASSISTANT}<answer>1"
    assert batch.prompt_ids[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(batch.prompt_ids[0]) == text


CONTINUED = "\nx\n</reasoning>\n<answer>\n42\n</answer>\n"
"""A completion that goes on from the prefill."""


def test_training_components_see_the_prefill_and_the_answer_check_does_not():
    example = {"question": "?", "answer": "42"}
    for rewards, layout in (("verified", {"format": 0.5}), ("published", {"tags": 0.5, "strict_format": 0.5})):
        with_prefill = GSM8K(rewards=rewards, prefill="<reasoning>").score(example, CONTINUED)
        without = GSM8K(rewards=rewards).score(example, CONTINUED)
        assert {name: with_prefill[name] for name in layout} == layout
        assert all(without[name] < value for name, value in layout.items())
    seen = []

    class Spy(GSM8K):
        def check(self, example, completion):
            seen.append(completion)
            return super().check(example, completion)

    assert Reward.of_task(Spy(prefill="<reasoning>"))([example], [[CONTINUED]]).components["correct"].item() == 1
    assert seen == [CONTINUED]


def test_a_sudoku_answer_may_begin_in_the_prefill_and_is_then_not_in_the_completion():
    example = EXAMPLES[Sudoku]
    task = Sudoku(prefill=f"<answer>{example['solution'][:8]}", check="verified")
    scores = task.score(example, f"{example['solution'][8:]}</answer>")
    assert scores == {"cells": 1.0, "solved": 1.0}
    assert not task.check(example, f"{example['solution'][8:]}</answer>").correct
