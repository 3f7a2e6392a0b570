"""How a rollout buffer comes to be: sampled, scored and weighted, with the time that each took."""

from contextlib import nullcontext
from time import perf_counter

from dmpo_lightning.evaluation.metrics import rollout_means
from dmpo_lightning.evaluation.rollout_values import rollout_values
from dmpo_lightning.modules.evaluation import EvaluationModule
from dmpo_lightning.modules.informative import Round, collect_informative
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
    sampling_rounds: int = 1,
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
        sampling_rounds: into how many parts the prompts are cut. The next one is sampled where those before it have
            too few informative groups to fill a buffer of one part.
    """

    def sample(chosen: PromptBatch) -> Round:
        with module.phase("sampling"):
            rollouts, scores, texts = collect(
                module.policy,
                sampler,
                module.reward,
                chosen,
                group_size=group_size,
                completion_length=module.completion_length,
                seed=module.seed,
                iteration=iteration,
                rows_per_forward=module.rows_per_forward,
            )
        return Round(chosen, rollouts, scores, grouped(texts, group_size))

    with module.gathered():
        started = perf_counter()
        # Ranks agree on another round between two phases: within one they would compare their forwards.
        with module.policy.merged() if merged else nullcontext():
            kept, whole = collect_informative(sample, prompts, rounds=sampling_rounds, anywhere=module.policy.anywhere)
        sampled = perf_counter()
        # In eval mode as the rollouts were sampled. With dropout, log p_old would be that of another policy.
        with module.phase("scoring"), evaluating(module.policy):
            targets, diagnostics = objective.prepare(module.policy, kept.rollouts, rows_per_forward=scoring_rows)
    values = rollout_values(module.policy, whole.rollouts, whole.completions)
    return CollectedBuffer(
        iteration=iteration,
        prompts=kept.prompts,
        rollouts=kept.rollouts,
        completions=kept.completions,
        scores=kept.scores,
        targets=targets,
        means=rollout_means(whole.scores, values | diagnostics | sampler.diagnostics(whole.rollouts.reveal_step)),
        seconds={"sampling": sampled - started, "scoring": perf_counter() - sampled},
        sampled_reward=whole.scores.total,
        left_out=_without(whole.prompts.prompt_index.tolist(), kept.prompts.prompt_index.tolist()),
    )


def _without(whole: list[int], part: list[int]) -> list[int]:
    """What is left of a list, in its order, once each item of another has been taken out once."""
    rest = list(whole)
    for item in part:
        rest.remove(item)
    return rest
