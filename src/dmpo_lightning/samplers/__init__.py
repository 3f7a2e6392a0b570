"""Samplers, which unmask completions. `Sampler` says what one has to provide, and the rest is what to make it of."""

from dmpo_lightning.samplers.base import Sampler as Sampler
from dmpo_lightning.samplers.base import Samples as Samples
from dmpo_lightning.samplers.canvas import Canvas as Canvas
from dmpo_lightning.samplers.canvas import Change as Change
from dmpo_lightning.samplers.canvas import observed as observed
from dmpo_lightning.samplers.confidence import ConfidenceSampler as ConfidenceSampler
from dmpo_lightning.samplers.draws import Draw as Draw
from dmpo_lightning.samplers.draws import draw_tokens as draw_tokens
from dmpo_lightning.samplers.draws import step_uniforms as step_uniforms
from dmpo_lightning.samplers.random_order import RandomOrderSampler as RandomOrderSampler
from dmpo_lightning.samplers.wino import WinoSampler as WinoSampler
