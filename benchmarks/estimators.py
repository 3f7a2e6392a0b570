"""Bias and variance of each objective's gradient, and where each leads, on a policy whose expectations are sums.

    python -m benchmarks.estimators    # prints the table of docs/objectives.md, in a few minutes on one thread

The policy is the table of `tests/oracle`: completions of three tokens of two values, unmasked in random order. The
objectives are the shipped ones with their published settings, behind the real `Policy`, sampler and rollouts.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from dmpo_lightning.objectives import (
    BGPO,
    EBPO,
    ESPO,
    GDPO,
    GDSD,
    SPG,
    WD1,
    WDCE,
    CoupledGRPO,
    DiffuGRPO,
    JustGRPO,
    Objective,
    TraceRL,
    TrajectoryEstimator,
)
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rollout import Rollouts, Sampling, collect
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler
from oracle.tabular import (
    Elbos,
    Trajectories,
    population_loss,
    population_signal,
    random_tables,
    sequence_log_prob,
    sequential_log_prob,
    total_variation,
    train,
)
from oracle.tabular_model import prompts, tabular_policy, tabular_reward

ALPHA = 0.5
REWARD = torch.tensor([0.0, 0.3, 0.1, 1.0, 0.2, 0.6, 0.4, 0.8])
START = random_tables(0).float()
GROUP, ROWS, CHUNKS = 4, 64, 200
"""Rollouts of a prompt and of a micro-batch, and micro-batches of which mean and variance are taken."""
FORWARDS = 1000
"""Rows through the network at which the noise is given; a row with a gradient counts three times."""


@dataclass(frozen=True)
class Method:
    """An objective, and what it states that it does.

    ``tilt`` is what the reward is multiplied by in the exponent of its target ``p_ref exp(tilt r) / Z``. An infinite
    one, without a KL, aims at the best completion. ``matches`` says that the loss is the cross-entropy to that target,
    and not the expected reward minus KL / tilt.
    """

    objective: Objective
    tilt: float = math.inf
    matches: bool = False
    sequential: bool = False
    enumerated: tuple[str, str, type] | None = None
    """Baseline, negative term and log-probs of `oracle.tabular`, where it has the loss for infinite groups."""

    @property
    def log_prob(self) -> Callable[[Tensor], Tensor]:
        """Of all completions, as its sampler draws them from a table."""
        return sequential_log_prob if self.sequential else sequence_log_prob

    def target(self, reference: Tensor) -> Tensor:
        """The distribution that it states."""
        if math.isinf(self.tilt):
            return torch.nn.functional.one_hot(REWARD.argmax(), len(REWARD)).float()
        return (self.log_prob(reference) + self.tilt * REWARD).softmax(-1)

    def stated_gradient(self, table: Tensor, reference: Tensor) -> Tensor:
        """That of the loss that it states, by enumeration with the exact log p."""
        table = table.clone().requires_grad_()
        log_prob = self.log_prob(table)
        if self.matches:
            loss = -(self.target(reference) @ log_prob)
        else:
            loss = -(log_prob.exp() @ (REWARD - (log_prob - self.log_prob(reference)) / self.tilt))
        return torch.autograd.grad(loss, table)[0]


def methods() -> dict[str, Method]:
    """All that ship, by the names that the side-by-side table has."""
    dmpo = partial(WDCE, reward_temperature=ALPHA)
    log = {"negative_term": "log_likelihood", "uninformative_groups": "train"}
    matching = partial(Method, tilt=1 / ALPHA, matches=True)
    return {
        "DMPO": matching(dmpo(), enumerated=("group", "likelihood", Elbos)),
        "DMPO, trajectories": matching(
            dmpo(estimator=TrajectoryEstimator()), enumerated=("group", "likelihood", Trajectories)
        ),
        "DMPO, policy": matching(dmpo(baseline="policy"), enumerated=("policy", "likelihood", Elbos)),
        "DMPO, none": matching(
            dmpo(baseline="none", uninformative_groups="train"), enumerated=("none", "likelihood", Elbos)
        ),
        "DMPO, published group": matching(dmpo(**log), enumerated=("group", "log_likelihood", Elbos)),
        "DMPO, published negative": matching(
            dmpo(baseline="negative", **log), enumerated=("negative", "log_likelihood", Elbos)
        ),
        "wd1": Method(WD1()),
        "diffu-GRPO": Method(DiffuGRPO(), tilt=1 / DiffuGRPO.beta),
        "coupled-GRPO": Method(CoupledGRPO(), tilt=1 / CoupledGRPO.beta),
        "SPG": Method(SPG()),
        "StableDRL": Method(SPG(ratio_clip=5.0)),
        "ESPO": Method(ESPO(), tilt=1 / ESPO.beta),
        "GDPO": Method(GDPO()),
        "GDSD": Method(GDSD(), tilt=2 * GDSD.psi / GDSD.beta),
        "TraceRL": Method(TraceRL(shrink=1)),
        "JustGRPO": Method(JustGRPO(), sequential=True),
        "EBPO": Method(EBPO()),
        "BGPO": Method(BGPO()),
    }


def sampled(method: Method, policy: Policy, *, batch: int, buffer: int = 0) -> Rollouts:
    """Rollouts of the policy for so many prompts."""
    sampler = ConfidenceSampler(remasking="sequential") if method.sequential else RandomOrderSampler()
    return collect(policy, tabular_reward(REWARD), prompts(batch), Sampling(sampler, 3, GROUP, buffer=buffer))


def prepared(method: Method, policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    """The objective's targets."""
    with evaluating(policy):
        return method.objective.prepare(policy, rollouts, rows_per_forward=1 << 14)[0]


def losses(
    method: Method, policy: Policy, rollouts: Rollouts, targets: dict[str, Tensor], *, rows: int, iteration: int = 0
) -> Iterator[Tensor]:
    """The losses of the micro-batches of a pass, of so many rows each."""
    with evaluating(policy):
        method.objective.before_step(policy, rollouts, targets, slice(None), rows_per_forward=1 << 14)
    every = rollouts.rows()
    for start in range(0, len(every), rows):
        chosen = slice(start, start + rows)
        own = {name: each.flatten(0, 1)[chosen] for name, each in targets.items()}
        yield method.objective.loss(policy, every[chosen], own, iteration=iteration, planned_rollouts=rows)[0]


def angle_and_noise(method: Method, *, behaviour: Tensor, table: Tensor, reference: Tensor) -> tuple[float, float]:
    """The angle in degrees between the mean gradient and the stated one, and the standard deviation of a gradient of
    `FORWARDS` rows over the length of the mean one.
    """
    policy = tabular_policy(behaviour, reference)
    if behaviour is reference:
        policy.refresh_reference()
    cost = 0

    def count(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        nonlocal cost
        cost += len(given[0]) * (3 if torch.is_grad_enabled() else 1)

    for network in policy.networks:
        network.register_forward_pre_hook(count)
    rollouts = sampled(method, policy, batch=CHUNKS * ROWS // GROUP)
    targets = prepared(method, policy, rollouts)
    policy.model.table.data.copy_(table)
    each = losses(method, policy, rollouts, targets, rows=ROWS)
    gradients = torch.stack([torch.autograd.grad(loss, policy.model.table)[0].flatten() for loss in each]).double()
    stated, mean = method.stated_gradient(table, reference).flatten().double(), gradients.mean(0)
    # Of the two halves, since the square of a mean has its variance in it.
    length = (gradients[::2].mean(0) @ gradients[1::2].mean(0)).clamp(min=1e-30).sqrt()
    cosine = ((mean @ stated) / (length * stated.norm())).clamp(-1, 1)
    variance = gradients.var(0).sum() * cost / CHUNKS / FORWARDS
    return math.degrees(cosine.acos()), float(variance.sqrt() / length)


def reached(method: Method, *, buffers: int = 100, batch: int = 128) -> Tensor:
    """The distribution after training on its own samples, two passes a buffer, from the reference, which stays."""
    policy = tabular_policy(START, START)
    optimizer = torch.optim.Adam([policy.model.table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, buffers)
    for buffer in range(buffers):
        rollouts = sampled(method, policy, batch=batch, buffer=buffer)
        targets = prepared(method, policy, rollouts)
        for iteration in range(2):
            optimizer.zero_grad()
            (loss,) = losses(method, policy, rollouts, targets, rows=len(rollouts), iteration=iteration)
            loss.backward()
            optimizer.step()
        schedule.step()
    return method.log_prob(policy.model.table.detach()).exp()


def enumerated(baseline: str, negative_term: str, estimate: type) -> Tensor:
    """The distribution after descent on the loss of infinite groups of the present policy, all masks enumerated."""
    reward = REWARD.repeat(len(estimate.completions) // len(REWARD))[None]

    def loss(table: Tensor, step: int) -> Tensor:
        now = table.detach()
        signal = population_signal(
            baseline, estimate, table=now, behaviour=now, reference=START[None], reward=reward, temperature=ALPHA
        )
        return population_loss(table, estimate.completions, signal, negative_term=negative_term)

    return sequence_log_prob(train(START[None], loss, steps=400)[0]).exp()


def main() -> int:
    """Prints the tables, and returns the exit status."""
    torch.set_num_threads(1)
    better = START - 8 * Method(WD1()).stated_gradient(START, START)
    moved = total_variation(*(sequence_log_prob(table).exp() for table in (START, better)))
    points = {
        "fresh": {"behaviour": START, "table": START, "reference": START},
        "later pass": {"behaviour": START, "table": better, "reference": START},
        "fixed reference": {"behaviour": better, "table": better, "reference": START},
    }
    print(
        f"<!-- python -m benchmarks.estimators; groups of {GROUP}, the policy of a later pass {moved:.2f} away. -->\n"
    )
    columns = [f"{kind}, {name}" for name in points for kind in ("angle", "noise")]
    columns += ["to its own target", "enumerated", "to p*"]
    print(f"| method | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, method in methods().items():
        cells = []
        for tables in points.values():
            angle, noise = angle_and_noise(method, **tables)
            cells += [f"{angle:.0f}°", f"{noise:.1f}"]
        end, own = reached(method), method.target(START)
        exact = "" if method.enumerated is None else f"{total_variation(enumerated(*method.enumerated), own):.2f}"
        desired = (method.log_prob(START) + REWARD / ALPHA).softmax(-1)
        cells += [f"{total_variation(end, own):.2f}", exact, f"{total_variation(end, desired):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
