"""State of a policy that lies on many processes: gathered whole into process 0, and handed out again.

Whole states have the names a single process has, so a checkpoint does not say in which layout it was written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
HAND_OUT = StateDictOptions(full_state_dict=True, strict=True)


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU, buffers included, in process 0; empty in the others. A collective."""
    return get_model_state_dict(model, options=GATHER)


def load_full_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give each process its part of a whole state dict that all of them hold; a missing tensor is an error."""
    set_model_state_dict(model, state, options=HAND_OUT)


def full_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, on the CPU, in process 0; empty in the others. A collective."""
    return get_optimizer_state_dict(model, optimizer, options=GATHER)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give each process its part of what `full_optimizer_state` returned, which all of them hold."""
    set_optimizer_state_dict(model, optimizer, state, options=HAND_OUT)
