"""Backbones: native architectures, and loading by hub id, folder or embedded name.

Importing this package registers LLaDA, iLLaDA, Dream and SDAR with transformers, whose
``AutoModelForMaskedLM.from_pretrained`` then builds published and exported folders without remote code. ``import
dmpo_lightning`` alone does not, because it imports neither torch nor transformers.
"""

from dmpo_lightning.models.families import families

families()
