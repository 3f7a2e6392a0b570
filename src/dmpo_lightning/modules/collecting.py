"""How a rollout buffer comes to be: sampled, scored and weighted, with the time that each took."""

from contextlib import nullcontext
from time import perf_counter

from dmpo_lightning.evaluation.metrics import rollout_means
from dmpo_lightning.evaluation.rollout_values import rollout_values
from dmpo_lightning.modules.evaluation import EvaluationModule
from dmpo_lightning.modules.observers import CollectedBuffer
from dmpo_lightning.objectives import Objective
from dmpo_lightning.policy import evaluating
from dmpo_lightning.rollout import PromptBatch, collect, grouped
from dmpo_lightning.samplers import Sampler


def collect_buffer(
    module: EvaluationModule,
    prompts: PromptBatch,
    *,
    objective: Objective,
    sampler: Sampler,
    group_size: int,
    iteration: int,
    merged: bool,
    scoring_rows: int,
) -> CollectedBuffer:
    """Rollouts of these prompts under the module's policy as it is now, with the targets of the objective.

    Args:
        module: whose policy samples, and whose reward scores.
        prompts: of the buffer.
        objective: works out the targets.
        sampler: draws the rollouts.
        group_size: rollouts per prompt.
        iteration: how many buffers were collected before; it keys the draws.
        merged: sample from a copy of the weights with the adapters merged in.
        scoring_rows: rollouts per forward of the objective.
    """
    with module.gathered():
        started = perf_counter()
        with module.phase("sampling"), module.policy.merged() if merged else nullcontext():
            rollouts, scores, texts = collect(
                module.policy,
                sampler,
                module.reward,
                prompts,
                group_size=group_size,
                completion_length=module.completion_length,
                seed=module.seed,
                iteration=iteration,
                rows_per_forward=module.rows_per_forward,
            )
        sampled = perf_counter()
        # In eval mode as the rollouts were sampled. With dropout, log p_old would be that of another policy.
        with module.phase("scoring"), evaluating(module.policy):
            targets, diagnostics = objective.prepare(module.policy, rollouts, rows_per_forward=scoring_rows)
    return CollectedBuffer(
        iteration=iteration,
        prompts=prompts,
        rollouts=rollouts,
        completions=grouped(texts, group_size),
        scores=scores,
        targets=targets,
        means=rollout_means(
            scores,
            rollout_values(module.policy, rollouts, texts) | diagnostics | sampler.diagnostics(rollouts.reveal_step),
        ),
        seconds={"sampling": sampled - started, "scoring": perf_counter() - sampled},
    )
