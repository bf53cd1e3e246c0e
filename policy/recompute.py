"""Recompute in the backward pass what is cheap to compute and large to keep (DeepSeek-V3 sections 3.2.3 and 3.3.3).

Three parts can be chosen, as in the paper:

- `norm`: RMSNorm. Neither what it saves for itself nor its output, which the projections after it would save, is kept.
- `mla_up`: between MLA's latents and attention: the up-projections, their norms, rotary embedding, keys and values.
- `swiglu`: the product of gate and up-projection, and the experts' copy of their tokens. The project's own experts
  (`policy/kernels/experts.py`) keep neither, whatever is chosen here.

Matrix products other than the up-projections, and attention itself, are never computed twice. The graph of the
backward pass stays as it is and only what it reads is made again, so gradients do not change in any bit; a second
backward pass over the same graph is an error of torch's. Routers are outside of every part: a router that ran twice
would be counted twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3MLP,
)

from pipeline.stage import StageError
from policy.kernels.experts import recomputes_swiglu

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "grouped_mm_fallback")


def recompute(model: PreTrainedModel, parts: Collection[str]) -> None:
    """Make every decoder layer of `model`, the MTP module's too, recompute `parts` in its backward pass.

    parts: of "norm", "mla_up", "swiglu". Raises StageError for a model that has no DeepSeek-V3 layers.
    """
    layers = [module for module in model.modules() if isinstance(module, DeepseekV3DecoderLayer)]
    if parts and not layers:
        raise StageError(f"recompute: {', '.join(parts)} are parts of DeepSeek-V3 layers, which a "
                         f"{model.config.model_type} model has not; leave the key out")
    for layer in layers:
        attention = layer.self_attn
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if "mla_up" in parts:
            again = [attention.q_b_proj or attention.q_proj, attention.kv_b_proj, attention.o_proj]
            _keep_products_alone(attention, again)
        else:
            norms += [norm for norm in (attention.q_a_layernorm, attention.kv_a_layernorm) if norm is not None]
        if "swiglu" in parts:
            for module in layer.mlp.modules():
                if isinstance(module, DeepseekV3MLP):
                    _keep_products_alone(module, [module.down_proj])
                elif isinstance(module, DeepseekV3Experts) and not recomputes_swiglu(module):
                    _keep_products_alone(module, [])
        if "norm" in parts:
            _Norms(layer, norms)


def _keep_products_alone(module: nn.Module, again: Sequence[nn.Module]) -> None:
    """Let `module` keep its matrix products and attention outputs, but for those of the submodules `again`.

    Its last projection belongs there as well: nothing inside reads that output in the backward pass.
    """
    inside = 0

    def enter(*_: Any) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    def policy(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
        name = operator.name().partition("::")[2].partition(".")[0]
        kept = not inside and (name in PRODUCTS or "attention" in name or "flash" in name)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    for submodule in again:
        submodule.register_forward_pre_hook(enter)
        submodule.register_forward_hook(leave)
    forward = module.forward
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    @functools.wraps(forward)
    def selective(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Under expert parallelism the second run must find what the first did: this process's parameters, which stand
        # there during the forward pass alone, and tokens that have arrived.
        parameters = dict(module._parameters)
        args = [value.clone() if isinstance(value, AsyncCollectiveTensor) else value for value in args]

        def run(*args: Any, **kwargs: Any) -> Any:
            now, module._parameters = module._parameters, parameters
            try:
                return forward(*args, **kwargs)
            finally:
                module._parameters = now

        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    module.forward = selective


class _Norms:
    """The norms of one layer: whatever the layer saves of their outputs is a note of how to make it again."""

    def __init__(self, layer: nn.Module, norms: Sequence[nn.Module]):
        self.made: dict[int, tuple[torch.Tensor, _Call]] = {}  # by storage; held while the layer's forward pass runs
        for norm in norms:
            norm.forward = functools.partial(self._run, norm.forward)
        forward = layer.forward

        @functools.wraps(forward)
        def noting(*args: Any, **kwargs: Any) -> Any:
            try:
                with saved_tensors_hooks(self._pack, self._unpack):
                    return forward(*args, **kwargs)
            finally:
                self.made.clear()

        layer.forward = noting

    def _run(self, norm: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return norm(hidden)
        call = _Call(norm, hidden)
        with saved_tensors_hooks(call.pack, call.unpack):
            output = norm(hidden)
        self.made[output.untyped_storage().data_ptr()] = output, call
        return output

    def _pack(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, AsyncCollectiveTensor):  # from other processes, and without storage
            return tensor.detach()
        _, call = self.made.get(tensor.untyped_storage().data_ptr(), (None, None))
        if call is None:
            return tensor.detach()
        return call, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        call, *view = packed
        return call.output().as_strided(*view)


class _Call:
    """One call of a norm. Its second run gives what the first saved and returned, until the norm's backward pass."""

    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor):
        self.norm, self.hidden, self.wanted = norm, hidden.detach(), 0
        self.differentiable = hidden.requires_grad
        self.again: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None

    def pack(self, _tensor: torch.Tensor) -> int:
        self.wanted += 1
        return self.wanted - 1

    def unpack(self, index: int) -> torch.Tensor:
        saved = self._rerun()[1]
        tensor = saved.pop(index)
        if not saved:
            self.again = None
        return tensor

    def output(self) -> torch.Tensor:
        return self._rerun()[0]

    def _rerun(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        if self.again is None:
            saved: dict[int, torch.Tensor] = {}

            def collect(tensor: torch.Tensor) -> None:
                saved[len(saved)] = tensor.detach()

            with torch.enable_grad(), saved_tensors_hooks(collect, lambda _: None):
                output = self.norm(self.hidden.detach().requires_grad_(self.differentiable))
            self.again = output.detach(), saved
        return self.again
