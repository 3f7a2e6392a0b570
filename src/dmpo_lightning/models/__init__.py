"""Backbones: native architectures, and loading by hub id, folder or embedded name.

Importing this package registers the native families with transformers, whose ``AutoModelForMaskedLM.from_pretrained``
then builds published and exported folders without remote code. ``import dmpo_lightning`` alone does not, because it
imports neither torch nor transformers.
"""

from dmpo_lightning.models import adapted as adapted
from dmpo_lightning.models import dream as dream
from dmpo_lightning.models import illada as illada
from dmpo_lightning.models import llada as llada
from dmpo_lightning.models import llada2 as llada2
from dmpo_lightning.models import sdar as sdar
from dmpo_lightning.models import sdar_moe as sdar_moe
