"""The policy's router: transformers' parameters and names, FP32 whatever the model's dtype, with a replay input."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from policy.kernels.router import route


class Router(DeepseekV3TopkRouter):
    """Logits are an FP32 product (DeepSeek-V3 section 3.3.1 keeps the gate out of low precision).

    `replay`: int64 [tokens, top_k] of the coming pass, or None; see `policy.kernels.router.route`.
    """

    replay: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Override of `DeepseekV3TopkRouter.forward`: replay, and FP32 under autocast too."""
        hidden_states = hidden_states.view(-1, self.hidden_dim)
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = functional.linear(hidden_states.float(), self.weight.float())
            indices, weights = route(logits, self.e_score_correction_bias, self.num_group, self.topk_group, self.top_k,
                                     self.routed_scaling_factor, self.norm_topk_prob, self.replay)
        return logits, weights, indices

    def _apply(self, fn, recurse=True):
        """Override of `Module._apply`: `.to(bfloat16)` and its kind leave the bias in FP32."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = moved.float() if bias.is_meta else bias.to(moved.device)
        return self


def take_own_routers(model: PreTrainedModel) -> None:
    """Make transformers' routers in `model` ours; parameters, buffers and names stay."""
    for module in model.modules():
        if type(module) is DeepseekV3TopkRouter:
            module.__class__ = Router


def main_routers(model: PreTrainedModel) -> dict[int, Router]:
    """The routers of the main model by layer, the multi-token-prediction module's left out; {} for a dense model."""
    layers = getattr(model.base_model, "layers", [])[:model.config.num_hidden_layers]
    return {index: layer.mlp.gate for index, layer in enumerate(layers)
            if isinstance(getattr(getattr(layer, "mlp", None), "gate", None), Router)}
