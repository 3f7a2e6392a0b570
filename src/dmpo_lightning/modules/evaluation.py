"""Validation, test and prediction with named samplers: what `DMPO` does besides training."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.evaluation.batch import EvaluatedBatch, evaluate
from dmpo_lightning.evaluation.metrics import EvaluationMetrics, EvaluationResult
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.modules.base import OptimizerFactory, PolicyModule
from dmpo_lightning.modules.options import SchedulerFactory
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rewards.score_functions import ScoreFunction
from dmpo_lightning.rollout import PromptBatch, check_counts
from dmpo_lightning.samplers import Sampler


class EvaluationModule(PolicyModule):
    """Evaluates with each named sampler at each length, and averages over ranks. Use `DMPO`, which describes the
    arguments.

    The last evaluation is in ``results``, on every rank.
    """

    def __init__(
        self,
        model: str | Backbone | nn.Module,
        *,
        samplers: Mapping[str, Sampler],
        completion_length: int,
        evaluation_lengths: Sequence[int] | None,
        completions_per_prompt: int,
        reward: Reward | ScoreFunction | None,
        rows_per_forward: int | None,
        gather_for_generation: bool,
        optimizer: OptimizerFactory | None,
        lr_scheduler: SchedulerFactory | None,
        seed: int | None,
        check_forwards: bool,
    ) -> None:
        # Checked before the model is loaded, which may take minutes.
        check_counts(completions_per_prompt=completions_per_prompt, rows_per_forward=rows_per_forward)
        self._check_lengths(samplers, completion_length, evaluation_lengths)
        super().__init__(
            model,
            with_reference=True,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            seed=seed,
            check_forwards=check_forwards,
        )
        for sampler in samplers.values():
            sampler.validate_policy(self.policy)
        self.validation_samplers = dict(samplers)
        self.completion_length, self.rows_per_forward = completion_length, rows_per_forward
        self.gather_for_generation = gather_for_generation
        self.evaluation_lengths = (completion_length,) if evaluation_lengths is None else tuple(evaluation_lengths)
        self.completions_per_prompt = completions_per_prompt
        self.results: list[EvaluationResult] = []
        self.dropped_prompts = 0
        self._own_reward = _as_reward(reward)
        self._metrics: dict[tuple[str, int], EvaluationMetrics] = {}

    @staticmethod
    def _check_lengths(
        samplers: Mapping[str, Sampler], completion_length: int, evaluation_lengths: Sequence[int] | None
    ) -> None:
        if evaluation_lengths is None:
            for sampler in samplers.values():
                sampler.validate(completion_length)
            return
        lengths = list(evaluation_lengths)
        if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
            raise ValueError(f"`evaluation_lengths` must be different lengths of at least 1 token, got {lengths}.")
        for name, sampler in samplers.items():
            for length in lengths:
                try:
                    sampler.validate(length)
                except ValueError as error:
                    raise ValueError(f"`evaluation_lengths` {length} does not fit sampler {name!r}: {error}") from error

    @property
    def reward(self) -> Reward:
        """The reward given at construction, else the datamodule's.

        One that names neither an answer check nor an accuracy of its own takes the datamodule's.

        Raises:
            ValueError: there is neither.
        """
        theirs = _as_reward(getattr(getattr(self.trainer, "datamodule", None), "reward", None))
        own = self._own_reward
        unchecked = own is not None and own.verify is None and own.accuracy == "reward"
        # The copy is kept, because a reward counts its failures over the whole run, and a new one would forget them.
        if own is not None and unchecked and theirs is not None and theirs.verify is not None:
            self._own_reward = own = own.with_check_of(theirs)
        reward = own or theirs
        if reward is None:
            raise ValueError(
                "DMPO needs a reward: pass `reward=` (a function of an example and a completion), or a datamodule that "
                "has one."
            )
        return reward

    @property
    def has_own_reward(self) -> bool:
        """Whether a reward was given at construction."""
        return self._own_reward is not None

    def prompt_limit(self, completion_length: int) -> int | None:
        """Prompt tokens that the model takes beside a completion, None where the model names no limit."""
        limit = self.policy.max_length
        return None if limit is None else limit - completion_length

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.gather_for_generation:
            self.policy.check_gatherable()

    def evaluate_batch(
        self, batch: PromptBatch, sampler: Sampler, completion_length: int | None = None
    ) -> EvaluatedBatch:
        """Samples and scores ``completions_per_prompt`` completions of each prompt.

        They have the training length unless another is given.
        """
        # Gathered first: a rank that holds all weights runs by itself, and `phase` then compares no ranks.
        with self.gathered(), self.phase("evaluation"):
            return evaluate(
                self.policy,
                sampler,
                self.reward,
                batch,
                completions=self.completions_per_prompt,
                completion_length=completion_length or self.completion_length,
                seed=self.seed,
                rows_per_forward=self.rows_per_forward,
            )

    def gathered(self) -> AbstractContextManager[None]:
        """With ``gather_for_generation``, every rank holds all weights inside."""
        return self.policy.gathered() if self.gather_for_generation else nullcontext()

    def on_validation_start(self) -> None:
        """Refuses or drops prompts that the model cannot take, before the first is sampled."""
        self._start(self.trainer.val_dataloaders)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        return self._evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_results("val")

    def on_test_start(self) -> None:
        self._start(self.trainer.test_dataloaders)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        return self._evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        self._log_results("test")

    def on_predict_start(self) -> None:
        self._start(self.trainer.predict_dataloaders)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Returns the records of a batch, see `EvaluatedBatch.records`."""
        return self._evaluation_step(batch)["records"]

    def _start(self, loaders: Any) -> None:
        self._check_loaders(loaders)
        runs = [(name, length) for name in self.validation_samplers for length in self.evaluation_lengths]
        # Made anew for each evaluation, since sums would go on over the next one.
        self._metrics = {run: EvaluationMetrics(self.trainer.strategy.root_device) for run in runs}

    def _check_loaders(self, loaders: Any) -> None:
        self.dropped_prompts = 0
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            if not isinstance(loader, PromptLoader):
                raise ValueError(f"DMPO evaluates a PromptLoader, got {type(loader).__name__}; wrap your data in one.")
            # Training has told that loader to hand out each batch several times
            # (docs/decisions/005-binding-the-loader.md).
            if loader.is_training:
                raise ValueError(
                    "The training loader was given for evaluation too, where each prompt must come once; build a "
                    "second PromptLoader(dataset, tokenizer, batch_size=..., shuffle=False)."
                )
            # All lengths are evaluated on the same prompts, which must fit beside the longest.
            limit = self.prompt_limit(max(self.evaluation_lengths))
            if limit is not None:
                loader.limit_prompt_length(limit)
            self.dropped_prompts += loader.dropped

    def _evaluation_step(self, batch: PromptBatch) -> dict[str, Any]:
        """Counts a batch. Its records are the step's output, which Lightning hands to callbacks."""
        records = []
        for (name, length), metrics in self._metrics.items():
            evaluated = self.evaluate_batch(batch, self.validation_samplers[name], length)
            metrics.update(evaluated)
            records += evaluated.records(name)
        return {"records": records}

    def _log_results(self, stage: str) -> None:
        # Each result is a collective operation. The order is that of options, which all ranks have in common.
        self.results = [metrics.result(name, length) for (name, length), metrics in self._metrics.items()]
        for result in self.results:
            # A single length, whichever it is, keeps the names short, so that `monitor` reads the same for all of them.
            parts = [stage, result.sampler, *([str(result.length)] if len(self.evaluation_lengths) > 1 else [])]
            prefix = "/".join(parts)
            for name, (mean, error) in result.means.items():
                self._log_result(f"{prefix}/{name}", mean)
                if name == "accuracy":
                    self._log_result(f"{prefix}/{name}_stderr", error)
            self._log_result(f"{prefix}/tokens_per_second", result.tokens_per_second)

    def _log_result(self, name: str, value: float) -> None:
        """Logs on every rank, so that callbacks of every rank can monitor the value, on which ranks agree already."""
        self.log(name.replace(".", "_"), value, prog_bar=name.endswith("/accuracy"), sync_dist=True)


def _as_reward(reward: Reward | ScoreFunction | None) -> Reward | None:
    return reward if reward is None or isinstance(reward, Reward) else Reward(reward)
