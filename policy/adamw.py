"""AdamW for low-precision training: BF16 moments, FP32 arithmetic, FP32 master weights (DeepSeek-V3, section 3.3.3).

torch's AdamW keeps moments in the weights' own type. With FP32 weights they are twice as large as they need be, and
with BF16 weights the weights are updated in BF16 too, where a step of post-training is lost: at a weight of 0.02 the
next number is 1e-4 away, and a step moves it by 5e-6.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from pipeline.recipe import MOST_BETA2, Precision

BETAS = (0.9, 0.95)  # section 4.2


def adamw_class(dtype: str, precision: Precision) -> type[torch.optim.Optimizer]:
    """LowPrecisionAdamW for BF16 weights and for FP8 training, torch's AdamW for FP32 training."""
    return LowPrecisionAdamW if precision == "fp8" or dtype == "bfloat16" else torch.optim.AdamW


class LowPrecisionAdamW(torch.optim.Optimizer):
    """State per weight: `exp_avg` and `exp_avg_sq` in BF16, and for a BF16 weight its FP32 `master`.

    Raises ValueError for a beta2 whose decay BF16 cannot hold.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = BETAS, eps: float = 1e-8,
                 weight_decay: float = 0.0):
        if betas[1] > MOST_BETA2:
            raise ValueError(f"beta2 {betas[1]}: a BF16 second moment would never decay; at most {MOST_BETA2:.4g}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every weight with a gradient; what is FP32 for it is one weight large at a time."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, dtype=torch.bfloat16)
            if weight.dtype != torch.float32:
                state["master"] = weight.float()
        master = state.get("master", weight)
        mean, square = state["exp_avg"].float(), state["exp_avg_sq"].float()
        adamw([master], [weight.grad.float()], [mean], [square], [], [state["step"]], foreach=False, amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        if master is not weight:
            weight.copy_(master)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Override of `Optimizer.load_state_dict`, which casts the state to the weights' type."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, weight in zip(saved, weights, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[weight][name] = value.clone() if name == "step" else value.to(weight.device, copy=True)
