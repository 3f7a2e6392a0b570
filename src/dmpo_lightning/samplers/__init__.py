"""Samplers, which unmask completions. `Sampler` says what one has to provide, and the rest is what to make it of."""

from dmpo_lightning.samplers.base import Sampler, Samples
from dmpo_lightning.samplers.canvas import Canvas, Change, observed
from dmpo_lightning.samplers.confidence import ConfidenceSampler
from dmpo_lightning.samplers.draws import Draw, draw_tokens, step_uniforms
from dmpo_lightning.samplers.random_order import RandomOrderSampler
from dmpo_lightning.samplers.wino import WinoSampler

__all__ = [
    "Canvas",
    "Change",
    "ConfidenceSampler",
    "Draw",
    "RandomOrderSampler",
    "Sampler",
    "Samples",
    "WinoSampler",
    "draw_tokens",
    "observed",
    "step_uniforms",
]
