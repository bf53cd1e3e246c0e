"""FP8 training of any transformers causal LM: which layers are FP8, and which keep their precision.

DeepSeek-V3 (arXiv 2412.19437) section 3.3.1: the matrix products of attention's projections, MLPs and experts are FP8.
Embedding, output head, routers, norms and attention itself stay as they are, and so does the linear of the MTP module
that joins two hidden states, which the released FP8 checkpoint keeps in BF16. Parameters keep their names, shapes and
dtypes: checkpoints, weight sync and engines know nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from pipeline.recipe import Precision
from policy.kernels import fp8_experts, fp8_linear

# last parts of names; `gate` and `shared_expert_gate` are routers that other families build from a linear layer
KEPT = ("lm_head", "eh_proj", "gate", "shared_expert_gate")
AFTER_ATTENTION = "o_proj"


class FP8Linear(nn.Linear):
    """A linear layer that takes over the parameters of another."""

    exact = False  # set by `exact_products`

    def __init__(self, linear: nn.Linear, after_attention: bool):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias, self.after_attention = linear.weight, linear.bias, after_attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.exact:
            return super().forward(x)
        return fp8_linear.linear(x, self.weight, self.bias, self.after_attention)


class FP8SwiGLU(nn.Module):
    """An MLP of `gate_proj`, `up_proj` and `down_proj` (FP8Linear) that keeps the inputs of its SwiGLU in FP8."""

    exact = False

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if self.exact:
            return down(nn.functional.silu(gate) * up)
        return fp8_linear.swiglu_linear(gate, up, down.weight, down.bias)


def apply_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Make the model's matrix products FP8 where `precision` says so; returns the same model.

    Raises ValueError for experts that are laid out otherwise than DeepSeek's.
    """
    if precision == "dtype":
        return model
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in KEPT:
            model.set_submodule(name, FP8Linear(module, name.endswith(AFTER_ATTENTION)))
    for name, module in list(model.named_modules()):
        if all(isinstance(getattr(module, part, None), FP8Linear) for part in ("gate_proj", "up_proj", "down_proj")) \
                and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            model.set_submodule(name, FP8SwiGLU(module))
    experts = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    for module in experts:
        if module.has_bias or module.is_transposed or not module.has_gate or not module.is_concatenated \
                or not isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            raise ValueError(f"model.precision: fp8 has no kernel for {type(module).__name__}, whose experts are not "
                             "SwiGLUs of [gate; up] without bias; leave precision out")
    if experts:
        model.exact_experts = model.get_experts_implementation()
        model.set_experts_implementation(fp8_experts.NAME)
    return model


@contextmanager
def exact_products(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model multiplies in its own dtype, as an engine with the same weights does; a no-op without FP8."""
    swapped = [module for module in model.modules() if isinstance(module, FP8Linear | FP8SwiGLU)]
    before = model.get_experts_implementation()
    model.set_experts_implementation(getattr(model, "exact_experts", before))
    try:
        for module in swapped:
            module.exact = True
        yield
    finally:
        for module in swapped:
            module.exact = False
        model.set_experts_implementation(before)
