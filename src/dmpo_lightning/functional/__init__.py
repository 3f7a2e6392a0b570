"""The mathematics of DMPO on plain tensors: masks, likelihoods, weights, baselines, losses and keyed randomness."""

from dmpo_lightning.functional.baselines import (
    group_baseline,
    negative_baseline,
    no_baseline,
    policy_baseline,
)
from dmpo_lightning.functional.likelihood import elbo, elbo_replicates, trajectory_log_prob
from dmpo_lightning.functional.losses import denoising_cross_entropy, denoising_likelihood, wdce_loss, wddo_loss
from dmpo_lightning.functional.masking import (
    antithetic_pair,
    block_weights,
    check_replicates,
    draw_masks,
    mask_count,
    position_ranks,
    trajectory_masks,
)
from dmpo_lightning.functional.randomness import Purpose, fold_in, inverse_cdf, row_keys, uniforms
from dmpo_lightning.functional.weights import (
    effective_sample_size,
    equal_reward_groups,
    importance_weights,
    log_partition,
    negligible,
)

__all__ = [
    "Purpose",
    "antithetic_pair",
    "block_weights",
    "check_replicates",
    "denoising_cross_entropy",
    "denoising_likelihood",
    "draw_masks",
    "effective_sample_size",
    "elbo",
    "elbo_replicates",
    "equal_reward_groups",
    "fold_in",
    "group_baseline",
    "importance_weights",
    "inverse_cdf",
    "log_partition",
    "mask_count",
    "negative_baseline",
    "negligible",
    "no_baseline",
    "policy_baseline",
    "position_ranks",
    "row_keys",
    "trajectory_log_prob",
    "trajectory_masks",
    "uniforms",
    "wdce_loss",
    "wddo_loss",
]
