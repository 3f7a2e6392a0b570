"""Prompts for `DMPO` as LightningDataModules, with the reward that goes with them."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.tasks.base import Split, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptDataModule(LightningDataModule):
    """A prompt loader for each stage of a Trainer. `TaskDataModule` and `MixtureDataModule` say what is in them.

    Args:
        tokenizer: a tokenizer, or the id or folder of one. The command line fills in that of the model.
        prompts_per_buffer: prompts of one rollout buffer and rank.
        evaluation_batch_size: prompts per batch in validation, test and prediction.
    """

    def __init__(
        self,
        *,
        tokenizer: "str | PreTrainedTokenizerBase | None" = None,
        prompts_per_buffer: int = 1,
        evaluation_batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        self.prompts_per_buffer, self.evaluation_batch_size = prompts_per_buffer, evaluation_batch_size
        self._loaders: dict[str, PromptLoader] = {}

    @abstractmethod
    def make_loader(self, split: Split, batch_size: int) -> PromptLoader:
        """The prompts of a split. Those of training come in a new order each epoch."""

    def train_dataloader(self) -> PromptLoader:
        return self._loader("train", self.prompts_per_buffer)

    def val_dataloader(self) -> PromptLoader:
        return self._loader("validation", self.evaluation_batch_size)

    def test_dataloader(self) -> PromptLoader:
        return self._loader("test", self.evaluation_batch_size)

    def predict_dataloader(self) -> PromptLoader:
        return self.test_dataloader()

    def _loader(self, split: Split, batch_size: int) -> PromptLoader:
        # Built once, because a loader counts its epochs. A second one would begin with the order of the first epoch.
        if split not in self._loaders:
            self._loaders[split] = self.make_loader(split, batch_size)
        return self._loaders[split]


class TaskDataModule(PromptDataModule):
    """Prompts of any `Task`, and its reward.

    Args:
        task: examples, prompts and scores.
        reward_weights: of the task's score components in the reward. None takes those that the task states, or weight 1
            for each component if it states none.
        reward_options: further arguments of `Reward.of_task`: ``workers``, ``time_limit``, ``failure_score``,
            ``max_failure_share``.
        max_prompt_length: leaves out longer prompts, see `PromptLoader`.
        options: ``tokenizer``, ``prompts_per_buffer`` and ``evaluation_batch_size`` of `PromptDataModule`.

    Raises:
        ValueError: no tokenizer, or an empty split (when a loader is built).

    Example:
        >>> from dmpo_lightning import Sudoku, TaskDataModule
        >>> task = Sudoku(sizes={"train": 64, "validation": 8, "test": 8})
        >>> data = TaskDataModule(task, reward_weights={"solved": 1.0}, tokenizer="sudoku_tiny", prompts_per_buffer=8)
        >>> data.setup("fit")
        >>> len(next(iter(data.train_dataloader())))
        8
    """

    def __init__(
        self,
        task: Task,
        *,
        reward_weights: dict[str, float] | None = None,
        reward_options: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.task, self.max_prompt_length = task, max_prompt_length
        self.reward = Reward.of_task(task, reward_weights, **(reward_options or {}))

    def make_loader(self, split: Split, batch_size: int) -> PromptLoader:
        if self.tokenizer is None:
            raise ValueError("`tokenizer` is needed to make prompts; pass one, or the id or folder of one.")
        return PromptLoader(
            self.task.examples(split),
            self.tokenizer,
            batch_size=batch_size,
            prompt=self.task.prompt,
            prefill=self.task.prefill,
            shuffle=split == "train",
            max_prompt_length=self.max_prompt_length,
        )
