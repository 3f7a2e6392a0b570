"""Validation, test and prediction with named samplers: what `DMPO` does besides training."""

from collections.abc import Mapping, Sequence
from typing import Any

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.evaluation.batch import EvaluatedBatch, evaluate
from dmpo_lightning.evaluation.metrics import EvaluationMetrics, EvaluationResult
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.rewards.functions import ScoreFunction
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import PromptBatch, Sampling, check_counts
from dmpo_lightning.samplers import Sampler


class Evaluator:
    """Evaluates the policy of a module with each named sampler at each length, and averages over ranks.

    Args:
        module: whose policy, seed and Trainer are used.
        samplers: by name.
        lengths: tokens per completion.
        completions: of each prompt.
        reward: a `Reward`, or a function of an example and a completion. None takes the datamodule's.
    """

    def __init__(
        self,
        module: PolicyModule,
        *,
        samplers: Mapping[str, Sampler],
        lengths: Sequence[int],
        completions: int,
        reward: Reward | ScoreFunction | None,
    ) -> None:
        for sampler in samplers.values():
            sampler.validate_policy(module.policy)
        self.module, self.samplers, self.lengths, self.completions = module, dict(samplers), tuple(lengths), completions
        self.results: list[EvaluationResult] = []
        """Those of the last evaluation, on every rank."""
        self.dropped_prompts = 0
        """Prompts of the last evaluation that were left out as too long."""
        self.own_reward = _as_reward(reward)
        """The one that was given, None for the datamodule's."""
        self._metrics: dict[tuple[str, int], EvaluationMetrics] = {}

    @property
    def reward(self) -> Reward:
        """The reward given at construction, else the datamodule's.

        One that names neither a check nor an accuracy of its own takes the datamodule's.

        Raises:
            ValueError: there is neither.
        """
        theirs = _as_reward(getattr(getattr(self.module.trainer, "datamodule", None), "reward", None))
        own = self.own_reward
        unchecked = own is not None and own.check is None and own.accuracy == "reward"
        # The copy is kept, because a reward counts its failures over the whole run, and a new one would forget them.
        if own is not None and unchecked and theirs is not None and theirs.check is not None:
            self.own_reward = own = own.with_check_of(theirs)
        reward = own or theirs
        if reward is None:
            raise ValueError(
                "DMPO needs a reward: pass `reward=` (a function of an example and a completion), or a datamodule that "
                "has one."
            )
        return reward

    def evaluate_batch(self, batch: PromptBatch, sampler: Sampler, length: int) -> EvaluatedBatch:
        """Samples and scores completions of each prompt."""
        module = self.module
        sampling = Sampling(
            sampler, length, self.completions, seed=module.seed, rows_per_forward=module.rows_per_forward
        )
        with module.gathered():
            return evaluate(module.policy, self.reward, batch, sampling)

    def start(self, loaders: Any) -> None:
        """Refuses prompts that the model cannot take, before the first is sampled."""
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
            self.module.check_prompts(loader, max(self.lengths))
            self.dropped_prompts += loader.dropped
        # Made anew for each evaluation, since sums would go on over the next one.
        runs = [(name, length) for name in self.samplers for length in self.lengths]
        self._metrics = {run: EvaluationMetrics() for run in runs}

    def step(self, batch: PromptBatch) -> dict[str, Any]:
        """Counts a batch. Its records are the step's output, which Lightning hands to callbacks."""
        records = []
        for (name, length), metrics in self._metrics.items():
            evaluated = self.evaluate_batch(batch, self.samplers[name], length)
            metrics.update(evaluated)
            records += evaluated.records(name)
        return {"records": records}

    def finish(self, stage: str) -> None:
        """Works out the results over all ranks, and logs them."""
        # Each result is a collective operation. The order is that of options, which all ranks have in common.
        self.results = [metrics.result(name, length) for (name, length), metrics in self._metrics.items()]
        for result in self.results:
            # A single length, whichever it is, keeps the names short, so that `monitor` reads the same for all of them.
            parts = [stage, result.sampler, *([str(result.length)] if len(self.lengths) > 1 else [])]
            prefix = "/".join(parts)
            for name, (mean, error) in result.means.items():
                self._log(f"{prefix}/{name}", mean)
                if name == "accuracy":
                    self._log(f"{prefix}/{name}_stderr", error)
            self._log(f"{prefix}/tokens_per_second", result.tokens_per_second)
        self.reward.tell_failures()

    def _log(self, name: str, value: float) -> None:
        """Logs on every rank, so that callbacks of every rank can monitor the value, on which ranks agree already."""
        self.module.log(name.replace(".", "_"), value, prog_bar=name.endswith("/accuracy"), sync_dist=True)


def check_evaluation(samplers: Mapping[str, Sampler], lengths: Sequence[int], completions: int) -> None:
    """Raises ValueError for options of `Evaluator` that do not fit together. It needs no model, whose loading may take
    minutes.
    """
    check_counts(completions_per_prompt=completions)
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise ValueError(f"`evaluation_lengths` must be different lengths of at least 1 token, got {list(lengths)}.")
    for name, sampler in samplers.items():
        for length in lengths:
            try:
                sampler.validate(length)
            except ValueError as error:
                raise ValueError(f"Sampler {name!r} cannot evaluate completions of {length} tokens: {error}") from error


def _as_reward(reward: Reward | ScoreFunction | None) -> Reward | None:
    return reward if reward is None or isinstance(reward, Reward) else Reward(reward)
