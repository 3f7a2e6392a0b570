"""When a run goes wrong: rules over the numbers of its rollout buffers, and what they say.

Nothing here knows a Trainer. ``docs/metrics.md`` explains the numbers.
"""

from collections.abc import Callable, Sequence
from statistics import median

from dmpo_lightning.callbacks.guard_history import Estimate, History

NORMS = 100
"""Optimizer steps whose gradient norms are remembered."""
FEWEST_NORMS = 20
"""Of which a median is taken."""
Finding = tuple[float, str]
"""The number that a rule stumbled over, and what it says of it."""
Rule = Callable[[History, float], Finding | None]


def reward_drop(history: History, errors: float) -> Finding | None:
    """The running reward lies below its best, by more than the errors of both."""
    now = history.reward
    if now is None or history.best is None:
        return None
    mean, error = history.best
    # Where all rewards are the same there is no error, and rounding is no fall.
    if now.high(errors) + 1e-6 * max(abs(mean), 1.0) >= Estimate(mean, error).low(errors):
        return None
    return now.mean, (
        f"The reward has fallen: its running mean is {now.mean:.3f} +- {now.error:.3f}, and was {mean:.3f} +- "
        f"{error:.3f} at its best. Most often the policy is being destroyed by too long steps. Continue from the best "
        "checkpoint with a lower learning rate, or with a `baseline` and negative signals that are bounded."
    )


def informative_groups(history: History, least: float) -> Finding | None:
    """Nearly all groups have equal rewards, so that there is nothing to learn from, and this is not success."""
    share, now = history.mean("reward/informative_groups", buffers=history.buffers), history.reward
    if share is None or now is None or share >= least or history.is_solved:
        return None
    seen = (
        f"Only {share:.1%} of the groups are informative: in all others every rollout got the same reward, "
        f"{now.mean:.3f} on average. "
    )
    if history.has_risen:
        return share, (
            seen
            + "The reward has risen and goes no further: the policy gives one answer to each prompt, right or wrong. "
            "Take a larger `group_size`, a higher sampling `temperature`, or a lower learning rate from the start."
        )
    return share, (
        seen + "The prompts are too hard or too easy for this model, the policy has collapsed, or the reward cannot "
        "tell completions apart. Look at completions and their rewards. Take other prompts, a larger `group_size`, a "
        "higher sampling `temperature`, or a reward that gives partial credit."
    )


def entropy(history: History, least: float) -> Finding | None:
    """The policy has become sure of itself without having become better."""
    now, first = history.mean("policy/entropy"), history.first[0].get("policy/entropy")
    if now is None or first is None or first <= 0 or now >= least * first or history.has_risen:
        return None
    return now, (
        f"The entropy has collapsed from {first:.3f} to {now:.3f} nats per token, while the reward has not risen. The "
        "policy writes the same things over and over, and finds no better ones. Lower the learning rate, or raise "
        "`reward_temperature`, so that weights stay closer to the reference."
    )


def distinct(history: History, least: float) -> Finding | None:
    """The completions of a prompt are nearly all the same, and no better than at the start."""
    share = history.mean("completion/distinct")
    if share is None or history.group < 2:
        return None
    # One text is always distinct. 0 is a group of equal texts, 1 a group in which all differ.
    others = (share * history.group - 1) / (history.group - 1)
    if others >= least or history.has_risen:
        return None
    said = "All completions" if others <= 0 else "Nearly all completions"
    return share, (
        f"{said} of a prompt are the same text: {share * history.group:.2f} of {history.group} are distinct on "
        "average, while the reward has not risen. Equal completions have equal rewards, and give no signal. Raise the "
        "`temperature` of the rollouts' `sampler`, or go back to a checkpoint with more variety and lower the learning "
        "rate."
    )


def effective_rollouts(history: History, least: float) -> Finding | None:
    """One rollout of each group has nearly all the weight."""
    ess = history.mean("weight/ess")
    if ess is None or ess * history.group >= least:
        return None
    return ess, (
        f"Of {history.group} rollouts of a group {ess * history.group:.2f} carry the weight (weight/ess {ess:.3f}): "
        "the policy is told to copy single completions. Either rewards differ by much more than `reward_temperature`, "
        "or log_rnd varies more than they do. Raise `reward_temperature`, set `target_ess`, lower "
        "`proximal_coefficient`, or renew the reference (`reference_refresh_interval`)."
    )


def too_many(metric: str, said: str) -> Rule:
    """A rule that speaks up where the share ``metric`` of completions is above its threshold.

    ``said`` is what it says of them behind their share, with ``{length}`` for the tokens of a completion.
    """

    def rule(history: History, most: float) -> Finding | None:
        share = history.mean(metric)
        if share is None or share <= most:
            return None
        return share, f"{share:.0%} of {said.format(length=history.length)}"

    return rule


def log_rnd(history: History, most: float) -> Finding | None:
    """The policy has gone far from its reference."""
    found = [history.mean(name) for name in ("policy/log_rnd", "policy/log_rnd_spread")]
    values = [value for value in found if value is not None]
    farthest = max(values, key=abs, default=0.0)
    if abs(farthest) <= most * history.length:
        return None
    return farthest, (
        f"The policy has left its reference: log_rnd is {values[0]:.1f} nats on average, with a spread of "
        f"{values[-1]:.1f} within groups, over {history.length} tokens. The weights then follow this difference and "
        "not the reward, and errors of its estimate grow with it. Lower the learning rate, raise `reward_temperature`, "
        "or renew the reference (`reference_refresh_interval`)."
    )


RULES: dict[str, Rule] = {
    "reward_drop": reward_drop,
    "informative_groups": informative_groups,
    "entropy": entropy,
    "distinct": distinct,
    "effective_rollouts": effective_rollouts,
    "repetition": too_many(
        "completion/repetition",
        "what completions say they have said before (4-grams of tokens). The policy has degenerated, or the reward "
        "likes repetition. Look at completions with a high reward, lower the learning rate, or let the reward reject "
        "repetition.",
    ),
    "empty": too_many(
        "completion/empty",
        "the completions are empty. The reward may favour saying nothing, the prompt template may not be the model's, "
        "or the policy has collapsed. Look at rewards of empty completions, at `prompt_template`, and lower the "
        "learning rate.",
    ),
    "truncated": too_many(
        "completion/truncated",
        "the completions fill all {length} tokens without an end token, so that answers may be cut off. Raise "
        "`completion_length`, or let the reward ask for short answers. Where completions are meant to fill it, set "
        "`truncated: null` of dmpo_lightning.Guards.",
    ),
    "log_rnd": log_rnd,
}
"""The rules that look at buffers, by the names of their thresholds."""
COLLAPSES = ("reward_drop", "informative_groups", "entropy", "distinct", "repetition", "empty", "log_rnd")
"""Those after which there is nothing to be gained by going on."""


def gradient_spike(norms: Sequence[float], most: float) -> Finding | None:
    """The last gradient is many times as long as usual. Gradients of zero, of steps without signal, are not counted."""
    usual = [norm for norm in norms[:-1] if norm > 0]
    if len(usual) < FEWEST_NORMS or norms[-1] <= most * median(usual):
        return None
    return norms[-1], (
        f"A gradient is {norms[-1] / median(usual):.0f} times as long as usual: its norm is {norms[-1]:.3g}, and "
        f"{median(usual):.3g} in the median of the last {len(usual)} steps. A few rollouts may have extreme weights, "
        "or steps are too long. Set `gradient_clip_val`, lower the learning rate, or look at weight/max."
    )


def greedy_rollouts(temperature: float, most: float) -> Finding | None:
    """The rollouts of a prompt are all alike by construction."""
    if temperature > most:
        return None
    return temperature, (
        f"The rollouts are sampled at temperature {temperature:g}, where all completions of a prompt are the same or "
        "nearly so: equal rewards give no signal, and nothing will be learnt. Set the `temperature` of `sampler`, "
        "commonly to 0.2 to 1. A greedy sampler belongs into `validation_samplers`."
    )
