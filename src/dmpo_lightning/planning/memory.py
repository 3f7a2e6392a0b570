"""One rollout buffer, run without its numbers: its forwards, its arithmetic and its memory, phase by phase.

Code and allocations are those of training on a CPU (`Rehearsal`). Of a GPU it is assumed that attention never holds its
scores, that dropout keeps booleans, and that optimizers update all weights at once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.data.demonstrations import DemonstrationBatch
from dmpo_lightning.models.kv_cache import Columns
from dmpo_lightning.models.parts import layers_of
from dmpo_lightning.planning.rehearsal import Rehearsal, drop_by_booleans
from dmpo_lightning.planning.run import Run
from dmpo_lightning.policy import evaluating
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, RolloutBuffer, Rollouts

GIB = 1024**3
RUNTIME = 1.0 * GIB
"""CUDA context, cuBLAS work space and fragmentation, on top of tensors. The tests, on CPUs, cannot check it."""


@dataclass(frozen=True)
class Phase:
    """What a phase of one buffer takes on one rank: bytes at its worst moment beside what stays, calls of the model at
    most, and the operations of all.
    """

    peak: float = 0.0
    forwards: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU: what stays for the whole run, and what each phase adds."""

    resident: dict[str, float]
    phases: dict[str, Phase]
    checkpoint: float
    """Bytes of a checkpoint, over all ranks: trained weights, the optimizer's states, a refreshed reference, rollouts.
    """

    @property
    def worst_phase(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=lambda name: self.phases[name].peak)

    @property
    def peak(self) -> float:
        """All tensors at the worst moment."""
        return sum(self.resident.values()) + self.phases[self.worst_phase].peak


def rehearsed(run: Run) -> Memory:
    """The memory and the forwards of one rank."""
    policy, rehearsal = run.module.policy, Rehearsal()
    if run.dtype is not None and not run.is_mixed:
        policy.to(run.dtype)
    frozen = set(policy.reference.parameter_names(policy.model))
    reference = _bytes(weight for name, weight in policy.named_parameters() if name in frozen)
    weights = _bytes(policy.parameters()) - reference
    trained = _bytes(each for each in policy.parameters() if each.requires_grad)
    if run.is_mixed and run.sharding.weights > 1:
        # Strategies that divide weights cast them before they gather them, and the states follow the weights.
        policy.to(run.dtype)
    rehearsal.imagine(policy)
    if not run.on_cpu:
        drop_by_booleans(policy)
    with rehearsal:
        return RehearsedBuffer(run, rehearsal).on_ranks(weights, reference, trained)


class RehearsedBuffer:
    """One buffer of a run on one rank: its phases in their order, as its module runs them.

    Forwards are counted. Of those without gradient each kind is run once: a sampler calls the model hundreds of times,
    mostly for as many tokens as before. What the later ones take was seen in the first, and none of them has numbers.
    """

    def __init__(self, run: Run, rehearsal: Rehearsal) -> None:
        self.run, self.rehearsal, self.policy = run, rehearsal, run.module.policy
        self.phases: dict[str, Phase] = {}
        self.merged_bytes = self.rollout_bytes = 0.0
        self.trained: list[Any] = [each for each in self.policy.parameters() if each.requires_grad]
        """What the optimizer gets."""
        self._forwards = 0
        self._seen: dict[Any, tuple[float, torch.dtype]] = {}
        """Operations and type of a forward by its kind."""
        self._real_predictor, self.policy.predictor = self.policy.predictor, self._predictor
        rollouts = None if run.module.sampler is None else self._sample(run.module)
        buffer = None if rollouts is None else self._score(run.module, rollouts)
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.state_bytes = self._optimize()
        self._train(buffer)

    @contextmanager
    def _predictor(self, reference: bool) -> Iterator[Any]:
        """In the place of `Policy.predictor`."""
        with self._real_predictor(reference) as predict:
            yield partial(self._counted, predict, reference)

    def _counted(
        self, predict: Any, reference: bool, ids: Tensor, mask: Tensor | None, *, positions: Tensor, **options: Any
    ) -> Tensor:
        self._forwards += 1
        at, scores = options.get("columns", Columns()), "targets" in options
        # The longest attention to a growing cache is that of its last columns.
        is_last = at.cache is not None and at.start + ids.shape[1] == at.cache.attention_mask.shape[1]
        kind = reference, ids.shape, mask is None, scores, at.cache is None, is_last
        if torch.is_grad_enabled() or kind not in self._seen:
            before = self.rehearsal.flops
            result: Tensor = predict(ids, mask, positions=positions, **options)
            self._seen[kind] = self.rehearsal.flops - before, result.dtype
            return result
        flops, dtype = self._seen[kind]
        self.rehearsal.flops += flops
        shape = positions.shape if scores else (*positions.shape, self.policy.facts.vocab_size)
        return torch.zeros(shape, dtype=dtype)

    @contextmanager
    def _phase(self, name: str, times: int = 1) -> Iterator[None]:
        """Inside is what one of ``times`` equal parts of a phase runs. What was counted under the name is kept."""
        rehearsal, earlier = self.rehearsal, self.phases.get(name, Phase())
        before, flops, self._forwards, rehearsal.peak = rehearsal.live, rehearsal.flops, 0, rehearsal.live
        yield
        self.phases[name] = Phase(
            max(earlier.peak, rehearsal.peak - before),
            earlier.forwards + times * self._forwards,
            earlier.flops + times * (rehearsal.flops - flops),
        )

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.run.dtype or torch.bfloat16, enabled=self.run.is_mixed)

    def _prompts(self, rows: int) -> tuple[Tensor, Tensor]:
        prompts = torch.zeros(rows, self.run.prompt_length, dtype=torch.int64)
        return prompts, torch.ones_like(prompts, dtype=torch.bool)

    def _sample(self, module: Any) -> Rollouts:
        """The rollouts of a buffer, of which one forward's rows are sampled, and copied to all others."""
        schedule, length = self.run.schedule, self.run.completion_length
        count, shape = schedule.buffer_rollouts, (schedule.prompts_per_buffer, schedule.group_size)
        rows = min(module.rows_per_forward or count, count)
        (prompts, mask), keys = self._prompts(count), torch.arange(count)
        before, times = self.rehearsal.live, -(-count // rows) * schedule.sampling_rounds
        with self.policy.merged() if module.sample_merged else nullcontext():
            self.merged_bytes = float(self.rehearsal.live - before)
            with evaluating(self.policy), self._autocast(), self._phase("sampling", times):
                options: Any = {"completion_length": length, "keys": keys[:rows]}
                samples = module.sampler.sample(self.policy, prompts[:rows], mask[:rows], **options)
                # Where a sampler reveals more as it is surer, the most that it takes is what it says.
                self._forwards = max(self._forwards, module.sampler.num_steps(length))
        drawn = [each[keys % rows].unflatten(0, shape) for each in vars(samples).values()]
        # Rewards that differ, but little: no group is left out, and no rollout is of negligible weight.
        reward = (torch.linspace(0, 0.1, shape[1]) ** 2).expand(shape).clone()
        first = slice(None, None, shape[1])
        batch = PromptBatch(prompts[first], mask[first], keys[: shape[0]], [None] * shape[0], mask[first, 0])
        self.rollout_bytes = _bytes([prompts[first], mask[first], *drawn])
        return Rollouts(
            prompts=batch,
            completion_ids=drawn[0],
            keys=keys.view(shape),
            reveal_step=drawn[1],
            sampled_log_prob=drawn[2],
            scores=Scores(components={}, total=reward, failures=0),
            order_is_independent=module.sampler.order_is_independent,
            temperature=module.sampler.temperature,
        )

    def _score(self, module: Any, rollouts: Rollouts) -> RolloutBuffer:
        """The buffer with its targets. What is scored before each optimizer step counts as scoring too."""
        schedule, policy = self.run.schedule, self.policy
        rows = module.rows_per_forward or schedule.micro_batch_size
        if module.reference_refresh_interval == 1:
            policy.refresh_reference()
        buffer = RolloutBuffer(num_iterations=1, micro_batch_size=schedule.micro_batch_size)
        with evaluating(policy), self._autocast():
            with self._phase("scoring"):
                targets, _ = module.objective.prepare(policy, rollouts, rows_per_forward=rows)
            buffer.fill(rollouts, dict(targets))
            with self._phase("scoring", schedule.num_iterations):
                while not buffer.needs_rollouts:
                    groups = buffer.groups_of_next(schedule.accumulation)
                    module.objective.before_step(policy, rollouts, buffer.targets, groups, rows_per_forward=rows)
                    buffer.position += schedule.accumulation
        buffer.position = 0
        return buffer

    def _optimize(self) -> float:
        """Bytes of the optimizer's states, which a first step makes. The second step is measured."""
        optimizer: Any = self.run.module.optimizer_factory(self.trained)
        if type(optimizer).__name__.lower().endswith(("8bit", "8bits")):
            # Its kernels are those of a GPU. It keeps two states of one byte each.
            self.phases["optimizer step"] = Phase()
            return 2.0 * sum(parameter.numel() for parameter in self.trained)
        for group in optimizer.param_groups:
            if group.get("foreach", True) is None and not self.run.on_cpu:
                group["foreach"] = True
        optimizer.step()
        with self._phase("optimizer step"):
            optimizer.step()
        return _bytes(value for state in optimizer.state.values() for value in state.values())

    def _train(self, buffer: RolloutBuffer | None) -> None:
        """The forward and backward pass of a micro-batch, while gradients are held.

        Lightning clears them behind the first forward of an optimizer step. Where that is the only one, the backward
        pass makes them anew, when the largest tensors are gone.
        """
        schedule = self.run.schedule
        with self._phase("training", schedule.training_steps):
            with self._autocast():
                loss = self._loss(buffer)
            if schedule.accumulation == 1 and self.run.sharding.gradients == 1:
                for parameter in self.trained:
                    parameter.grad = None
            loss.backward()

    def _loss(self, buffer: RolloutBuffer | None) -> Any:
        """Of the next micro-batch of a buffer, or of one of demonstrations."""
        module, size = self.run.module, self.run.schedule.micro_batch_size
        if buffer is not None:
            iteration, rows, targets = buffer.next_micro_batch()
            return module.objective.loss(self.policy, rows, targets, iteration=iteration, planned_rollouts=size)[0]
        completions = torch.zeros(size, self.run.completion_length, dtype=torch.int64)
        return module.loss(DemonstrationBatch(*self._prompts(size), completions, torch.arange(size)), number=0)

    def on_ranks(self, weights: float, reference: float, trained: float) -> Memory:
        """What one of the ranks has of it, by the rules of the strategy, with the bytes of its weights whole."""
        sharding, module = self.run.sharding, self.run.module
        # The optimizer's are those of the weights as they are stored, which a gathering strategy has cast for the run.
        stored = trained / _bytes(self.trained)
        states, step = self.state_bytes * stored, self.phases["optimizer step"].peak * stored
        whole = 4.0 * sum(parameter.numel() for parameter in self.trained)
        if sharding.master_weights and trained < whole:
            # DeepSpeed steps a float32 copy of half-precision weights, so its states are float32 too.
            states = whole * (1 + states / trained)
        on_gpu = not sharding.offloads_optimizer
        resident = {
            "weights": weights / sharding.weights,
            "reference": reference / sharding.weights,
            # DDP reduces gradients through buckets, which hold a second copy of all of them.
            "gradients": trained / sharding.gradients * (1 + sharding.bucketed),
            "optimizer": on_gpu * states / sharding.optimizer,
            "merged weights": self.merged_bytes,
            "rollouts": self.rollout_bytes,
        }
        phases = self.phases | {"optimizer step": Phase(on_gpu * step / sharding.optimizer)}
        for name, phase in phases.items() if sharding.weights > 1 else ():
            if phase.forwards:
                phases[name] = replace(phase, peak=phase.peak + self._gathered(name))
        is_refreshed = getattr(module, "reference_refresh_interval", None) is not None
        checkpoint = trained + states + is_refreshed * reference + self.rollout_bytes * self.run.schedule.ranks
        return Memory(resident, phases, checkpoint)

    def _gathered(self, name: str) -> float:
        """Bytes of the weights that are whole for a while in a phase where they are divided.

        Embeddings, final norm and head are one unit (`shard_fsdp2`), which is there as long as a forward lasts. Beside
        it are two layers, and in the backward pass of full fine-tuning the gradients of one before they are divided.
        """
        policy, is_training = self.policy, name == "training"
        layers = [_bytes(layer.parameters()) for layer in layers_of(policy.model)]
        whole = _bytes(policy.model.parameters())
        if is_training or not self.run.module.gather_for_generation:
            return whole + (2 + (is_training and not policy.has_adapters)) * layers[0] - sum(layers)
        return whole + _bytes(policy.reference.parameters())


def _bytes(tensors: Iterable[Any]) -> float:
    return float(sum(each.numel() * each.element_size() for each in tensors))
