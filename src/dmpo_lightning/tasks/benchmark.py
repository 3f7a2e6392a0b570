r"""What the four reasoning benchmarks share: prompt styles, reward variants, answer checks.

The wording of the prompts, here and in the modules of the tasks, is that of d1 (arXiv 2504.12216, Apache-2.0), which
DMPO uses unchanged: without it their numbers cannot be reproduced. It is kept to the character, white space included
(the chat template of LLaDA trims the ends of a turn, others do not).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from dmpo_lightning.tasks.base import Example, Message, PromptStyle, Split, Task, Variant, Verdict

TRAIN_FORMAT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""
EVAL_FORMAT = """\
Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
\\boxed{...}
</answer>"""
MATH_EXPERT = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. "
    "Wrap the final answer in a \\boxed{}. "
)
MAX_COMPLETION = 1 << 16
"""Characters of a completion that are read, from its start; no published setting samples a tenth of them."""
PREFILLS: Mapping[PromptStyle, str] = {"train": "", "eval": "<reasoning>"}


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
            conversation; such a completion is the whole turn, prefill included.
        prefill: what the assistant's turn starts with; None is the style's own, nothing for ``train`` and
            ``<reasoning>`` for ``eval``. The training components see it in front of the completion, the answer check
            sees the completion alone, as published.

    Raises:
        ValueError: an unknown variant or style, or a few-shot entry without example or completion.
    """

    accuracy = "correct"
    components: ClassVar[Mapping[Variant, tuple[str, ...]]]
    """Names of the training components of each variant."""
    columns: ClassVar[tuple[str, ...]]
    """What a row of a data file must hold."""
    instructions: ClassVar[Mapping[PromptStyle, str]]
    """What comes before the task text, in each style."""

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
        prefill: str | None = None,
    ) -> None:
        check_choice("rewards", rewards, get_args(Variant))
        check_choice("verifier", verifier, get_args(Variant))
        check_choice("prompt_style", prompt_style, get_args(PromptStyle))
        for number, shot in enumerate(few_shot):
            if not {"example", "completion"} <= set(shot):
                raise ValueError(f"`few_shot` {number} must hold `example` and `completion`, got {sorted(shot)}.")
        self.data, self.rewards = {} if data is None else data, rewards
        self.verifier: Variant | None = verifier
        self.prompt_style, self.system_prompt, self.few_shot = prompt_style, system_prompt, few_shot
        self.instruction = self.instructions[prompt_style] if instruction is None else instruction
        self.prefill = PREFILLS[prompt_style] if prefill is None else prefill
        self.reward_weights = dict.fromkeys(self.components[rewards], 1.0)
        self._check_shots()

    def _check_shots(self) -> None:
        for number, shot in enumerate(self.few_shot):
            try:
                self.task_text(shot["example"])
            except (LookupError, TypeError) as error:
                raise ValueError(
                    f"The example of `few_shot` {number} is none of {type(self).__name__}: {error!r} is missing or of "
                    f"another kind; got {shot['example']!r}."
                ) from error

    def examples(self, split: Split) -> Sequence[Example]:
        if split not in self.data:
            raise ValueError(
                f"{type(self).__name__} has no {split} examples; it was made with {sorted(self.data) or 'no data'}. "
                f"Use {type(self).__name__}DataModule, or pass `data`."
            )
        return self.data[split]

    def prompt(self, example: Example) -> str | list[Message]:
        """The user's turn; a conversation if there is a system prompt or a solved example."""
        if self.system_prompt is None and not self.few_shot:
            return self._user_turn(example)
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
        """The training components of prefill and completion, and ``correct`` of the completion's answer check."""
        completion = completion[:MAX_COMPLETION]
        return {
            **self.training_components(example, self.prefill + completion),
            "correct": float(self.verdict(example, completion).correct),
        }

    def verify(self, example: Example, completion: str) -> Verdict:
        """The answer check, of at most `MAX_COMPLETION` characters."""
        return self.verdict(example, completion[:MAX_COMPLETION])

    @abstractmethod
    def task_text(self, example: Example) -> str:
        """The user's turn below the instruction."""

    @abstractmethod
    def training_components(self, example: Example, completion: str) -> dict[str, float]:
        """Named parts of the training reward."""

    @abstractmethod
    def verdict(self, example: Example, completion: str) -> Verdict:
        """What the answer check ``verifier`` finds."""

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
