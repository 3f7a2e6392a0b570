"""SDAR-MoE, the mixture of experts among SDAR (arXiv 2510.06303), as a native transformers model.

It is an SDAR whose layers have experts like those of Qwen3-MoE.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from dmpo_lightning.models.families import register
from dmpo_lightning.models.mixture import Experts, MixtureMLP, Router, check_experts, stack_on_loading
from dmpo_lightning.models.sdar import FAMILY, SDARConfig, SDARForMaskedDiffusion


class SDARMoeConfig(SDARConfig):
    """Configuration of an SDAR-MoE. Its keys are the published ones, and its defaults those of SDAR-30B-A3B.

    Published configurations name neither ``block_size`` nor ``mask_token_id``, and have the defaults.

    Raises:
        ValueError: fewer experts than a token gets, or widths that are no multiples of 8.
    """

    model_type = "sdar_moe"
    fixed = {**SDARConfig.fixed, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    stated = (*SDARConfig.stated, "num_experts_per_tok", "norm_topk_prob")

    hidden_size: int = 2048
    intermediate_size: int = 6144
    moe_intermediate_size: int = 768
    num_hidden_layers: int = 48
    num_key_value_heads: int = 4
    num_experts: int = 128
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_experts(self)


class SoftmaxRouter(Router):
    """The experts of the highest probability, which is shared out among them."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        # Products in the dtype of the states, as published, and autocast would change it.
        with torch.autocast(h.device.type, enabled=False):
            scores = F.linear(h, self.weight.to(h.dtype)).softmax(-1, dtype=torch.float32)
        weights, chosen = scores.topk(self.k)
        return chosen, weights / weights.sum(-1, keepdim=True)


class SDARMoeForMaskedDiffusion(SDARForMaskedDiffusion):
    """SDAR-MoE with its head."""

    config_class = SDARMoeConfig

    @staticmethod
    def mlp_of(config: Any) -> nn.Module:
        """Experts alone."""
        return MixtureMLP(SoftmaxRouter(config), Experts(config))


register(FAMILY, SDARMoeForMaskedDiffusion, tokenizer_class=Qwen2Tokenizer)
stack_on_loading(SDARMoeConfig.model_type)
