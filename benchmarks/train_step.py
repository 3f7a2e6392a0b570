"""Times one whole rollout buffer, sampling, scoring and training, against the plain published algorithm.

    python -m benchmarks.train_step --json

The same random model with LoRA on both sides, which alternate after one untimed buffer of each. The plain side decodes
with `benchmarks.plain`, estimates log p_ref and log p_old from full logits and trains with `benchmarks.plain_loss`;
ours runs the package's sampler, `ElboEstimator` and `WDCE` loss. No optimizer step, which is the same for both.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.loss import Workload, adapted_policy
from benchmarks.options import at_least_three
from benchmarks.plain import generate
from benchmarks.plain_loss import weighted_cross_entropy
from dmpo_lightning import WDCE, ConfidenceSampler, ElboEstimator
from dmpo_lightning.functional import draw_masks, fold_in
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import PromptBatch, Sampling, collect

PHASES = ("sampling", "scoring", "training")


@dataclass(frozen=True)
class Buffer:
    """One prompt's rollouts, and how they are used; alpha is 1 so that all rollouts keep weight."""

    vocab_size: int = 32768
    prompt_length: int = 100
    completion_length: int = 64
    group_size: int = 4
    denoising_steps: int = 32
    block_length: int = 16
    elbo_samples: int = 2
    replicates: int = 2
    num_iterations: int = 2
    cache: str = "prefix"
    temperature: float = 0.2


class Run:
    """Both sides on one random policy and prompt."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        workload = Workload(buffer.vocab_size, buffer.prompt_length, buffer.completion_length)
        self.policy: Policy = adapted_policy(workload)
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(buffer.vocab_size - 1, (1, buffer.prompt_length), generator=generator)
        self.ban = torch.zeros(buffer.vocab_size)
        self.ban[list(self.policy.facts.banned_token_ids)] = -torch.inf
        self.decoding = {
            "block_length": buffer.block_length,
            "denoising_steps": buffer.denoising_steps,
            "temperature": buffer.temperature,
            "cache": buffer.cache,
        }

    def plain(self) -> list[float]:
        """Seconds of each phase."""
        buffer, policy, clock = self.buffer, self.policy, Clock()
        prompts = self.prompt.repeat(buffer.group_size, 1)
        base = policy.model.get_base_model()
        with evaluating(policy):
            completions = generate(
                base,
                prompts,
                torch.ones_like(prompts, dtype=torch.bool),
                completion_length=buffer.completion_length,
                mask_token_id=policy.facts.mask_token_id,
                ban=self.ban,
                generator=torch.Generator().manual_seed(0),
                **self.decoding,
            ).completion_ids
            clock.lap()
            masks = self._masks(buffer.elbo_samples, 0)
            self._plain_loss(prompts, completions, masks)
            with policy.model.disable_adapter():
                self._plain_loss(prompts, completions, masks)
            clock.lap()
        for iteration in range(buffer.num_iterations):
            self._plain_loss(prompts, completions, self._masks(buffer.replicates, 1 + iteration)).backward()
        clock.lap()
        return clock.laps

    def _plain_loss(self, prompts: Tensor, completions: Tensor, masks: Tensor) -> Tensor:
        signal = torch.linspace(-1, 1, len(prompts))
        mask_token_id = self.policy.facts.mask_token_id
        return weighted_cross_entropy(
            self.policy.model, prompts, completions, masks, signal, mask_token_id=mask_token_id, ban=self.ban
        )

    def _masks(self, replicates: int, use: int) -> Tensor:
        keys = fold_in(torch.arange(self.buffer.group_size), use)
        return draw_masks(keys, length=self.buffer.completion_length, replicates=replicates)

    def ours(self) -> list[float]:
        """Seconds of each phase."""
        buffer, policy, clock = self.buffer, self.policy, Clock()
        estimator = ElboEstimator(buffer.elbo_samples)
        # The published form, as the plain algorithm has it.
        objective = WDCE(
            reward_temperature=1.0,
            baseline="group",
            negative_term="log_likelihood",
            uninformative_groups="train",
            replicates=buffer.replicates,
            estimator=estimator,
        )
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        batch = PromptBatch(self.prompt, mask, torch.zeros(1, dtype=torch.long), [{}], torch.zeros(1, dtype=torch.bool))
        sampling = Sampling(ConfidenceSampler(**self.decoding), buffer.completion_length, buffer.group_size)
        rollouts = collect(policy, Reward(lambda example, completion: float(len(completion) % 7)), batch, sampling)
        clock.lap()
        with evaluating(policy):
            targets, _ = objective.prepare(policy, rollouts, rows_per_forward=buffer.group_size)
        clock.lap()
        flat = {name: value.flatten(0, 1) for name, value in targets.items()}
        for iteration in range(buffer.num_iterations):
            options = {"iteration": iteration, "planned_rollouts": buffer.group_size}
            objective.loss(policy, rollouts.rows(), flat, **options)[0].backward()
        clock.lap()
        return clock.laps


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._last = time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.laps.append(now - self._last)
        self._last = now


def measure(buffer: Buffer, repeats: int) -> dict[str, float]:
    """Ratios plain / ours of the medians of each phase and of the whole."""
    run = Run(buffer)
    sides: tuple[Callable[[], list[float]], ...] = (run.plain, run.ours)
    for side in sides:
        side()
    seconds: list[list[list[float]]] = [[], []]
    for _ in range(repeats):
        for side, laps in zip(sides, seconds, strict=True):
            laps.append(side())
    medians = [[median(column) for column in zip(*laps, strict=True)] for laps in seconds]
    whole = [median(map(sum, laps)) for laps in seconds]
    ratios = {name: plain / ours for name, plain, ours in zip(PHASES, *medians, strict=True)}
    return ratios | {"ratio": whole[0] / whole[1], "plain_seconds": whole[0], "our_seconds": whole[1]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description=__doc__.partition("\n")[0])
    for name, kind in Buffer.__annotations__.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(Buffer, name))
    parser.add_argument("--repeats", type=at_least_three, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = vars(parser.parse_args(arguments))
    as_json, repeats = options.pop("json"), options.pop("repeats")
    found = {name: round(value, 3) for name, value in measure(Buffer(**options), repeats).items()}
    print(json.dumps(found) if as_json else "\n".join(f"{name:14} {value:8.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
