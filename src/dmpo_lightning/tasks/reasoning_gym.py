"""Problems of the library reasoning-gym (arXiv 2505.24760, Apache-2.0), which makes and scores them."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from typing import Any, Literal

from dmpo_lightning.tasks.answers import last_block
from dmpo_lightning.tasks.base import Example, Message, Split, Task, check_choice, check_sizes
from dmpo_lightning.tasks.benchmark import MAX_COMPLETION, TRAIN_FORMAT

logger = logging.getLogger(__name__)
SPLITS: tuple[Split, ...] = ("test", "validation", "train")
SPACING = 10_000_000
"""Between the seeds of two splits. Problem i has the seed + i in the library, so that near seeds share problems."""
_EVALUATED = """binary_matrix countdown intermediate_integration n_queens polynomial_multiplication puzzle24
simple_integration spiral_matrix string_insertion"""
_KIND = "coin_flip complex_arithmetic game_of_life_halting number_sorting"
_UNSTEADY = "isomorphic_strings knight_swap list_functions ransom_note"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(_EVALUATED.split(), "its scorer runs an answer as Python code, by `eval` or through sympy"),
    **dict.fromkeys(_KIND.split(), "its scorer takes some wrong answers for right, such as `nan`"),
    **dict.fromkeys(_UNSTEADY.split(), "its problems are others in each process, whatever the seed"),
    "codeio": "its problems are made by running programs that a language model wrote",
    "composite": "`MixtureDataModule` mixes problems",
}
"""Problems of reasoning-gym 0.1.25 that are not taken, and why."""


class ReasoningGym(Task):
    """A problem of reasoning-gym by its name. An example is an entry of the library's data set.

    The score is that of the library's scorer, and an answer is right if it is 1. An answer at which the scorer raises,
    or which it gives no number from 0 to 1, scores 0. A solution that the library states is the ``completion`` of its
    example too, for `DemonstrationsDataModule`. A question stands in one split, once; reworded it is another question.

    Args:
        name: of the problem, such as ``gsm_symbolic``. Those of `REFUSED` are not taken.
        options: of the problem, as the library has them: ``{min_terms: 2, max_terms: 3}``.
        level: of the library's curriculum, from 0 on. One behind the last is the last. ``options`` come on top.
        sizes: problems made per split, some in 0.3 s each; 4096 for train, 256 for validation, 512 for test.
        answer_format: ``tags`` takes the answer from the last ``<answer>...</answer>``, ``plain`` is the completion.
        instruction: comes before the question. None asks for the tags, and for nothing if the answer is ``plain``.
        system_prompt: a system turn before the user's. None sends none.
        seed: of all problems, those held out included.

    Raises:
        ValueError: no reasoning-gym, no such problem or a refused one, options or a level that it does not have.

    Example:
        >>> from dmpo_lightning import ReasoningGym
        >>> task = ReasoningGym("basic_arithmetic", sizes={"train": 4}, answer_format="plain")
        >>> example = task.examples("train")[0]
        >>> task.score(example, example["answer"])
        {'score': 1.0, 'correct': 1.0}
    """

    accuracy = "correct"
    reward_weights = {"score": 1.0}

    def __init__(
        self,
        name: str,
        *,
        options: dict[str, Any] | None = None,
        level: int | None = None,
        sizes: dict[str, int] | None = None,
        answer_format: Literal["tags", "plain"] = "tags",
        instruction: str | None = None,
        system_prompt: str | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("answer_format", answer_format, ("tags", "plain"))
        if find_spec("reasoning_gym") is None:
            raise ValueError("`ReasoningGym` needs reasoning-gym: pip install 'dmpo-lightning[reasoning_gym]'.")
        from reasoning_gym.factory import DATASETS

        if name in REFUSED:
            raise ValueError(f"`name` {name} is not taken, because {REFUSED[name]}.")
        if name not in DATASETS:
            near = " or ".join(get_close_matches(name, DATASETS, cutoff=0.0))
            raise ValueError(f"`name` must be a problem of reasoning-gym, got {name!r}; did you mean {near}?")
        self.name, self.options, self.level, self.seed = name, options or {}, level, seed
        self.sizes = {"train": 4096, "validation": 256, "test": 512} | check_sizes(sizes)
        self._tags, self.system_prompt = answer_format == "tags", system_prompt
        self.instruction = TRAIN_FORMAT.strip() * self._tags if instruction is None else instruction
        self._made: dict[str, list[Example]] = {}
        try:
            self._entries("test", 1)
        # The library asserts, and fails in any way at values of a wrong type.
        except Exception as error:
            taken = ", ".join(each.name for each in fields(DATASETS[name][1]) if each.name not in ("seed", "size"))
            made = f"{name} of `options` {self.options} and `level` {level}"
            raise ValueError(f"reasoning-gym makes no {made}: {error!r}; its options are {taken}.") from error

    def examples(self, split: Split) -> Sequence[Example]:
        check_choice("split", split, SPLITS)
        taken: set[str] = set()
        for each in SPLITS[: SPLITS.index(split) + 1]:
            if each not in self._made:
                new = {entry["question"]: entry for entry in self._entries(each, self.sizes[each])}
                self._made[each] = [entry for question, entry in new.items() if question not in taken]
                if less := self.sizes[each] - len(self._made[each]):
                    logger.warning("%d %s problems of %s repeat or are held out; left out.", less, each, self.name)
            taken |= {entry["question"] for entry in self._made[each]}
        return self._made[split]

    def _entries(self, split: Split, count: int) -> list[Example]:
        with redirect_stdout(StringIO()):  # One generator prints dots.
            data_set = self._data_set(split)
            entries = [data_set[index] for index in range(count)]
        for entry in entries:
            if entry["answer"] is not None:
                entry["completion"] = f"<answer>{entry['answer']}</answer>" if self._tags else entry["answer"]
        return entries

    def _data_set(self, split: Split) -> Any:
        from reasoning_gym.factory import create_curriculum, create_dataset

        level: dict[str, Any] = {}
        if self.level is not None:
            curriculum = create_curriculum(self.name)
            curriculum.set_global_level(self.level)
            level = vars(curriculum.generate_configuration())
        own = {name: value for name, value in level.items() if name not in ("seed", "size")} | self.options
        seed = (3 * self.seed + SPLITS.index(split)) * SPACING
        return create_dataset(self.name, seed=seed, size=self.sizes[split], **own)

    def prompt(self, example: Example) -> str | list[Message]:
        turn = "\n\n".join(filter(None, (self.instruction, example["question"])))
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": turn}] if system else turn

    @cached_property
    def _scorer(self) -> Any:
        return self._data_set("test")

    def score(self, example: Example, completion: str) -> dict[str, float]:
        text, score = completion[:MAX_COMPLETION], 0.0
        answer = last_block(text) if self._tags else text
        # Some scorers print, and several raise at what they cannot read.
        with redirect_stdout(StringIO()), suppress(Exception):
            score = 0.0 if answer is None else float(self._scorer.score_answer(answer.strip(), example))
        return {"score": score if 0 <= score <= 1 else 0.0, "correct": float(score == 1)}

    def facts(self) -> dict[str, Any]:
        own = {"problem": self.name, "options": self.options, "level": self.level, "rewards": "reasoning-gym"}
        return super().facts() | {"system prompt": self.system_prompt, "instruction": self.instruction} | own

    def __getstate__(self) -> dict[str, Any]:
        # A worker makes its own scorer, since some cannot be pickled.
        return {name: value for name, value in vars(self).items() if name != "_scorer"} | {"_made": {}}
