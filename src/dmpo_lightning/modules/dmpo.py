"""DMPO as a LightningModule: collects rollouts, hands micro-batches to the objective, evaluates with named samplers."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.distributed.internals import callbacks_of, prepare_training_loaders
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.distributed.strategies import divides_weights
from dmpo_lightning.evaluation.rollout_values import rollout_means
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.routing import expert_load, routing_values
from dmpo_lightning.modules.base import OptimizerFactory, PolicyModule
from dmpo_lightning.modules.continuation import KEY, Continuation
from dmpo_lightning.modules.evaluation import Evaluator, check_evaluation
from dmpo_lightning.modules.non_finite import SkipNonFiniteSteps, check_policy
from dmpo_lightning.modules.observers import RolloutObserver, RunMeter, measure_first
from dmpo_lightning.modules.options import SchedulerFactory
from dmpo_lightning.objectives import Objective
from dmpo_lightning.policy import evaluating
from dmpo_lightning.rewards.functions import ScoreFunction
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import (
    PromptBatch,
    RolloutBuffer,
    Sampling,
    check_counts,
    collect_informative,
)
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.schedule import RunLength, Schedule


class DMPO(PolicyModule):
    """Distribution Matching Policy Optimization (arXiv 2510.08233) of a masked diffusion language model.

    One optimizer step uses ``micro_batch_size x accumulate_grad_batches`` rollouts per rank. A buffer of
    ``prompts x group_size`` rollouts is passed ``num_iterations`` times.

    Args:
        model: a hub id, a folder, the name of an embedded model, or a `Backbone`, which says how it is loaded and what
            of it is trained. A module like `LLaDAForMaskedDiffusion` needs a `Backbone` with its tokenizer.
        objective: `WDCE` or `WDDO`, or your own.
        sampler: draws the rollouts.
        completion_length: tokens per completion.
        group_size: rollouts per prompt (paper: N).
        micro_batch_size: rollouts per training step and rank. Must divide the buffer.
        num_iterations: passes over one buffer (paper: F).
        sampling_rounds: a buffer holds this part of a batch's prompts. The others are only sampled where the prompts
            before them have rollouts of equal reward, to fill the buffer with groups that differ. 1 takes every prompt.
        reward: a `Reward`, or a function of an example and a completion. None takes the datamodule's ``reward``.
        validation_samplers: by name. Each is evaluated and logged. None is ``sampler``, named ``sampled``.
        evaluation_lengths: tokens per completion in evaluation. Each of several is logged under its own name. None is
            ``completion_length``.
        completions_per_prompt: in evaluation. With several, pass@j and majority votes are logged too.
        sample_merged: samples from a copy of the weights with the adapters merged in, made anew for every buffer. It is
            faster, takes the room of the adapted layers once more, and rounds differently from the trained policy.
        reference_refresh_interval: the reference becomes the current policy every so many buffers, of the first one too
            if it is 1. None is never.
        rows_per_forward: rollouts per forward of sampling and scoring. None samples all at once and scores
            ``micro_batch_size``.
        gather_for_generation: under FSDP2 and ZeRO-3, gathers all weights once per buffer for sampling and scoring, and
            once per evaluated batch, instead of block by block in each forward. Takes the room of the whole model, and
            of a whole reference copy.
        optimizer: from parameters to an optimizer. None is AdamW as published.
        lr_scheduler: from an optimizer to a scheduler that advances once per optimizer step. Lightning's own
            `ReduceLROnPlateau` of ``lightning.pytorch.cli`` looks at its ``monitor`` after each validation.
        seed: of rollouts, masks, prompt order and fresh weights. None is 0, or the command line's seed_everything.

    Raises:
        ValueError: settings that do not fit together, and at fit start prompts and Trainer flags that do not fit.

    Example:
        >>> from dmpo_lightning import DMPO, WDCE, ConfidenceSampler
        >>> module = DMPO(
        ...     "sudoku_tiny",
        ...     objective=WDCE(reward_temperature=0.1),
        ...     sampler=ConfidenceSampler(),
        ...     completion_length=20,
        ...     group_size=8,
        ...     micro_batch_size=32,
        ...     reward=lambda example, completion: float("1234" in completion),
        ... )
        >>> module.generate("1234341221434320", sampler=ConfidenceSampler(temperature=0.0))[0].text
        '<answer>1234341221434321</answer>'
    """

    sampler: Sampler
    completion_length: int
    checkpoint_keys = (KEY,)
    prompts_per_buffer: int | None = None
    """On each rank; known when fitting starts."""

    def __init__(
        self,
        model: str | Backbone | nn.Module,
        *,
        objective: Objective,
        sampler: Sampler,
        completion_length: int,
        group_size: int,
        micro_batch_size: int,
        num_iterations: int = 1,
        sampling_rounds: int = 1,
        reward: Reward | ScoreFunction | None = None,
        validation_samplers: Mapping[str, Sampler] | None = None,
        evaluation_lengths: Sequence[int] | None = None,
        completions_per_prompt: int = 1,
        sample_merged: bool = False,
        reference_refresh_interval: int | None = None,
        rows_per_forward: int | None = None,
        gather_for_generation: bool = False,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        seed: int | None = None,
    ) -> None:
        given = dict(locals())
        buffer = RolloutBuffer(num_iterations=num_iterations, micro_batch_size=micro_batch_size)
        check_counts(completion_length=completion_length, sampling_rounds=sampling_rounds)
        check_counts(reference_refresh_interval=reference_refresh_interval, rows_per_forward=rows_per_forward)
        try:
            objective.validate(group_size=group_size, sampler=sampler)
        except TypeError as error:
            raise ValueError(f"`objective` needs validate(*, group_size, sampler), got an error: {error}.") from error
        sampler.validate(completion_length)
        samplers = validation_samplers if validation_samplers is not None else {"sampled": sampler}
        lengths = (completion_length,) if evaluation_lengths is None else tuple(evaluation_lengths)
        # Checked before the model is loaded, which may take minutes.
        check_evaluation(samplers, lengths, completions_per_prompt)
        super().__init__(model, with_reference=True, optimizer=optimizer, lr_scheduler=lr_scheduler, seed=seed)
        self.evaluator = Evaluator(
            self, samplers=samplers, lengths=lengths, completions=completions_per_prompt, reward=reward
        )
        self.completion_length, self.rows_per_forward = completion_length, rows_per_forward
        self.gather_for_generation = gather_for_generation
        self.objective, self.sampler, self.sample_merged = objective, sampler, sample_merged
        sampler.validate_policy(self.policy)
        self.policy.room_for_prompts(max(completion_length, *lengths))
        if reference_refresh_interval != 1 and getattr(objective, "prompt_weight", "equal") == "reward":
            rank_zero_warn(
                "`prompt_weight` reward moves the minimum from the target towards a reference that is not refreshed "
                "for every buffer; set `reference_refresh_interval` 1, or `prompt_weight` equal."
            )
        if sample_merged:
            self.policy.check_mergeable()
        if reference_refresh_interval is not None:
            # Callbacks that average weights copy the module once, before the reference is refreshed for the first time.
            self.policy.reference.make_room(self.policy.model)
        self.group_size, self.sampling_rounds = group_size, sampling_rounds
        self.reference_refresh_interval = reference_refresh_interval
        self.buffer, self._continuation, self.buffers_collected, self.rollouts_seen = buffer, Continuation(), 0, 0
        self._taken = -1
        """The training batch whose loss was taken last."""
        self.note_arguments(given)

    @property
    def micro_batch_size(self) -> int:
        """Rollouts per training step and rank."""
        return self.buffer.micro_batch_size

    @property
    def _scoring_rows(self) -> int:
        """Rollouts per forward of the objective."""
        return self.rows_per_forward or self.micro_batch_size

    def configure_callbacks(self) -> list[Callback]:
        """Adds those of `SkipNonFiniteSteps` and `RunMeter` that the Trainer has not."""
        # Lightning would put the one returned here in the place of the user's own, with its other options.
        kinds = (SkipNonFiniteSteps, RunMeter)
        return super().configure_callbacks() + [kind() for kind in kinds if not callbacks_of(self.trainer, kind)]

    def configure_model(self) -> None:
        """As `PolicyModule` does it. Strategies that see all weights early save the reference's own from the start."""
        early = self.trainer.strategy.restore_checkpoint_after_setup
        if self.reference_refresh_interval is not None and early:
            self._holds_reference_early = True
        super().configure_model()

    def setup(self, stage: str) -> None:
        """Checks the training loader and tells it how often a batch of prompts is used."""
        super().setup(stage)
        measure_first(self.trainer)
        if self.gather_for_generation:
            self.policy.check_gatherable()
        if self.sample_merged and divides_weights(self.trainer.strategy):
            raise ValueError(
                f"`sample_merged` needs whole weights on each rank, which {type(self.trainer.strategy).__name__} "
                "divides; leave it out, or use DDP."
            )
        if stage == "fit":
            # The reference policy is in eval mode by design; Lightning would warn about it at every start.
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
            prepare_training_loaders(self.trainer, self._prepared)

    def _prepared(self, loader: Any) -> PromptLoader:
        """Checks a training loader, and tells it how often a batch of prompts is used and how long prompts may be.

        Raises:
            ValueError: a loader of another kind, numbers that do not divide under one of the run's accumulations, or a
                prompt that is too long.
        """
        if not isinstance(loader, PromptLoader):
            raise ValueError(
                f"DMPO trains on a PromptLoader, got {type(loader).__name__}: a batch of prompts must be repeated "
                "while its rollouts are used, another loader would skip prompts. Wrap your data in "
                "dmpo_lightning.PromptLoader(dataset, tokenizer, batch_size=...)."
            )
        if loader.batch_size % self.sampling_rounds:
            whole = f"the {loader.batch_size} prompts of a batch"
            raise ValueError(f"`sampling_rounds` must divide {whole}, got {self.sampling_rounds}.")
        schedule, trainer = self._schedule(loader), self.trainer
        # Each value that the run will take is checked now. The later ones would be refused in the middle of the run.
        for accumulation in _accumulations(trainer):
            if problem := replace(schedule, accumulation=accumulation).problem:
                raise ValueError(problem)
        self.check_prompts(loader, self.completion_length)
        loader.bind(
            repeats=schedule.training_steps,
            seed=self.seed,
            limit_batches=trainer.limit_train_batches,
            overfits=bool(trainer.overfit_batches),  # type: ignore[attr-defined]
            epoch=trainer.current_epoch,
        )
        self.prompts_per_buffer = schedule.prompts_per_buffer
        return loader

    def _schedule(self, loader: PromptLoader) -> Schedule:
        return Schedule(
            group_size=self.group_size,
            prompts_per_buffer=loader.batch_size // self.sampling_rounds,
            sampling_rounds=self.sampling_rounds,
            micro_batch_size=self.micro_batch_size,
            num_iterations=self.buffer.num_iterations,
            accumulation=_accumulations(self.trainer)[0],
            ranks=self.trainer.world_size,
        )

    def on_train_start(self) -> None:
        """Says what the run consists of. A buffer restored from a checkpoint was read on the CPU."""
        super().on_train_start()
        self._continuation.start()
        self._taken = -1
        self.buffer.to(self.trainer.strategy.root_device)
        loader: Any = self.trainer.train_dataloader
        if self.trainer.ckpt_path is not None and not self.trainer.fit_loop.restarting:
            # Lightning gives loaders their states back within an epoch only. Behind one they would begin anew.
            loader.start_epoch(self.trainer.current_epoch)
        # Where the accumulation changes on the way, the end of the run is left open.
        changes = len(set(_accumulations(self.trainer))) > 1
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        run = RunLength(
            self._schedule(loader),
            prompts=len(loader.dataset) - loader.dropped,
            batches_per_epoch=int(self.trainer.num_training_batches),
            max_steps=None if changes or steps == -1 else steps,
            max_epochs=None if changes or epochs == -1 else epochs,
        )
        rank_zero_info(run.to_text())

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """An epoch starts with new prompts: ``limit_train_batches`` may have cut the last one within a buffer."""
        self._continuation.restore_generators()
        if batch_idx == 0:
            self.buffer.clear()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """The loss of the next micro-batch of rollouts, of new ones where the buffer is used up.

        Raises:
            ValueError: the optimizer asks for a second one within a step.
        """
        taken, self._taken = self._taken, self.trainer.fit_loop.total_batch_idx
        if taken == self._taken:
            raise ValueError(
                f"`optimizer` {type(self.trainer.optimizers[0]).__name__} computes the loss several times per step, as "
                "line searches do, but each loss of DMPO is one of other rollouts; take an optimizer that computes it "
                "once, such as torch.optim.AdamW."
            )
        accumulated = self.trainer.accumulate_grad_batches
        self._continuation.begin_micro_batch(self)
        if self.buffer.needs_rollouts:
            self._collect(batch)
        # A pass is a multiple of the accumulation (`Schedule.problem`), so buffers and optimizer steps stay aligned.
        if self.buffer.position % accumulated == 0:
            self._before_step(accumulated)
        iteration, rows, targets = self.buffer.next_micro_batch()
        loss, diagnostics = self.objective.loss(
            self.policy, rows, targets, iteration=iteration, planned_rollouts=self.micro_batch_size
        )
        self.log("train/loss", loss, batch_size=self.micro_batch_size)
        self.log_dict(diagnostics, batch_size=self.micro_batch_size)
        return loss

    def _collect(self, prompts: PromptBatch) -> None:
        """Fills the buffer with rollouts of these prompts and with the objective's targets."""
        interval, collected = self.reference_refresh_interval, self.buffers_collected
        # The first reference is where the run starts, if it stays longer than a buffer. Otherwise a refresh says that
        # it equals the policy, so that no forward scores the first buffer either.
        if interval is not None and (collected or interval == 1) and collected % interval == 0:
            self.policy.refresh_reference()
        sampling = Sampling(
            self.sampler,
            self.completion_length,
            self.group_size,
            seed=self.seed,
            buffer=self.buffers_collected,
            rows_per_forward=self.rows_per_forward,
        )
        with self.gathered():
            started = perf_counter()
            merged = self.policy.merged() if self.sample_merged else nullcontext()
            # The network is asked for inside, where it may be the copy.
            with merged, expert_load(self.policy.predicting) as loads:
                kept, whole = collect_informative(
                    self.policy, self.evaluator.reward, prompts, sampling, rounds=self.sampling_rounds
                )
            sampled = perf_counter()
            # In eval mode as the rollouts were sampled. With dropout, log p_old would be that of another policy.
            with evaluating(self.policy):
                targets, diagnostics = self.objective.prepare(self.policy, kept, rows_per_forward=self._scoring_rows)
        check_policy(self.trainer, {"policy/entropy": whole.sampled_log_prob, **diagnostics})
        buffer = self.buffer
        buffer.fill(kept, targets, number=self.buffers_collected, sampled=whole)
        diagnostics = diagnostics | self.sampler.diagnostics(whole.reveal_step) | routing_values(loads)
        buffer.means = rollout_means(self.policy, whole, diagnostics)
        buffer.seconds = {"sampling": sampled - started, "scoring": perf_counter() - sampled}
        self.buffers_collected += 1
        self.rollouts_seen += sum(gather_ranks(len(whole)))
        for name, mean in buffer.means.items():
            self.log(name, mean, prog_bar=name == "reward/total", batch_size=len(kept.prompts))
        for observer in callbacks_of(self.trainer, RolloutObserver):
            observer.on_rollouts(self.trainer, self, buffer)
        self.evaluator.reward.tell_failures()

    def _before_step(self, micro_batches: int) -> None:
        """Lets the objective refresh the targets of the groups that the next optimizer step uses."""
        buffer, groups = self.buffer, self.buffer.groups_of_next(micro_batches)
        with evaluating(self.policy):
            self.objective.before_step(
                self.policy, buffer.rollouts, buffer.targets, groups, rows_per_forward=self._scoring_rows
            )

    def on_validation_start(self) -> None:
        self.evaluator.start(self.trainer.val_dataloaders)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        return self.evaluator.step(batch)

    def on_validation_epoch_end(self) -> None:
        self.evaluator.finish("val")
        super().on_validation_epoch_end()

    def on_test_start(self) -> None:
        self.evaluator.start(self.trainer.test_dataloaders)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        return self.evaluator.step(batch)

    def on_test_epoch_end(self) -> None:
        self.evaluator.finish("test")

    def on_predict_start(self) -> None:
        self.evaluator.start(self.trainer.predict_dataloaders)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Returns the records of a batch, see `EvaluatedBatch.records`."""
        return list(self.evaluator.step(batch)["records"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters, and every rank's buffer and generators, all as they were after the last optimizer step."""
        super().on_save_checkpoint(checkpoint)
        self._continuation.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues within the buffer, see `Continuation`."""
        super().on_load_checkpoint(checkpoint)
        self._continuation.load(self, checkpoint)


def _accumulations(trainer: Trainer) -> list[int]:
    """All values that accumulate_grad_batches takes in this run, the present one first."""
    scheduler = next(iter(callbacks_of(trainer, GradientAccumulationScheduler)), None)
    if scheduler is None:
        return [trainer.accumulate_grad_batches]
    return [scheduler.get_accumulate_grad_batches(trainer.current_epoch), *scheduler.scheduling.values()]
