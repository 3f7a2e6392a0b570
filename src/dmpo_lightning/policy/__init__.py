"""The policy that is trained and the reference that it is measured against."""

from dmpo_lightning.policy.policy import Policy, evaluating, full_attention_mask
from dmpo_lightning.policy.reference import ReferencePolicy

__all__ = ["Policy", "ReferencePolicy", "evaluating", "full_attention_mask"]
