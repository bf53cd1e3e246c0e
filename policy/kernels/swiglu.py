"""SwiGLU backward between two FP8 products (DeepSeek-V3, section 3.3.3), without its 16 or 32 bit tensors.

Cached are the two inputs of the activation as FP8 tiles. Backward computes the activation's output again and needs it
and the gradient of the inputs quantised both ways. None of them is written in more than 8 bits here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy.kernels import runs_triton
from policy.kernels.quantize import TILES, Quantized, dequantize, quantize_columns, quantize_dual


class SwigluGradients(NamedTuple):
    """`hidden`, the output silu(gate) * up times its row's weight, as columns [m, i] with power-of-two scales for Wgrad
    of the next layer; `tiles` and `columns`, the gradient of the inputs [m, 2 i], gate first; `weights` FP32 [m]."""

    hidden: Quantized
    tiles: Quantized
    columns: Quantized
    weights: Tensor


def swiglu_backward_quantize(gate_up: Quantized, d_out: Tensor, weights: Tensor) -> SwigluGradients:
    """Backward of weights * silu(gate) * up, for tiles `gate_up` [m, 2 i] with i a multiple of 128.

    `d_out` [m, i] is the gradient of the weighted output; `weights` FP32 [m], the routing weights, ones if there are
    none. Raises ValueError if i is not a multiple of 128: gate and up would share a tile.
    """
    if gate_up.values.shape[1] % 256:
        raise ValueError(f"swiglu_backward_quantize: gate and up take whole tiles of 128, got {gate_up.values.shape}")
    if runs_triton(d_out):
        from policy.kernels import triton_swiglu
        return triton_swiglu.swiglu_backward(gate_up, d_out, weights)
    gate, up = dequantize(gate_up, TILES).chunk(2, dim=-1)
    sigmoid = 1 / (1 + torch.exp(-gate))
    silu, upstream = gate * sigmoid, d_out.float()
    d_hidden = upstream * weights[:, None]
    d_gate_up = torch.cat([d_hidden * up * (sigmoid * (1 + gate - silu)), d_hidden * silu], dim=-1)
    return SwigluGradients(quantize_columns(silu * up * weights[:, None], power_of_two=True),
                           *quantize_dual(d_gate_up), (upstream * silu * up).sum(-1))
