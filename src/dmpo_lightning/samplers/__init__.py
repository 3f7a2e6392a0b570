"""Samplers, which unmask completions. `Sampler` says what one has to provide."""

from dmpo_lightning.samplers.base import Sampler, Samples, SamplingFootprint
from dmpo_lightning.samplers.confidence import ConfidenceSampler
from dmpo_lightning.samplers.random_order import RandomOrderSampler
from dmpo_lightning.samplers.wino import WinoSampler

__all__ = ["ConfidenceSampler", "RandomOrderSampler", "Sampler", "Samples", "SamplingFootprint", "WinoSampler"]
