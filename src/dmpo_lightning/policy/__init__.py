"""The policy that is trained and the reference that it is measured against."""

from dmpo_lightning.policy.policy import Policy, evaluating
from dmpo_lightning.policy.reference import ReferencePolicy
from dmpo_lightning.policy.rows import full_attention_mask

__all__ = ["Policy", "ReferencePolicy", "evaluating", "full_attention_mask"]
