"""Rollouts: sampled completions with all facts about them, how they are collected, and the buffer to train from."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.samplers import Sampler, Samples


@dataclass
class PromptBatch:
    """The prompts of one rollout buffer, or of one evaluation batch, on one rank."""

    prompt_ids: Int[Tensor, "batch prompt"]
    """Token ids, padded on the left."""
    prompt_mask: Bool[Tensor, "batch prompt"]
    """False on the padding."""
    prompt_index: Int[Tensor, " batch"]
    """The position in the dataset. It is the prompt id that all randomness is keyed by."""
    examples: list[Any]
    is_filler: Bool[Tensor, " batch"]
    """True for rows that only keep ranks in step. An evaluation never counts them."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """The batch with its tensors on another device. Lightning calls this."""
        tensors: Any = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})

    def __len__(self) -> int:
        return len(self.examples)

    def without_filler(self) -> "PromptBatch":
        """The prompts that count: all but the filler."""
        kept = ~self.is_filler
        tensors: Any = {name: value[kept] for name, value in vars(self).items() if isinstance(value, Tensor)}
        examples = [example for example, keep in zip(self.examples, kept.tolist(), strict=True) if keep]
        return replace(self, examples=examples, **tensors)


@dataclass
class RolloutRows:
    """Some rollouts in one row each, without their groups. This is what a micro-batch works on."""

    prompt_ids: Int[Tensor, "rows prompt"]
    prompt_mask: Bool[Tensor, "rows prompt"]
    completion_ids: Int[Tensor, "rows length"]
    keys: Int[Tensor, " rows"]
    reveal_step: Int[Tensor, "rows length"]
    temperature: float

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: slice | Tensor) -> "RolloutRows":
        tensors: Any = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value[index] for name, value in tensors.items()})


@dataclass
class Rollouts:
    """The rollouts of one buffer, group by group. They hold facts only, from which objectives derive weights."""

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    completion_ids: Int[Tensor, "batch group length"]
    keys: Int[Tensor, "batch group"]
    """The key of each rollout, from which everything random about it is drawn."""
    reveal_step: Int[Tensor, "batch group length"]
    sampled_log_prob: Float[Tensor, "batch group length"]
    """The log-prob of each token in the step that revealed it, at the sampling temperature."""
    reward: Float[Tensor, "batch group"]
    components: dict[str, Float[Tensor, "batch group"]]
    order_is_independent: bool
    """Whether the order of unmasking was independent of the tokens."""
    temperature: float

    @property
    def group_shape(self) -> tuple[int, int]:
        """The number of prompts, and of rollouts per prompt."""
        return self.keys.shape[0], self.keys.shape[1]

    def __len__(self) -> int:
        return self.keys.numel()

    def rows(self) -> RolloutRows:
        """All rollouts in one row each, group by group."""
        group = self.keys.shape[1]
        return RolloutRows(
            self.prompt_ids.repeat_interleave(group, 0),
            self.prompt_mask.repeat_interleave(group, 0),
            self.completion_ids.flatten(0, 1),
            self.keys.flatten(),
            self.reveal_step.flatten(0, 1),
            self.temperature,
        )

    def groups(self, index: slice) -> "Rollouts":
        """The rollouts of some of the groups."""
        # The prompts have no group axis, but every tensor has the batch axis first.
        tensors: Any = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, components={name: value[index] for name, value in self.components.items()}, **tensors)


def sample_completions(
    policy: Policy,
    sampler: Sampler,
    prompts: PromptBatch,
    *,
    group_size: int,
    completion_length: int,
    seed: int,
    iteration: int,
    rows_per_forward: int | None = None,
) -> tuple[Samples, Int[Tensor, "batch group"]]:
    """Samples ``group_size`` completions of each prompt, in eval mode and without gradient.

    At most ``rows_per_forward`` rows are sampled at a time. None samples all at once. Since draws are keyed, the
    completions do not depend on it.

    Returns:
        The completions in one row each, group by group, and their keys.
    """
    keys = row_keys(seed, prompts.prompt_index, group_size=group_size, iteration=iteration)
    # Rows of one prompt are neighbours, by which samplers find what they need to compute only once.
    prompt_ids = prompts.prompt_ids.repeat_interleave(group_size, 0)
    prompt_mask = prompts.prompt_mask.repeat_interleave(group_size, 0)
    chunk = rows_per_forward or len(prompt_ids)
    parts = []
    starts, steps = range(0, len(prompt_ids), chunk), sampler.num_steps(completion_length)
    with evaluating(policy):
        for number, start in enumerate(starts):
            policy.expect_steps(number * steps, len(starts) * steps)
            rows = slice(start, start + chunk)
            parts.append(
                sampler.sample(
                    policy,
                    prompt_ids[rows],
                    prompt_mask[rows],
                    completion_length=completion_length,
                    keys=keys.flatten()[rows],
                )
            )
    policy.expect_steps(len(starts) * steps, len(starts) * steps)
    joined = {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Samples)}
    return Samples(**joined), keys


def grouped(texts: list[str], group_size: int) -> list[list[str]]:
    """Cuts a flat list of texts into the groups of one prompt each."""
    return [texts[start : start + group_size] for start in range(0, len(texts), group_size)]


def collect(
    policy: Policy,
    sampler: Sampler,
    reward: Reward,
    prompts: PromptBatch,
    *,
    group_size: int,
    completion_length: int,
    seed: int,
    iteration: int,
    rows_per_forward: int | None = None,
) -> tuple[Rollouts, Scores, list[str]]:
    """Collects one rollout buffer: samples, decodes and scores ``group_size`` completions of each prompt.

    Returns:
        The rollouts, the scores that their reward comes from, and the decoded texts in the order of the rows.
    """
    samples, keys = sample_completions(
        policy,
        sampler,
        prompts,
        group_size=group_size,
        completion_length=completion_length,
        seed=seed,
        iteration=iteration,
        rows_per_forward=rows_per_forward,
    )
    texts = policy.decode(samples.completion_ids)
    scores = reward(prompts.examples, grouped(texts, group_size), prompts.prompt_index.tolist())
    device, shape = keys.device, (*keys.shape, completion_length)
    rollouts = Rollouts(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        completion_ids=samples.completion_ids.view(shape),
        keys=keys,
        reveal_step=samples.reveal_step.view(shape),
        sampled_log_prob=samples.log_prob.view(shape),
        reward=scores.total.to(device),
        components={name: value.to(device) for name, value in scores.components.items()},
        order_is_independent=sampler.order_is_independent,
        temperature=sampler.temperature,
    )
    return rollouts, scores, texts


class RolloutBuffer:
    """Rollouts with their targets, and how far training has come in them.

    Training passes over them ``num_iterations`` times, in micro-batches of equal size.
    """

    def __init__(self, *, num_iterations: int, micro_batch_size: int) -> None:
        check_counts(num_iterations=num_iterations, micro_batch_size=micro_batch_size)
        self.num_iterations, self.micro_batch_size = num_iterations, micro_batch_size
        self.rollouts: Rollouts | None = None
        self.targets: dict[str, Tensor] = {}
        self.position = 0

    def fill(self, rollouts: Rollouts, targets: dict[str, Tensor]) -> None:
        """Starts over, with new rollouts."""
        self.rollouts, self.targets, self.position = rollouts, targets, 0

    def clear(self) -> None:
        """Forgets the rollouts, so that the next step collects new ones."""
        self.rollouts, self.targets, self.position = None, {}, 0

    def __len__(self) -> int:
        """The number of rollouts that it holds."""
        return 0 if self.rollouts is None else len(self.rollouts)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in one pass."""
        assert self.rollouts is not None
        return len(self.rollouts) // self.micro_batch_size

    @property
    def needs_rollouts(self) -> bool:
        """Whether there is nothing left to train on."""
        return self.rollouts is None or self.position >= self.num_iterations * self.micro_batches

    def advance(self) -> tuple[int, slice]:
        """Goes on to the next micro-batch, and returns the number of its pass and its rows."""
        iteration, number = divmod(self.position, self.micro_batches)
        self.position += 1
        return iteration, slice(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)

    def next_micro_batch(self) -> tuple[int, RolloutRows, dict[str, Tensor]]:
        """The pass over the buffer, the rollouts of the next micro-batch in it, and their targets."""
        iteration, rows = self.advance()
        assert self.rollouts is not None
        targets = {name: value.flatten(0, 1)[rows] for name, value in self.targets.items()}
        return iteration, self.rollouts.rows()[rows], targets

    def groups_of_next(self, micro_batches: int, group_size: int) -> slice:
        """The whole groups that the next ``micro_batches`` have a part in."""
        # Micro-batches may cut through a group, but objectives work on whole ones.
        first = self.position % self.micro_batches * self.micro_batch_size
        last = first + micro_batches * self.micro_batch_size - 1
        return slice(first // group_size, last // group_size + 1)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors on the CPU and primitives, which checkpoints can hold without pickled classes."""
        if self.rollouts is None:
            return {"position": 0}
        # Off the GPU, because ranks gather the states of all of them for a checkpoint (`gather_ranks`).
        state = {"position": self.position, "rollouts": dict(vars(self.rollouts)), "targets": self.targets}
        return _move(state, torch.device("cpu"))

    def save(self, path: Path) -> Path:
        """Writes `state_dict` to a file, in a folder that is created if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), path)
        return path

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the state was taken."""
        self.position = state["position"]
        self.rollouts = Rollouts(**state["rollouts"]) if "rollouts" in state else None
        self.targets = state.get("targets", {})

    def to(self, device: torch.device) -> None:
        """Moves everything that it holds to another device."""
        if self.rollouts is not None:
            self.rollouts = Rollouts(**_move(vars(self.rollouts), device))
            self.targets = _move(self.targets, device)


def check_counts(**counts: int | None) -> None:
    """Raises ValueError, which names it, for a count below 1. None is no count."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _move(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
