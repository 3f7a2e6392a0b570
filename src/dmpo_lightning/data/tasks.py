"""Tasks as LightningDataModules of prompts, with the reward that goes with them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule

from dmpo_lightning.data.prompts import LongPrompts, PromptLoader
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.rewards import Reward
from dmpo_lightning.tasks.base import Split, Task
from dmpo_lightning.tasks.sudoku import Sudoku

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaskDataModule(LightningDataModule):
    """Prompts of any `Task`, and its reward.

    Args:
        task: examples, prompts and scores.
        tokenizer: a tokenizer, or the id or folder of one; the command line fills in that of the model.
        prompts_per_buffer: prompts of one rollout buffer and rank.
        evaluation_batch_size: prompts per batch in validation, test and prediction.
        reward_weights: of the task's score components in the reward; None takes each with weight 1.
        max_prompt_length: in tokens; None leaves it to the model's own limit.
        on_long_prompt: ``error`` or ``drop``, see `PromptLoader`.

    Raises:
        ValueError: an empty split or a prompt that is too long, when its loader is built.
    """

    def __init__(
        self,
        task: Task,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        prompts_per_buffer: int,
        evaluation_batch_size: int = 64,
        reward_weights: Mapping[str, float] | None = None,
        max_prompt_length: int | None = None,
        on_long_prompt: LongPrompts = "error",
    ) -> None:
        super().__init__()
        self.task, self.tokenizer = task, load_tokenizer(tokenizer)
        self.prompts_per_buffer, self.evaluation_batch_size = prompts_per_buffer, evaluation_batch_size
        self.max_prompt_length, self.on_long_prompt = max_prompt_length, on_long_prompt
        self.reward = Reward.of_task(task, reward_weights)
        self._loaders: dict[str, PromptLoader] = {}

    def train_dataloader(self) -> PromptLoader:
        return self._loader("train", self.prompts_per_buffer)

    def val_dataloader(self) -> PromptLoader:
        return self._loader("validation", self.evaluation_batch_size)

    def test_dataloader(self) -> PromptLoader:
        return self._loader("test", self.evaluation_batch_size)

    def predict_dataloader(self) -> PromptLoader:
        return self._loader("test", self.evaluation_batch_size)

    def _loader(self, split: Split, batch_size: int) -> PromptLoader:
        if split not in self._loaders:
            self._loaders[split] = PromptLoader(
                self.task.examples(split),
                self.tokenizer,
                batch_size=batch_size,
                prompt=self.task.prompt,
                shuffle=split == "train",
                max_prompt_length=self.max_prompt_length,
                on_long_prompt=self.on_long_prompt,
            )
        return self._loaders[split]


class SudokuDataModule(TaskDataModule):
    """4x4 Sudoku, generated, split by solution; see `Sudoku` and `TaskDataModule` for the arguments.

    Raises:
        ValueError: as `Sudoku` and `TaskDataModule` do.
    """

    def __init__(
        self,
        *,
        tokenizer: "str | PreTrainedTokenizerBase",
        prompts_per_buffer: int,
        evaluation_batch_size: int = 64,
        reward_weights: Mapping[str, float] | None = None,
        blanks: tuple[int, int] = (8, 12),
        sizes: dict[str, int] | None = None,
        split_seed: int = 0,
        prompt_template: str = "{puzzle}",
        max_prompt_length: int | None = None,
        on_long_prompt: LongPrompts = "error",
    ) -> None:
        super().__init__(
            Sudoku(blanks=blanks, sizes=sizes, seed=split_seed, prompt_template=prompt_template),
            tokenizer=tokenizer,
            prompts_per_buffer=prompts_per_buffer,
            evaluation_batch_size=evaluation_batch_size,
            reward_weights=reward_weights,
            max_prompt_length=max_prompt_length,
            on_long_prompt=on_long_prompt,
        )
