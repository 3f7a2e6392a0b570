"""Weight baselines by name, or as a function of one's own."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from dmpo_lightning.rewards.functions import check_function
from dmpo_lightning.rollout import Rollouts

BaselineName = Literal["none", "group", "negative", "policy"]
BaselineFunction = Callable[[Tensor, Tensor, Rollouts], Any]
"""Computes the baseline b from weights, log_rnd and the rollouts. All tensors are ``[batch group]``.

It returns a Tensor. Named here, that type would refuse functions without annotations on the command line.
"""


def check_baseline(baseline: BaselineName | BaselineFunction, scale: float, reward_scale: float | None) -> None:
    """Raises ValueError for another name, a function that cannot be called so, or a factor that cannot be."""
    if callable(baseline):
        check_function("baseline", baseline, ("weights", "log_rnd", "rollouts"))
    elif baseline not in get_args(BaselineName):
        raise ValueError(f"`baseline` must be none, group, negative, policy or a function, got {baseline!r}.")
    if baseline == "policy" and reward_scale is not None:
        raise ValueError(
            "`baseline` policy needs log-probs of the behaviour policy, which reward_temperature 0 does not compute."
        )
    # Written so that NaN, which compares as false with everything, fails.
    if not 0 <= scale < math.inf:
        raise ValueError(f"`baseline_scale` must be finite and at least 0, got {scale}.")


def called_baseline(function: BaselineFunction, weights: Tensor, log_rnd: Tensor, rollouts: Rollouts) -> Tensor:
    """What a function returns, detached.

    Raises:
        ValueError: it is no tensor of the weights' shape.
    """
    baseline = function(weights, log_rnd, rollouts)
    shape = getattr(baseline, "shape", None)
    # Of another shape torch might take it as well, and subtract the numbers of other rollouts.
    if not isinstance(baseline, Tensor) or shape not in (weights.shape, weights[:, :1].shape):
        raise ValueError(
            f"`baseline` must return a tensor of shape {list(weights.shape)} (prompts, group), or with 1 in "
            f"place of the group; got {type(baseline).__name__}{'' if shape is None else f' {list(shape)}'}."
        )
    return baseline.detach()
