r"""What the four reasoning benchmarks share: prompts, rewards and checks in variants.

The wording of the prompts, here and in the modules of the tasks, is that of d1 (arXiv 2504.12216, Apache-2.0), which
DMPO uses unchanged. Without it their numbers cannot be reproduced. It is kept to the character, white space included:
the chat template of LLaDA trims the ends of a turn, others do not.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from dmpo_lightning.tasks.answers import has_layout
from dmpo_lightning.tasks.base import (
    Example,
    Message,
    PromptStyle,
    Split,
    Task,
    Variant,
    Verdict,
    check_choice,
    check_template,
    fill_template,
)

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
    "Wrap the final answer in a \\boxed{}."
)
MAX_COMPLETION = 1 << 16
"""Characters of a completion that are read, from its start. No published setting samples a tenth of them."""
PREFILLS: Mapping[PromptStyle, str] = {"train": "", "eval": "<reasoning>"}


class Benchmark(Task):
    """A task with a gold answer per example.

    Args:
        data: examples by split. A split that is missing is an error when it is asked for.
        rewards: which components `score` returns for training. The reward is their sum.
        check: which variant of the check gives the component ``correct``, the accuracy.
        prompt_style: ``train`` asks for reasoning and answer in tags, ``eval`` for a box inside the answer tag.
        system_prompt: a system turn before the user's. None sends none, as published.
        instruction: replaces the style's text before the task text. An empty one leaves it out.
        prompt_template: the whole of the user's turn instead. Each of `fields` stands in it in braces, such as
            ``{question}``.
        few_shot: solved examples shown first, each ``{"example": ..., "completion": ...}``, as turns of the
            conversation. Such a completion is the whole turn, prefill included.
        prefill: what the assistant's turn starts with. None is the style's own: nothing for ``train`` and
            ``<reasoning>`` for ``eval``. The score sees it in front of the completion. The check sees the completion
            alone, as published.

    Raises:
        ValueError: an unknown variant or style, a few-shot entry without example or completion, a template without one
            of its fields or beside an ``instruction``.
    """

    accuracy = "correct"
    verified_rewards: ClassVar[tuple[float, float]] = (0.5, 2.0)
    """What reasoning and answer in tags are worth, and a right answer, in the rewards ``verified``."""
    columns: ClassVar[tuple[str, ...]]
    """What a row of a data file must hold."""
    fields: ClassVar[tuple[str, ...]]
    """What of an example a prompt shows."""
    instructions: ClassVar[Mapping[PromptStyle, str]]
    """What comes before the task text, in each style."""
    unchecked_accuracy: ClassVar[str | None] = None
    """The component that is the accuracy where ``check`` is None. A benchmark without such a one is always checked."""

    def __init__(
        self,
        data: Mapping[str, Sequence[Example]] | None = None,
        *,
        rewards: Variant = "verified",
        check: Variant | None = "verified",
        prompt_style: PromptStyle = "train",
        system_prompt: str | None = None,
        instruction: str | None = None,
        prompt_template: str | None = None,
        few_shot: Sequence[Mapping[str, Any]] = (),
        prefill: str | None = None,
    ) -> None:
        check_choice("rewards", rewards, get_args(Variant))
        check_choice("prompt_style", prompt_style, get_args(PromptStyle))
        if check is not None or self.unchecked_accuracy is None:
            check_choice("check", str(check), get_args(Variant))
        else:
            self.accuracy = self.unchecked_accuracy
        if prompt_template is not None:
            check_template(prompt_template, self.fields)
            if instruction is not None:
                raise ValueError("`prompt_template` is the whole of the user's turn; leave it out, or `instruction`.")
        for number, shot in enumerate(few_shot):
            if not {"example", "completion"} <= set(shot):
                raise ValueError(f"`few_shot` {number} must hold `example` and `completion`, got {sorted(shot)}.")
        self.data, self.rewards, self.check_name = {} if data is None else data, rewards, check
        self.prompt_style, self.system_prompt, self.few_shot = prompt_style, system_prompt, few_shot
        self.instruction = self.instructions[prompt_style] if instruction is None else instruction
        self.prompt_template = prompt_template
        self.prefill = PREFILLS[prompt_style] if prefill is None else prefill

    def examples(self, split: Split) -> Sequence[Example]:
        if split not in self.data:
            raise ValueError(
                f"{type(self).__name__} has no {split} examples; it was made with {sorted(self.data) or 'no data'}. "
                f"Use {type(self).__name__}DataModule, or pass `data`."
            )
        return self.data[split]

    def prompt(self, example: Example) -> str | list[Message]:
        """The user's turn, or a conversation if there is a system prompt or a solved example."""
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
        if self.prompt_template is not None:
            return fill_template(self.prompt_template, {name: example[name] for name in self.fields})
        # An empty instruction leaves no blank lines behind.
        return "\n\n".join(filter(None, (self.instruction, self.task_text(example))))

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """The training components of prefill and completion."""
        text = self.prefill + completion[:MAX_COMPLETION]
        if self.rewards == "published":
            return self.published_components(example, text)
        return self.verified_components(text, self.verified_check(example, text))

    def check(self, example: Example, completion: str) -> Verdict:
        """The variant that was chosen, or ``verified`` if none was, of at most `MAX_COMPLETION` characters."""
        check = self.published_check if self.check_name == "published" else self.verified_check
        return check(example, completion[:MAX_COMPLETION])

    @property
    def has_check(self) -> bool:
        return self.check_name is not None

    def facts(self) -> dict[str, Any]:
        # A template is the whole of the user's turn, so that the style's instruction is not used.
        turn = {"prompt template": self.prompt_template, "instruction": None}
        return super().facts() | {
            "prompt style": self.prompt_style,
            "system prompt": self.system_prompt,
            **({"instruction": self.instruction} if self.prompt_template is None else turn),
            "few-shot examples": len(self.few_shot),
            "rewards": self.rewards,
        }

    @abstractmethod
    def task_text(self, example: Example) -> str:
        """The user's turn below the instruction."""

    @abstractmethod
    def published_components(self, example: Example, completion: str) -> dict[str, float]:
        """The training components of d1 and DMPO."""

    def verified_components(self, completion: str, verdict: Verdict) -> dict[str, float]:
        """The training components that we hold to be right, given what `verified_check` says of the completion.

        The default has ``format`` and ``correctness``, of `verified_rewards`.
        """
        layout, right = self.verified_rewards
        return {"format": layout * has_layout(completion), "correctness": right * verdict.correct}

    @abstractmethod
    def published_check(self, example: Example, completion: str) -> Verdict:
        """The check with which d1 and DMPO evaluate."""

    @abstractmethod
    def verified_check(self, example: Example, completion: str) -> Verdict:
        """The check that we hold to be right."""

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
