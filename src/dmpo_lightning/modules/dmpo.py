"""DMPO as a LightningModule: collects rollouts, hands micro-batches to the objective, evaluates with named samplers."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.distributed.ranks import gather_ranks, means_over_ranks
from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.models.loading import Quantization
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.modules.base import OptimizerFactory, divides_weights
from dmpo_lightning.modules.evaluation import EvaluationModule
from dmpo_lightning.modules.generators import generator_states, restore_generators
from dmpo_lightning.modules.open_step import OpenStep, rewind_loops
from dmpo_lightning.modules.options import SchedulerFactory
from dmpo_lightning.modules.run_length import accumulations, run_length
from dmpo_lightning.modules.skipped_steps import SkippedSteps, gradients_are_finite
from dmpo_lightning.objectives import Objective
from dmpo_lightning.policy import evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rewards.score_functions import ScoreFunction
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, RolloutBuffer, Rollouts, collect
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DMPO(EvaluationModule):
    """Distribution Matching Policy Optimization (arXiv 2510.08233) of a masked diffusion language model.

    One optimizer step uses ``micro_batch_size x accumulate_grad_batches`` rollouts per rank; a buffer of
    ``prompts x group_size`` rollouts is passed ``num_iterations`` times.

    Args:
        model: a hub id, a folder, the name of an embedded model, or a module like `LLaDAForMaskedDiffusion`.
        objective: `WDCE` or `WDDO`, or your own.
        sampler: draws the rollouts.
        completion_length: tokens per completion.
        group_size: rollouts per prompt (paper: N).
        micro_batch_size: rollouts per training step and rank; must divide the buffer.
        num_iterations: passes over one buffer (paper: F).
        reward: a `Reward`, or a function of an example and a completion; None takes the datamodule's ``reward``.
        validation_samplers: by name; each is evaluated and logged. None evaluates with ``sampler`` under the name
            ``sampled``.
        evaluation_lengths: tokens per completion in evaluation; each of several is logged under its own name. None is
            ``completion_length``.
        completions_per_prompt: in evaluation; with several, pass@j and majority votes are logged too.
        tokenizer: defaults to that of ``model``.
        revision: branch, tag or commit on the hub.
        dtype: of the weights, such as bfloat16; ``auto`` takes that of the checkpoint.
        random_weights: start from fresh weights of the same architecture.
        adapter: `LoRA`; None trains all weights, or the adapter that ``model`` already carries.
        quantization: ``nf4`` loads the frozen base in 4 bits; needs an adapter.
        gradient_checkpointing: recompute the blocks in the backward pass instead of keeping their activations.
        compile_blocks: run the blocks through torch.compile; the first forwards then take minutes.
        sample_merged: sample from a copy of the weights with the adapters merged into it, which is renewed for every
            buffer. Faster by the adapters' own products; takes the room of the adapted layers once more, and rounds
            differently from the policy that is trained.
        trust_remote_code: run code that comes with the checkpoint; never needed for LLaDA and Dream.
        mask_token_id: overrides what the model's configuration or the tokenizer names.
        reference_refresh_interval: the reference becomes the current policy every so many buffers; None never.
        rows_per_forward: rollouts per forward in sampling and scoring; None takes ``micro_batch_size`` for scoring
            and all for sampling.
        max_skipped_steps: optimizer steps in a row that may be left out because a gradient is not finite; one more ends
            the run, with the rollouts of every rank written to its directory.
        gather_for_generation: under FSDP2 and ZeRO-3 gather all weights once per buffer for sampling and scoring, and
            once per evaluated batch, instead of block by block in each forward. Takes the room of the whole model (and
            of a whole reference copy).
        check_forwards: before each forward, compare with the other ranks, and end with an error that names ranks and
            counts where they would wait for each other. Slow; for finding out why a job hangs.
        optimizer: from parameters to an optimizer; None is AdamW as published.
        lr_scheduler: from an optimizer to a scheduler that advances once per optimizer step.
        seed: of all draws: rollouts, masks, prompt order; None is 0, or the command line's ``seed_everything``.

    Raises:
        ValueError: settings that do not fit together, at construction; or prompts and trainer flags that do not fit,
            at fit start.

    Example:
        ```python
        module = DMPO(
            "GSAI-ML/LLaDA-8B-Instruct",
            objective=WDCE(reward_temperature=0.04),
            sampler=ConfidenceSampler(block_length=32, denoising_steps=128, temperature=0.2),
            completion_length=256, group_size=16, micro_batch_size=8, num_iterations=8,
            reward=lambda example, completion: float(example["answer"] in completion),
        )
        Trainer(accumulate_grad_batches=2).fit(module, PromptLoader(dataset, module.policy.tokenizer, batch_size=1))
        ```
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        objective: Objective,
        sampler: Sampler,
        completion_length: int,
        group_size: int,
        micro_batch_size: int,
        num_iterations: int = 1,
        reward: Reward | ScoreFunction | None = None,
        validation_samplers: Mapping[str, Sampler] | None = None,
        evaluation_lengths: Sequence[int] | None = None,
        completions_per_prompt: int = 1,
        tokenizer: "str | PreTrainedTokenizerBase | None" = None,
        revision: str | None = None,
        dtype: str = "auto",
        random_weights: bool = False,
        adapter: LoRA | None = None,
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        sample_merged: bool = False,
        trust_remote_code: bool = False,
        mask_token_id: int | None = None,
        reference_refresh_interval: int | None = None,
        rows_per_forward: int | None = None,
        max_skipped_steps: int = 10,
        gather_for_generation: bool = False,
        check_forwards: bool = False,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        seed: int | None = None,
    ) -> None:
        counts = {
            "completion_length": completion_length,
            "micro_batch_size": micro_batch_size,
            "num_iterations": num_iterations,
            "reference_refresh_interval": reference_refresh_interval,
            "rows_per_forward": rows_per_forward,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        objective.validate(group_size=group_size, completion_length=completion_length, sampler=sampler)
        sampler.validate(completion_length)
        super().__init__(
            samplers=validation_samplers if validation_samplers is not None else {"sampled": sampler},
            completion_length=completion_length,
            evaluation_lengths=evaluation_lengths,
            completions_per_prompt=completions_per_prompt,
            reward=reward,
            rows_per_forward=rows_per_forward,
            model=model,
            tokenizer=tokenizer,
            revision=revision,
            dtype=dtype,
            random_weights=random_weights,
            adapter=adapter,
            quantization=quantization,
            gradient_checkpointing=gradient_checkpointing,
            compile_blocks=compile_blocks,
            trust_remote_code=trust_remote_code,
            mask_token_id=mask_token_id,
            with_reference=True,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            seed=seed,
            check_forwards=check_forwards,
        )
        sampler.validate_policy(self.policy)
        if sample_merged:
            self.policy.check_mergeable()
        self.objective, self.sampler, self.sample_merged = objective, sampler, sample_merged
        self.group_size, self.micro_batch_size = group_size, micro_batch_size
        self.reference_refresh_interval = reference_refresh_interval
        self.buffer = RolloutBuffer(num_iterations=num_iterations, micro_batch_size=micro_batch_size)
        self.buffers_collected = 0
        self.rollouts_seen = 0
        self.skipped_steps = SkippedSteps(max_skipped_steps)
        self.gather_for_generation = gather_for_generation
        self._generators: dict[str, Any] | None = None
        self._open_step: OpenStep | None = None

    def configure_model(self) -> None:
        """As `PolicyModule` does it, with room for the reference's own adapter, which cannot be added later."""
        early = self.trainer.strategy.restore_checkpoint_after_setup
        if self.reference_refresh_interval is not None and early and not self._is_sharded:
            self.make_room_for_reference()
        super().configure_model()

    def setup(self, stage: str) -> None:
        """Checks the training loader and tells it how often a batch of prompts is used."""
        super().setup(stage)
        if self.gather_for_generation:
            self.policy.check_gatherable()
        if self.sample_merged and divides_weights(self.trainer.strategy):
            raise ValueError(
                f"`sample_merged` needs whole weights on each rank, which {type(self.trainer.strategy).__name__} "
                "divides; leave it out, or use DDP."
            )
        if stage != "fit":
            return
        # The reference policy is in eval mode by design; Lightning would warn about it at every start.
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
        source = self.trainer.fit_loop._data_source
        loader = source.dataloader()
        if not isinstance(loader, PromptLoader):
            raise ValueError(
                f"DMPO trains on a PromptLoader, got {type(loader).__name__}: a batch of prompts must be repeated "
                f"while its "
                "rollouts are used, another loader would skip prompts. Wrap your data in "
                "dmpo_lightning.PromptLoader(dataset, tokenizer, batch_size=...)."
            )
        self._bind_training_loader(loader)
        self.trainer.fit_loop._data_source = _DataLoaderSource(loader, "")

    def _bind_training_loader(self, loader: PromptLoader) -> None:
        for accumulation in accumulations(self.trainer):
            if problem := self._schedule(loader, accumulation).problem:
                raise ValueError(problem)
        limit = self.prompt_limit(self.completion_length)
        if limit is not None:
            loader.limit_prompt_length(limit)
        repeats = self._schedule(loader).training_steps
        loader.bind(repeats=repeats, seed=self.seed, limit_batches=self.trainer.limit_train_batches)

    def _schedule(self, loader: PromptLoader, accumulation: int = 1) -> Schedule:
        return Schedule(
            group_size=self.group_size,
            prompts_per_buffer=loader.batch_size,
            micro_batch_size=self.micro_batch_size,
            num_iterations=self.buffer.num_iterations,
            accumulation=accumulation,
            ranks=self.trainer.world_size,
        )

    def on_train_start(self) -> None:
        """Says what the run consists of. A buffer restored from a checkpoint was read on the CPU."""
        super().on_train_start()
        self._open_step = None
        self.buffer.to(self.device)
        loader: Any = self.trainer.train_dataloader
        schedule = self._schedule(loader, accumulations(self.trainer)[0])
        prompts = len(loader.dataset) - loader.dropped
        rank_zero_info(run_length(self.trainer, schedule, prompts=prompts).to_text())

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Restores the generators late, because starting a loader draws from them; an epoch starts with new prompts."""
        if self._generators is not None:
            restore_generators(self._generators)
            self._generators = None
        if batch_idx == 0:
            self.buffer.clear()  # `limit_train_batches` may have cut the last epoch in the middle of a buffer

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        self._note_open_step()
        if self.buffer.needs_rollouts:
            self._collect(batch)
        iteration, rows = self.buffer.advance()
        rollouts, targets = self.buffer.rollouts, self.buffer.targets
        assert rollouts is not None
        if rows.start // self.micro_batch_size % self.trainer.accumulate_grad_batches == 0:
            self._before_step(rows.start)
        with self.phase("loss"):
            loss, diagnostics = self.objective.loss(
                self.policy,
                rollouts.rows()[rows],
                {name: value.flatten(0, 1)[rows] for name, value in targets.items()},
                iteration=iteration,
                planned_rollouts=self.micro_batch_size,
            )
        self.log("train/loss", loss, batch_size=self.micro_batch_size)
        self.log_dict(diagnostics, batch_size=self.micro_batch_size)
        return loss

    def _note_open_step(self) -> None:
        if self.trainer.accumulate_grad_batches == 1:
            return  # each batch ends with a step
        if self._open_step is None or self._open_step.step != self.trainer.global_step:
            self._open_step = OpenStep(self.trainer.global_step, generator_states(), self.buffer.needs_rollouts)
        self._open_step.micro_batches += 1

    def _collect(self, prompts: PromptBatch) -> None:
        interval = self.reference_refresh_interval
        if interval is not None and self.buffers_collected and self.buffers_collected % interval == 0:
            self.policy.refresh_reference()
        with self._gathered():
            with self.phase("sampling"):
                rollouts, scores = self._sampled(prompts)
            with self.phase("scoring"), evaluating(self.policy):
                targets, diagnostics = self.objective.prepare(
                    self.policy, rollouts, rows_per_forward=self._scoring_rows
                )
        self.buffer.fill(rollouts, targets)
        self.buffers_collected += 1
        self.rollouts_seen += len(rollouts) * self.trainer.world_size
        if getattr(self.sampler, "early_exit", False):
            diagnostics["sampler/places_saved_by_early_exit"] = (rollouts.reveal_step < 0).float()
        self._log_rollouts(scores, diagnostics)

    def _sampled(self, prompts: PromptBatch) -> tuple[Rollouts, Scores]:
        with self.policy.merged() if self.sample_merged else nullcontext():
            rollouts, scores, _ = collect(
                self.policy,
                self.sampler,
                self.reward,
                prompts,
                group_size=self.group_size,
                completion_length=self.completion_length,
                seed=self.seed,
                iteration=self.buffers_collected,
                rows_per_forward=self.rows_per_forward,
            )
        return rollouts, scores

    def _gathered(self) -> AbstractContextManager[None]:
        return self.policy.gathered() if self.gather_for_generation else nullcontext()

    def evaluate_batch(
        self, batch: PromptBatch, sampler: Sampler, completion_length: int | None = None
    ) -> EvaluatedBatch:
        """See `EvaluationModule`; from weights gathered once with ``gather_for_generation``."""
        with self._gathered(), self.phase("evaluation"):
            return super().evaluate_batch(batch, sampler, completion_length)

    def _before_step(self, first_row: int) -> None:
        assert self.buffer.rollouts is not None
        last_row = first_row + self.micro_batch_size * self.trainer.accumulate_grad_batches - 1
        groups = slice(first_row // self.group_size, last_row // self.group_size + 1)
        with self.phase("baseline"), evaluating(self.policy):
            self.objective.before_step(
                self.policy, self.buffer.rollouts, self.buffer.targets, groups, rows_per_forward=self._scoring_rows
            )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leaves the step out, on all ranks alike, where a gradient of any rank is not finite. DeepSpeed, which hides
        its gradients, does so by itself.

        Raises:
            RuntimeError: more steps in a row than allowed.
        """
        super().on_before_optimizer_step(optimizer)
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            return
        if strategy.reduce_boolean_decision(gradients_are_finite(self.parameters())):
            self.skipped_steps.taken()
            return
        for parameter in self.parameters():
            parameter.grad = None  # an optimizer does nothing to parameters without one
        self._skip(self.trainer.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning does it; counts the steps that DeepSpeed leaves out, which runs this for each micro-batch."""
        engine = getattr(self.trainer.strategy, "deepspeed_engine", None)
        steps, left_out = (engine.global_steps, engine.skipped_steps) if engine else (0, 0)
        super().optimizer_step(*args, **kwargs)
        if engine is None or engine.global_steps == steps:
            return
        if engine.skipped_steps > left_out:
            self._skip(self.trainer.global_step)
        else:
            self.skipped_steps.taken()

    def _skip(self, step: int) -> None:
        self.skipped_steps.skipped(step)
        self.log("train/skipped_steps", float(self.skipped_steps.total), batch_size=self.micro_batch_size)
        if self.skipped_steps.too_many:
            raise RuntimeError(
                f"{self.skipped_steps.in_a_row} optimizer steps in a row had gradients that are not finite, more than "
                f"`max_skipped_steps` {self.skipped_steps.limit}. The rollouts are in {self._dump_rollouts()}; look at "
                "their rewards and weights, or lower the learning rate."
            )

    def _dump_rollouts(self) -> Path:
        """Writes this rank's buffer."""
        directory = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rollouts_rank{self.trainer.global_rank}.pt"
        torch.save(self.buffer.state_dict(), path)
        return path

    @property
    def _scoring_rows(self) -> int:
        return self.rows_per_forward or self.micro_batch_size

    def _log_rollouts(self, scores: Scores, diagnostics: Mapping[str, Tensor]) -> None:
        """Means over all ranks, whose prompts may be of different tasks."""
        numbers = {f"reward/{name}": value for name, value in scores.components.items()} | dict(diagnostics)
        numbers |= {"reward/total": scores.total, "reward/spread": scores.total.std(-1)}
        means = means_over_ranks(
            numbers | {"reward/failures": torch.tensor([float(scores.failures)], dtype=torch.float32)}
        )
        means["reward/failures"] *= self.trainer.world_size
        self.log_dict(means, batch_size=len(scores.total))
        self.log("reward/mean", means["reward/total"], prog_bar=True, logger=False, batch_size=len(scores.total))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counters, and every rank's buffer and generators (only dropout draws from those); all as they were after
        the last optimizer step.
        """
        super().on_save_checkpoint(checkpoint)
        buffer, generators, collected = self.buffer.state_dict(), generator_states(), 0
        now = self._open_step
        if now is not None and now.step == self.trainer.global_step:
            rewind_loops(checkpoint["loops"], now.micro_batches)
            generators, collected = now.generators, int(now.collected)
            buffer = {"position": 0} if now.collected else buffer | {"position": buffer["position"] - now.micro_batches}
        checkpoint["dmpo"] = {
            "buffers_collected": self.buffers_collected - collected,
            "rollouts_seen": self.rollouts_seen - collected * len(self.buffer) * self.trainer.world_size,
            "skipped_steps": self.skipped_steps.total,
            "skipped_in_a_row": self.skipped_steps.in_a_row,
            "layout": self._layout,
            "ranks": gather_ranks({"buffer": buffer, "generators": generators}),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues mid-buffer; where the buffer would have another layout, with weights and counters alone."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["dmpo"]
        self.buffers_collected, self.rollouts_seen = state["buffers_collected"], state["rollouts_seen"]
        self.skipped_steps.total = state.get("skipped_steps", 0)
        self.skipped_steps.in_a_row = state.get("skipped_in_a_row", 0)
        if state["layout"] != self._layout:
            self.buffer.clear()
            rank_zero_warn(
                f"The checkpoint's rollout buffer was made with {state['layout']}, this run has {self._layout}: "
                f"rollouts are "
                "collected afresh; weights and optimizer continue."
            )
            return
        own = state["ranks"][self.trainer.global_rank]
        self.buffer.load_state_dict(own["buffer"])
        self._generators = own["generators"]

    @property
    def _layout(self) -> dict[str, int]:
        return {
            "world_size": self.trainer.world_size,
            "group_size": self.group_size,
            "micro_batch_size": self.micro_batch_size,
            "num_iterations": self.buffer.num_iterations,
            "completion_length": self.completion_length,
        }
