"""Objectives: weights and loss over rollouts; see `Objective` for the seam."""

from dmpo_lightning.objectives.base import Diagnostics, Objective, Targets
from dmpo_lightning.objectives.log_rnd import ElboEstimator, LogProbEstimator, TrajectoryEstimator
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
]
