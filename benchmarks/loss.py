"""Times the training loss and its backward pass against the plain published one, on the same random weights with LoRA.

    python -m benchmarks.loss --json

Both sides take the same masks. They alternate, after one untimed run of each whose gradients are compared; the time
ratio is that of the medians. Memory is the peak of live tensors over one forward and backward pass, weights included.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.options import at_least_three, function_named
from benchmarks.samplers import Size, random_policy
from benchmarks.tensor_memory import TensorMemory
from dmpo_lightning import LoRA
from dmpo_lightning.functional import denoising_cross_entropy, draw_masks, wdce_loss
from dmpo_lightning.policy import Policy

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """What one loss is made of; each rollout comes in an antithetic pair of maskings."""

    vocab_size: int = 126464
    prompt_length: int = 200
    completion_length: int = 256
    rollouts: int = 2
    replicates: int = 2


@dataclass(frozen=True)
class Measurement:
    """Medians of seconds and peaks of bytes of both sides; and how far their gradients are apart."""

    plain_seconds: float
    our_seconds: float
    plain_bytes: int
    our_bytes: int
    gradient_error: float
    """Norm of the difference over the norm of the plain gradient, all trained weights together."""


def adapted_policy(workload: Workload) -> Policy:
    """The random model of `benchmarks.samplers` with adapters that do something."""
    size = Size(workload.vocab_size, workload.prompt_length, workload.completion_length, workload.rollouts, None)
    policy = random_policy(size)
    model = LoRA(r=16, alpha=32, dropout=0.0).apply(policy.model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return Policy(model.train(), policy.tokenizer, with_reference=False)


def losses(policy: Policy, workload: Workload, plain: Callable[..., Tensor]) -> tuple[Loss, Loss]:
    """The plain loss and ours on the same random rollouts."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = workload.rollouts, workload.vocab_size - 1
    prompts = torch.randint(tokens, (rows, workload.prompt_length), generator=generator)
    completions = torch.randint(tokens, (rows, workload.completion_length), generator=generator)
    masks = draw_masks(torch.arange(rows), length=workload.completion_length, replicates=workload.replicates)
    signal = torch.linspace(-1, 1, rows) if rows > 1 else torch.ones(1)
    ban = torch.zeros(workload.vocab_size)
    ban[list(policy.facts.banned_token_ids)] = -torch.inf

    def theirs() -> Tensor:
        mask_token_id = policy.facts.mask_token_id
        return plain(policy.model, prompts, completions, masks, signal, mask_token_id=mask_token_id, ban=ban)

    def ours() -> Tensor:
        log_prob = policy.completion_log_probs(prompts, torch.ones_like(prompts, dtype=torch.bool), completions, masks)
        return wdce_loss(denoising_cross_entropy(log_prob, masks), signal, planned_rollouts=rows)

    return theirs, ours


def gradient(policy: Policy, loss: Loss) -> Tensor:
    """Of all trained weights, as one vector."""
    policy.zero_grad()
    loss().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in gradients if grad is not None])


def peak_bytes(policy: Policy, loss: Loss) -> int:
    """Live tensors at the worst moment of forward and backward pass, weights included."""
    policy.zero_grad()
    memory = TensorMemory(policy.parameters())
    with memory:
        loss().backward()
    return memory.peak


def measure(workload: Workload, plain: Callable[..., Tensor], repeats: int) -> Measurement:
    """Both sides, interleaved."""
    policy = adapted_policy(workload)
    sides = losses(policy, workload, plain)
    expected, found = (gradient(policy, side) for side in sides)
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for side, durations in zip(sides, seconds, strict=True):
            policy.zero_grad()
            start = time.perf_counter()
            side().backward()
            durations.append(time.perf_counter() - start)
    plain_bytes, our_bytes = (peak_bytes(policy, side) for side in sides)
    error = float((found - expected).norm() / expected.norm())
    return Measurement(median(seconds[0]), median(seconds[1]), plain_bytes, our_bytes, error)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.loss", description=__doc__.partition("\n")[0])
    for name in ("vocab_size", "prompt_length", "completion_length", "rollouts", "replicates"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Workload, name))
    plain = "benchmarks.plain_loss:weighted_cross_entropy"
    parser.add_argument("--plain", type=function_named, default=plain, metavar="MODULE:FUNCTION")
    parser.add_argument("--repeats", type=at_least_three, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(arguments)
    sizes = {name: value for name, value in vars(options).items() if name in Workload.__annotations__}
    found = measure(Workload(**sizes), options.plain, options.repeats)
    ratios = {
        "time_ratio": round(found.plain_seconds / found.our_seconds, 3),
        "memory_ratio": round(found.plain_bytes / found.our_bytes, 3),
        "gradient_error": found.gradient_error,
    }
    if options.json:
        print(json.dumps(ratios))
        return
    plain, our = found.plain_bytes / 2**20, found.our_bytes / 2**20
    print(f"time    {found.plain_seconds:8.3f} s   {found.our_seconds:8.3f} s   ratio {ratios['time_ratio']}")
    print(f"memory  {plain:8.0f} MiB {our:8.0f} MiB ratio {ratios['memory_ratio']}")
    print(f"relative gradient error {found.gradient_error:.1e}")


if __name__ == "__main__":
    main()
