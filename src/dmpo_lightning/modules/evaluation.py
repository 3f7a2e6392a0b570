"""Validation, test and prediction with named samplers: what `DMPO` does besides training."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.metrics import MeanWithError
from dmpo_lightning.rewards import Reward, ScoreFunction
from dmpo_lightning.rollout import PromptBatch, sample_completions, score_completions
from dmpo_lightning.samplers import Sampler

EVALUATION = -1
"""The iteration that keys evaluation draws: the same at every validation, so that curves share their noise."""


class EvaluationModule(PolicyModule):
    """One completion per prompt and named sampler, scored and averaged over ranks; not used by itself."""

    def __init__(
        self,
        *,
        samplers: Mapping[str, Sampler],
        completion_length: int,
        reward: Reward | ScoreFunction | None,
        rows_per_forward: int | None,
        **policy: Any,
    ) -> None:
        for sampler in samplers.values():
            sampler.validate(completion_length)
        super().__init__(**policy)
        self.validation_samplers = dict(samplers)
        self.completion_length, self.rows_per_forward = completion_length, rows_per_forward
        self._own_reward = _as_reward(reward)
        self._metrics = nn.ModuleDict()

    @property
    def reward(self) -> Reward:
        """The reward given at construction, else the datamodule's.

        Raises:
            ValueError: there is neither.
        """
        reward = self._own_reward or _as_reward(getattr(getattr(self.trainer, "datamodule", None), "reward", None))
        if reward is None:
            raise ValueError(
                "DMPO needs a reward: pass `reward=` (a function of an example and a completion), or a datamodule that "
                "has one."
            )
        return reward

    @property
    def max_prompt_length(self) -> int | None:
        """Prompt tokens that the model takes beside a completion; None where the model names no limit."""
        limit = self.policy.max_length
        return None if limit is None else limit - self.completion_length

    def evaluate_batch(self, batch: PromptBatch, sampler: Sampler) -> tuple[dict[str, Tensor], list[str]]:
        """One completion per prompt: score components ``[batch]``, with ``reward`` and ``accuracy``, and the texts."""
        samples, _ = sample_completions(
            self.policy,
            sampler,
            batch,
            group_size=1,
            completion_length=self.completion_length,
            seed=self.seed,
            iteration=EVALUATION,
            rows_per_forward=self.rows_per_forward,
        )
        reward = self.reward
        scores, texts = score_completions(self.policy, reward, batch, samples, group_size=1)
        values = {"reward": scores.total, **scores.components}
        values.setdefault("accuracy", values.get(reward.accuracy, 0 * scores.total))
        return {name: value.squeeze(1) for name, value in values.items()}, texts

    def on_validation_start(self) -> None:
        """Refuses or drops prompts that the model cannot take, before the first is sampled."""
        self._check_loaders(self.trainer.val_dataloaders)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_start(self) -> None:
        self._check_loaders(self.trainer.test_dataloaders)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def on_predict_start(self) -> None:
        self._check_loaders(self.trainer.predict_dataloaders)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt and sampler: prompt id, sampler, example, completion, score components."""
        records = []
        for name, sampler in self.validation_samplers.items():
            values, texts = self.evaluate_batch(batch, sampler)
            for row in (~batch.is_filler).nonzero().flatten().tolist():
                records.append(
                    {
                        "index": int(batch.prompt_index[row]),
                        "sampler": name,
                        "example": batch.examples[row],
                        "completion": texts[row],
                        "scores": {component: float(value[row]) for component, value in values.items()},
                    }
                )
        return records

    def _check_loaders(self, loaders: Any) -> None:
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if not isinstance(loader, PromptLoader):
                raise ValueError(f"DMPO evaluates a PromptLoader, got {type(loader).__name__}; wrap your data in one.")
            if loader.is_training:
                raise ValueError(
                    "The training loader was given for evaluation too, where each prompt must come once; build a "
                    "second "
                    "PromptLoader(dataset, tokenizer, batch_size=..., shuffle=False)."
                )
            if self.max_prompt_length is not None:
                loader.limit_prompt_length(self.max_prompt_length)

    def _evaluation_step(self, batch: PromptBatch, stage: str) -> None:
        for name, sampler in self.validation_samplers.items():
            values, _ = self.evaluate_batch(batch, sampler)
            for component, value in values.items():
                self._metric(f"{stage}/{name}/{component}").update(value[~batch.is_filler.cpu()])

    def _metric(self, name: str) -> MeanWithError:
        key = name.replace(".", "_")
        if key not in self._metrics:
            self._metrics[key] = MeanWithError().to(self.device)
        metric = self._metrics[key]
        assert isinstance(metric, MeanWithError)
        return metric

    def _log_metrics(self, stage: str) -> None:
        for name, metric in self._metrics.items():
            if name.startswith(f"{stage}/"):
                assert isinstance(metric, MeanWithError)
                mean, error = metric.compute()
                self.log(name, mean, prog_bar=name.endswith("/accuracy"), rank_zero_only=True)
                if name.endswith("/accuracy"):
                    self.log(f"{name}_stderr", error, rank_zero_only=True)
                metric.reset()


def _as_reward(reward: Reward | ScoreFunction | None) -> Reward | None:
    return reward if reward is None or isinstance(reward, Reward) else Reward(reward)
