"""E5M6, the 12-bit format of the inputs of the linear layer after attention (DeepSeek-V3, section 3.3.3).

The backward pass of attention reads these activations too and is sensitive to them, so E4M3 is too coarse for the copy
that waits for it. E5M6 is IEEE half precision with four mantissa bits fewer; a power-of-two scale per 1x128 tile keeps
the cut to 128x1 columns in the backward pass free of a second error. Two values lie in three bytes. Plain torch on
every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.kernels.quantize import BLOCK, EPS, round_up_to_power_of_two

E5M6_MAX = (2 - 2.0 ** -6) * 2.0 ** 15
MANTISSA_BITS, LEAST_EXPONENT = 6, -14  # of normal numbers


class Packed(NamedTuple):
    """`codes` uint8 [m, 3 ceil(k / 2)] and FP32 power-of-two `scales` [m, ceil(k / 128)] of a tensor [m, k]."""

    codes: Tensor
    scales: Tensor


def pack(x: Tensor) -> Packed:
    """Round x [m, k] to E5M6, to nearest even, and pack it."""
    tiles = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = round_up_to_power_of_two(tiles.abs().amax(-1).clamp(min=EPS) / E5M6_MAX)
    scaled = (tiles / scales.unsqueeze(-1)).flatten(-2)[:, :x.shape[1]]
    exponent = (torch.frexp(scaled).exponent - 1).clamp(min=LEAST_EXPONENT)
    step = torch.ldexp(torch.ones_like(scaled), exponent - MANTISSA_BITS)
    rounded = (torch.round(scaled / step) * step).to(torch.float16)  # exact: half precision has four bits more
    codes = F.pad((rounded.view(torch.int16).int() >> 4) & 0xFFF, (0, x.shape[1] % 2))
    first, second = codes[:, 0::2], codes[:, 1::2]
    triples = torch.stack([first >> 4, (first & 0xF) << 4 | second >> 8, second & 0xFF], dim=-1)
    return Packed(triples.to(torch.uint8).flatten(-2), scales)


def unpack(packed: Packed, columns: int) -> Tensor:
    """The FP32 tensor [m, columns] that `packed` stands for."""
    high, middle, low = packed.codes.int().unflatten(-1, (-1, 3)).unbind(-1)
    codes = torch.stack([high << 4 | middle >> 4, (middle & 0xF) << 8 | low], dim=-1).flatten(-2)[:, :columns]
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    return values * packed.scales.repeat_interleave(BLOCK, dim=-1)[:, :columns]
