"""Muon for weight matrices, AdamW for the rest, as one optimizer.

Muon orthogonalises each matrix's momentum (Jordan et al. 2024) and needs fewer steps than AdamW, which is what lets
a tiny base model be trained from nothing in minutes. DeepSeek-V3 itself uses AdamW for everything (section 4.2), and so
do recipes that leave `muon_learning_rate` out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEPT_FROM_MUON = ("embed_tokens", "lm_head", "mlp.gate.")  # lookups and the router: AdamW, as Muon's authors advise


class MuonWithAdamW(torch.optim.Optimizer):
    """Expert weights, held as [experts, out, in], go to AdamW: torch's Muon takes two dimensions."""

    def __init__(self, model: nn.Module, *, muon_learning_rate: float, learning_rate: float, adam_beta2: float,
                 weight_decay: float, adamw: type[torch.optim.Optimizer] = torch.optim.AdamW):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and not any(part in name for part in KEPT_FROM_MUON)]
        taken = set(map(id, matrices))
        rest = [p for _, p in named if id(p) not in taken]
        self.parts = (torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=0.01),
                      adamw(rest, lr=learning_rate, betas=(0.9, adam_beta2), weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        # loading makes new group objects; the scheduler must set the rates of these
        self.param_groups = [group for part in self.parts for group in part.param_groups]
