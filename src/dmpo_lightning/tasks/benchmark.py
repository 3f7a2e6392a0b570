r"""What the four reasoning benchmarks share: prompt styles, reward variants, answer checks.

Of the prompts, the format instruction of style ``train`` and its place (one user turn: instruction, blank line, task
text) are those published with d1 and DMPO, as are the ``\boxed{}`` inside ``<answer>`` and the prefilled
``<reasoning>`` of style ``eval``. The wording of the ``eval`` instruction and of the task texts of MATH, Countdown and
Sudoku is ours.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from dmpo_lightning.tasks.base import Example, Message, PromptStyle, Split, Task, Variant, Verdict

TRAIN_INSTRUCTION = """\
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""
EVAL_INSTRUCTION = """\
Reason step by step, then give the final answer in \\boxed{}. Respond in the following format:
<reasoning>
Your reasoning
</reasoning>
<answer>
\\boxed{...}
</answer>"""


class Benchmark(Task):
    """A task with a gold answer per example.

    Args:
        data: examples by split; a split that is missing is an error when it is asked for.
        rewards: which components `score` returns for training; `reward_weights` adds them up.
        verifier: which answer check gives the component ``correct``, the accuracy.
        prompt_style: ``train`` asks for reasoning and answer in tags, ``eval`` for a box inside the answer tag.
        system_prompt: a system turn before the user's; None sends none, as published.
        instruction: replaces the style's text before the task text; an empty one leaves it out.
        few_shot: solved examples shown first, each ``{"example": ..., "completion": ...}``, as turns of the
            conversation.

    Raises:
        ValueError: an unknown variant or style, or a few-shot entry without example or completion.
    """

    accuracy = "correct"
    components: ClassVar[Mapping[Variant, tuple[str, ...]]]
    """Names of the training components of each variant."""
    columns: ClassVar[tuple[str, ...]]
    """What a row of a data file must hold."""

    def __init__(
        self,
        data: Mapping[str, Sequence[Example]] | None = None,
        *,
        rewards: Variant = "verified",
        verifier: Variant = "verified",
        prompt_style: PromptStyle = "train",
        system_prompt: str | None = None,
        instruction: str | None = None,
        few_shot: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        check_choice("rewards", rewards, get_args(Variant))
        check_choice("verifier", verifier, get_args(Variant))
        check_choice("prompt_style", prompt_style, get_args(PromptStyle))
        for number, shot in enumerate(few_shot):
            if not {"example", "completion"} <= set(shot):
                raise ValueError(f"`few_shot` {number} must hold `example` and `completion`, got {sorted(shot)}.")
        self.data, self.rewards, self.verifier = {} if data is None else data, rewards, verifier
        self.prompt_style, self.system_prompt, self.few_shot = prompt_style, system_prompt, few_shot
        styles = {"train": TRAIN_INSTRUCTION, "eval": EVAL_INSTRUCTION}
        self.instruction = styles[prompt_style] if instruction is None else instruction
        self.reward_weights = dict.fromkeys(self.components[rewards], 1.0)

    def examples(self, split: Split) -> Sequence[Example]:
        if split not in self.data:
            raise ValueError(
                f"{type(self).__name__} has no {split} examples; it was made with {sorted(self.data) or 'no data'}. "
                f"Use {type(self).__name__}DataModule, or pass `data`."
            )
        return self.data[split]

    def prompt(self, example: Example) -> list[Message]:
        turns: list[Message] = []
        if self.system_prompt is not None:
            turns.append({"role": "system", "content": self.system_prompt})
        for shot in self.few_shot:
            turns.append({"role": "user", "content": self._user_turn(shot["example"])})
            turns.append({"role": "assistant", "content": shot["completion"]})
        return [*turns, {"role": "user", "content": self._user_turn(example)}]

    def _user_turn(self, example: Example) -> str:
        return "\n\n".join(filter(None, (self.instruction, self.task_text(example))))

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """The training components of the chosen variant, and ``correct`` of the chosen answer check."""
        return {
            **self.training_components(example, completion),
            "correct": float(self.verify(example, completion).correct),
        }

    @abstractmethod
    def task_text(self, example: Example) -> str:
        """The user's turn below the instruction."""

    @abstractmethod
    def training_components(self, example: Example, completion: str) -> dict[str, float]:
        """Named parts of the training reward."""

    @abstractmethod
    def verify(self, example: Example, completion: str) -> Verdict:
        """The answer check."""

    @classmethod
    @abstractmethod
    def from_row(cls, row: Mapping[str, Any]) -> Example:
        """An example from a row of the benchmark's data files.

        Raises:
            ValueError: the row holds no gold answer.
        """

    @classmethod
    @abstractmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        """An example from ``question`` and ``ground_truth`` of a saved completion."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the choices, for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
