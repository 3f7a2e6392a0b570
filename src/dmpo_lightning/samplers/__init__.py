"""Samplers, which unmask completions. `Sampler` says what one has to provide, and the rest is what to make it of."""

from dmpo_lightning.samplers.base import Sampler, Samples, SamplingFootprint
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.confidence import ConfidenceSampler
from dmpo_lightning.samplers.draws import Draw, draw_tokens, step_uniforms
from dmpo_lightning.samplers.random_order import RandomOrderSampler
from dmpo_lightning.samplers.wino import WinoSampler

__all__ = [
    "Canvas",
    "ConfidenceSampler",
    "Draw",
    "RandomOrderSampler",
    "Sampler",
    "Samples",
    "SamplingFootprint",
    "WinoSampler",
    "draw_tokens",
    "step_uniforms",
]
