"""What rollouts look like, by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from helpers import END_OF_TURN, tiny_policy
from dmpo_lightning.evaluation.rollout_values import repeated_share, rollout_values
