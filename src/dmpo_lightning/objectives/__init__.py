"""Objectives: weights and losses over rollouts. `Objective` says what one has to provide."""

from dmpo_lightning.objectives.base import Diagnostics as Diagnostics
from dmpo_lightning.objectives.base import Objective as Objective
from dmpo_lightning.objectives.base import Targets as Targets
from dmpo_lightning.objectives.base import score_rollouts as score_rollouts
from dmpo_lightning.objectives.bgpo import BGPO as BGPO
from dmpo_lightning.objectives.coupled_grpo import CoupledGRPO as CoupledGRPO
from dmpo_lightning.objectives.diffu_grpo import DiffuGRPO as DiffuGRPO
from dmpo_lightning.objectives.ebpo import EBPO as EBPO
from dmpo_lightning.objectives.espo import ESPO as ESPO
from dmpo_lightning.objectives.estimators import ElboEstimator as ElboEstimator
from dmpo_lightning.objectives.estimators import LogProbEstimator as LogProbEstimator
from dmpo_lightning.objectives.estimators import TrajectoryEstimator as TrajectoryEstimator
from dmpo_lightning.objectives.gdpo import GDPO as GDPO
from dmpo_lightning.objectives.gdsd import GDSD as GDSD
from dmpo_lightning.objectives.just_grpo import JustGRPO as JustGRPO
from dmpo_lightning.objectives.spg import SPG as SPG
from dmpo_lightning.objectives.trace_rl import TraceRL as TraceRL
from dmpo_lightning.objectives.wd1 import WD1 as WD1
from dmpo_lightning.objectives.wdce import WDCE as WDCE
from dmpo_lightning.objectives.wddo import WDDO as WDDO
