"""Rollouts: sampled completions with all facts about them, how they are collected, and the buffer to train from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional import equal_reward_groups, row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.samplers import Sampler, Samples

Rows = TypeVar("Rows", bound="Table")


class Table:
    """A dataclass whose tensors and lists speak of the same things, one after the other along their first axis.

    So do those in the tables and dictionaries in it. All else in it holds for all of these things together.
    """

    def to(self: Rows, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same on another device. Lightning calls this for batches."""
        moved: Rows = mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved

    def __getitem__(self: Rows, index: slice | Tensor) -> Rows:
        """Some of the things, in the order of ``index``."""

        def chosen(values: list[Any]) -> list[Any]:
            # A list may be empty beside tensors that are not: checkpoints hold no texts.
            own = index.cpu() if isinstance(index, Tensor) else index
            return [values[place] for place in torch.arange(len(values))[own].tolist()] if values else []

        some: Rows = mapped(self, lambda tensor: tensor[index], chosen)
        return some


def mapped(table: Any, tensors: Callable[[Tensor], Tensor], lists: Callable[[list[Any]], list[Any]] = list) -> Any:
    """A copy of a table with each tensor and each list replaced by what a function makes of it."""
    if isinstance(table, Tensor):
        return tensors(table)
    if isinstance(table, list):
        return lists(table)
    if isinstance(table, dict):
        return {name: mapped(each, tensors, lists) for name, each in table.items()}
    if is_dataclass(table) and not isinstance(table, type):
        parts = {each.name: mapped(getattr(table, each.name), tensors, lists) for each in fields(table)}
        return replace(table, **parts)
    return table


def joined(tables: Sequence[Any]) -> Any:
    """Tables of one kind, one after the other. A name that one of them does not have is NaN in its rows."""
    first = tables[0]
    if isinstance(first, Tensor):
        return torch.cat(list(tables))
    if isinstance(first, list):
        return [each for table in tables for each in table]
    if isinstance(first, dict):
        absent = [torch.full_like(next(iter(table.values())), torch.nan) for table in tables if table]
        names = dict.fromkeys(name for table in tables for name in table)
        return {name: joined([t.get(name, nan) for t, nan in zip(tables, absent, strict=True)]) for name in names}
    if is_dataclass(first) and not isinstance(first, type):
        parts = {each.name: joined([getattr(table, each.name) for table in tables]) for each in fields(first)}
        return replace(first, **parts)
    return first


@dataclass
class PromptBatch(Table):
    """The prompts of one rollout buffer, or of one evaluation batch, on one rank.

    Example:
        >>> from dmpo_lightning import PromptLoader
        >>> loader = PromptLoader([{"prompt": "12"}, {"prompt": "4"}], "sudoku_tiny", batch_size=2, shuffle=False)
        >>> next(iter(loader)).prompt_mask.sum(dim=1)
        tensor([12, 11])
    """

    prompt_ids: Int[Tensor, "batch prompt"]
    """Token ids, padded on the left."""
    prompt_mask: Bool[Tensor, "batch prompt"]
    """False on the padding."""
    prompt_index: Int[Tensor, " batch"]
    """The position in the dataset, by which all randomness is keyed."""
    examples: list[Any]
    is_filler: Bool[Tensor, " batch"]
    """True for rows that only keep ranks in step. An evaluation never counts them."""

    def __len__(self) -> int:
        return len(self.prompt_index)


@dataclass
class RolloutRows(Table):
    """Some rollouts in one row each, without their groups. This is what a micro-batch works on."""

    prompt_ids: Int[Tensor, "rows prompt"]
    prompt_mask: Bool[Tensor, "rows prompt"]
    completion_ids: Int[Tensor, "rows length"]
    keys: Int[Tensor, " rows"]
    reveal_step: Int[Tensor, "rows length"]
    temperature: float

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class Rollouts(Table):
    """Rollouts of some prompts, group by group. They hold facts only, from which objectives derive weights.

    Example:
        >>> from dmpo_lightning import ConfidenceSampler, Policy, PromptLoader, Reward, load_model, load_tokenizer
        >>> from dmpo_lightning.rollout import Sampling, collect
        >>> policy = Policy(load_model("sudoku_tiny"), load_tokenizer("sudoku_tiny"))
        >>> prompts = next(iter(PromptLoader([{"prompt": "0" * 16}], policy.tokenizer, batch_size=1)))
        >>> reward = Reward(lambda example, completion: float(completion.count("1") == 4))
        >>> sampling = Sampling(ConfidenceSampler(), completion_length=20, group_size=4)
        >>> rollouts = collect(policy, reward, prompts, sampling)
        >>> rollouts.reward.shape, rollouts.completion_ids.shape
        (torch.Size([1, 4]), torch.Size([1, 4, 20]))
    """

    prompts: PromptBatch
    completion_ids: Int[Tensor, "batch group length"]
    keys: Int[Tensor, "batch group"]
    """The key of each rollout, from which everything random about it is drawn."""
    reveal_step: Int[Tensor, "batch group length"]
    """The step in which each token was unmasked. It is negative where an early exit filled the token in."""
    sampled_log_prob: Float[Tensor, "batch group length"]
    """The log-prob of each token in the step that revealed it, at the sampling temperature."""
    scores: Scores
    order_is_independent: bool
    """Whether the order of unmasking was independent of the tokens."""
    temperature: float
    """The temperature at which the tokens were sampled."""
    completions: list[list[str]] = field(default_factory=list)
    """The decoded texts of each prompt. A buffer that was read from a checkpoint has none, and no examples."""

    @property
    def reward(self) -> Float[Tensor, "batch group"]:
        """The weighted sum of the components."""
        return self.scores.total

    @property
    def components(self) -> dict[str, Float[Tensor, "batch group"]]:
        """What the reward consists of, by name."""
        return self.scores.components

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
            self.prompts.prompt_ids.repeat_interleave(group, 0),
            self.prompts.prompt_mask.repeat_interleave(group, 0),
            self.completion_ids.flatten(0, 1),
            self.keys.flatten(),
            self.reveal_step.flatten(0, 1),
            self.temperature,
        )


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled, and what their randomness is keyed by.

    Args:
        sampler: unmasks the completions.
        completion_length: tokens per completion.
        group_size: completions of each prompt.
        seed: of the draws.
        buffer: the number of buffers that were collected before. It keys the draws, as the seed does.
        rows_per_forward: completions that are sampled at a time. None samples all at once. Since draws are keyed, the
            completions do not depend on it.
    """

    sampler: Sampler
    completion_length: int
    group_size: int = 1
    seed: int = 0
    buffer: int = 0
    rows_per_forward: int | None = None


def sample_completions(
    policy: Policy, prompts: PromptBatch, sampling: Sampling
) -> tuple[Samples, Int[Tensor, "batch group"]]:
    """Samples completions of each prompt, in eval mode and without gradient.

    Returns:
        The completions in one row each, group by group, and their keys.
    """
    sampler, group, length = sampling.sampler, sampling.group_size, sampling.completion_length
    keys = row_keys(sampling.seed, prompts.prompt_index, group_size=group, buffer=sampling.buffer)
    # Rows of one prompt are neighbours, by which samplers find what they need to compute only once.
    ids, mask = (each.repeat_interleave(group, 0) for each in (prompts.prompt_ids, prompts.prompt_mask))
    chunk = sampling.rows_per_forward or len(ids)
    parts = []
    starts, steps = range(0, len(ids), chunk), sampler.num_steps(length)
    with evaluating(policy):
        for number, start in enumerate(starts):
            policy.expect_steps(number * steps, len(starts) * steps)
            rows = slice(start, start + chunk)
            own = keys.flatten()[rows]
            parts.append(sampler.sample(policy, ids[rows], mask[rows], completion_length=length, keys=own))
    policy.expect_steps(len(starts) * steps, len(starts) * steps)
    return joined(parts), keys


def grouped(texts: list[str], group_size: int) -> list[list[str]]:
    """Cuts a flat list of texts into the groups of one prompt each."""
    return [texts[start : start + group_size] for start in range(0, len(texts), group_size)]


def collect(policy: Policy, reward: Reward, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
    """Samples, decodes and scores completions of each prompt. The check reads special tokens, as in an evaluation."""
    samples, keys = sample_completions(policy, prompts, sampling)
    completions = grouped(policy.decode(samples.completion_ids), sampling.group_size)
    raw = None
    if reward.check is not None:
        raw = grouped(policy.decode(samples.completion_ids, special_tokens=True), sampling.group_size)
    scored = reward(prompts.examples, completions, prompts.prompt_index.tolist(), raw=raw)
    # The parts of a mixture say in which rows they are, which would not hold for some of the groups. Their scores are
    # among the components, and so is what the check says.
    scores = replace(scored, parts={}, verdicts=None)
    shape = (*keys.shape, sampling.completion_length)
    return Rollouts(
        prompts=prompts,
        completion_ids=samples.completion_ids.view(shape),
        keys=keys,
        reveal_step=samples.reveal_step.view(shape),
        sampled_log_prob=samples.log_prob.view(shape),
        scores=mapped(scores, lambda tensor: tensor.to(keys.device)),
        order_is_independent=sampling.sampler.order_is_independent,
        temperature=sampling.sampler.temperature,
        completions=completions,
    )


def collect_informative(
    policy: Policy, reward: Reward, candidates: PromptBatch, sampling: Sampling, *, rounds: int
) -> tuple[Rollouts, Rollouts]:
    """Collects candidates round by round until a buffer is full of informative groups, or no candidates are left.

    A group is informative if its rewards differ. Others call the rest of them zero-variance groups. The idea is dynamic
    sampling of DAPO (arXiv 2503.14476). Here its cost is bounded, since there are ``rounds`` times as many candidates
    as the buffer holds, and whole groups are kept or left out, so that within a prompt nothing is selected.

    Returns:
        The groups of the buffer, informative ones first and each kind in the order of the candidates, and all groups
        that were sampled.
    """
    size = len(candidates) // rounds
    sampled: list[Rollouts] = []
    for start in range(0, len(candidates), size):
        informative = sum(int((~equal_reward_groups(each.reward)).sum()) for each in sampled)
        # Ranks that share weights sample equally many rounds. They are not asked before the first.
        if sampled and not policy.anywhere(size > informative):
            break
        sampled.append(collect(policy, reward, candidates[start : start + size], sampling))
    if len(sampled) == 1:
        return sampled[0], sampled[0]
    whole: Rollouts = joined(sampled)
    whole.scores.failures = sum(each.scores.failures for each in sampled)
    # A stable sort, so that each kind stays in the order of the candidates.
    order = equal_reward_groups(whole.reward).to(torch.int8).argsort(stable=True)[:size]
    return whole[order], whole


class RolloutBuffer:
    """Rollouts with their targets, what is known of how they came about, and how far training has come in them.

    Training passes over them ``num_iterations`` times, in micro-batches of equal size. `RolloutObserver` sees it once
    it is filled. What holds for the moment of collecting alone (``means``, ``seconds``, ``sampled_reward`` and
    ``left_out``) is in no checkpoint.
    """

    def __init__(self, *, num_iterations: int, micro_batch_size: int) -> None:
        check_counts(num_iterations=num_iterations, micro_batch_size=micro_batch_size)
        self.num_iterations, self.micro_batch_size = num_iterations, micro_batch_size
        self.clear()

    def clear(self) -> None:
        """Forgets the rollouts, so that the next step collects new ones."""
        self._rollouts: Rollouts | None = None
        self.targets: dict[str, Tensor] = {}
        """The objective's, each ``[batch group ...]``. WDCE and WDDO have ``log_rnd`` and ``weight`` among them."""
        self.position = 0
        """The micro-batches that were handed out, over all passes."""
        self.number = 0
        """How many buffers were collected before this one."""
        self.means: Mapping[str, float] = {}
        """What is logged of the buffer, over all ranks."""
        self.seconds: Mapping[str, float] = {}
        """The wall time of this rank by phase: ``sampling`` (with rewards) and ``scoring``."""
        self.sampled_reward: Tensor = torch.zeros(0, 0, dtype=torch.float32)
        """The rewards ``[prompts group]`` of all rollouts that this rank sampled. With several ``sampling_rounds`` they
        are more than the buffer holds."""
        self.left_out: Sequence[int] = ()
        """The ``prompt_index`` of each prompt that was sampled and is not in the buffer."""

    def fill(
        self, rollouts: Rollouts, targets: dict[str, Tensor], *, number: int = 0, sampled: Rollouts | None = None
    ) -> None:
        """Starts over, with new rollouts, which may be a part of those that were sampled."""
        self.clear()
        self._rollouts, self.targets, self.number = rollouts, targets, number
        whole = rollouts if sampled is None else sampled
        self.sampled_reward, rest = whole.reward, whole.prompts.prompt_index.tolist()
        for index in rollouts.prompts.prompt_index.tolist():
            # Once each: a prompt may have been sampled twice.
            rest.remove(index)
        self.left_out = rest

    @property
    def rollouts(self) -> Rollouts:
        """The rollouts. The buffer must have been filled."""
        assert self._rollouts is not None
        return self._rollouts

    def __len__(self) -> int:
        """The number of rollouts that it holds."""
        return 0 if self._rollouts is None else len(self._rollouts)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in one pass."""
        return len(self.rollouts) // self.micro_batch_size

    @property
    def needs_rollouts(self) -> bool:
        """Whether there is nothing left to train on."""
        return self._rollouts is None or self.position >= self.num_iterations * self.micro_batches

    def next_micro_batch(self) -> tuple[int, RolloutRows, dict[str, Tensor]]:
        """Goes on to the next micro-batch: the number of its pass, its rollouts and their targets."""
        iteration, number = divmod(self.position, self.micro_batches)
        rows = slice(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)
        self.position += 1
        targets = mapped(self.targets, lambda target: target.flatten(0, 1)[rows])
        return iteration, self.rollouts.rows()[rows], targets

    def groups_of_next(self, micro_batches: int) -> slice:
        """The whole groups that the next ``micro_batches`` have a part in."""
        # Micro-batches may cut through a group, but objectives work on whole ones.
        group = self.rollouts.group_shape[1]
        first = self.position % self.micro_batches * self.micro_batch_size
        last = first + micro_batches * self.micro_batch_size - 1
        return slice(first // group, last // group + 1)

    def state_dict(self) -> dict[str, Any]:
        """What training goes on from, as tensors on the CPU and primitives, which checkpoints hold without pickle.

        Texts and examples are left out: checkpoints stay small, and examples may be any objects.
        """
        if self._rollouts is None:
            return {"position": 0}
        state = {"position": self.position, "number": self.number, "targets": self.targets}
        # Off the GPU, because ranks gather the states of all of them for a checkpoint (`gather_ranks`).
        return mapped(state | {"rollouts": _without_lists(self._rollouts)}, Tensor.cpu)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the state was taken."""
        self.clear()
        if "rollouts" not in state:
            return
        held = dict(state["rollouts"])
        prompts, scores = PromptBatch(**held.pop("prompts"), examples=[]), Scores(**held.pop("scores"))
        self.fill(Rollouts(prompts=prompts, scores=scores, **held), dict(state["targets"]), number=state["number"])
        self.position = state["position"]

    def to(self, device: torch.device) -> None:
        """Moves everything that it holds to another device."""
        if self._rollouts is not None:
            self._rollouts, self.targets = self._rollouts.to(device), mapped(self.targets, lambda each: each.to(device))


def _without_lists(table: Any) -> dict[str, Any]:
    parts: Iterable[tuple[str, Any]] = vars(table).items()
    return {
        name: _without_lists(each) if is_dataclass(each) else each for name, each in parts if not isinstance(each, list)
    }


def check_counts(**counts: int | None) -> None:
    """Raises ValueError, which names it, for a count below 1. None is no count."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
