"""Objectives: weights and losses over rollouts. `Objective` says what one has to provide."""

from dmpo_lightning.objectives.base import (
    Diagnostics,
    Objective,
    Targets,
    score_rollouts,
)
from dmpo_lightning.objectives.estimators import ElboEstimator, LogProbEstimator, TrajectoryEstimator
from dmpo_lightning.objectives.wdce import WDCE
from dmpo_lightning.objectives.wddo import WDDO

__all__ = [
    "WDCE",
    "WDDO",
    "Diagnostics",
    "ElboEstimator",
    "LogProbEstimator",
    "Objective",
    "Targets",
    "TrajectoryEstimator",
    "score_rollouts",
]
