"""Token dispatch of expert parallelism on the wire formats of DeepSeek-V3 (arXiv 2412.19437, section 3.3.3).

transformers sorts (token, expert) pairs by owner, sends them by all-to-all, runs the owner's experts and sends the
outputs back (`EpDispatchExpertsParallel`), all in the activations' own dtype. Here the tokens travel in FP8 (E4M3)
with one power-of-two scale per 1x128 tile, and the outputs in BF16; in backward the gradient of the outputs travels
in FP8 and that of the tokens in BF16. Routing, its weights and the sums over experts are untouched.
"""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.nn import functional
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, EpDispatchExpertsParallel

EXACT, FP8 = "ep_dispatch_experts", "ep_dispatch_experts_fp8"  # names of parallel styles
TILE = 128
E4M3_MAX = 448.0
SMALLEST = 1e-4  # amax floor of a tile, so that zeros have a scale


def pack_fp8(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, hidden] of any float dtype -> uint8 [n, ceil(hidden / 128) * 129]: E4M3 codes, then E8M0 scales.

    The scale of a tile is the smallest power of two that keeps it within 448.
    """
    count, hidden = rows.shape
    tiles = functional.pad(rows.float(), (0, -hidden % TILE)).view(count, -(-hidden // TILE), TILE)
    amax = tiles.abs().amax(-1).clamp(min=SMALLEST)
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)  # amax / 448 = mantissa * 2 ** exponent, mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).int()
    codes = torch.ldexp(tiles, -exponent.unsqueeze(-1)).to(torch.float8_e4m3fn).view(count, tiles.shape[1] * TILE)
    return torch.cat([codes.view(torch.uint8), (exponent + 127).to(torch.uint8)], dim=1)


def unpack_fp8(packed: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `pack_fp8` but for the rounding: rows [n, hidden] of `dtype`."""
    tiles = -(-hidden // TILE)
    codes = packed[:, :tiles * TILE].contiguous().view(torch.float8_e4m3fn).float().view(-1, tiles, TILE)
    exponent = packed[:, tiles * TILE:].int() - 127
    return torch.ldexp(codes, exponent.unsqueeze(-1)).view(-1, tiles * TILE)[:, :hidden].to(dtype)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows [n, hidden] in one wire format; the gradient goes back in the other."""

    @staticmethod
    def forward(ctx, rows, receive_sizes, send_sizes, group, fp8):
        ctx.route = (send_sizes, receive_sizes, group, not fp8)
        return _send(rows, receive_sizes, send_sizes, group, fp8)

    @staticmethod
    def backward(ctx, gradient):
        return _send(gradient, *ctx.route), None, None, None, None


def _send(rows: torch.Tensor, receive_sizes: list[int], send_sizes: list[int], group, fp8: bool) -> torch.Tensor:
    wire = pack_fp8(rows) if fp8 else rows.to(torch.bfloat16).contiguous()
    received = wire.new_empty(sum(receive_sizes), wire.shape[1])
    dist.all_to_all_single(received, wire, receive_sizes, send_sizes, group=group)
    return unpack_fp8(received, rows.shape[1], rows.dtype) if fp8 else received.to(rows.dtype)


class Fp8DispatchExperts(EpDispatchExpertsParallel):
    """Overrides the two methods of transformers that send: tokens out, expert outputs back."""

    def _dispatch_tokens(self, hidden_states, top_k_index, num_local_experts, ep_group, ep_size):
        """Override of `EpDispatchExpertsParallel._dispatch_tokens`: its order and sizes, tokens in FP8."""
        device, expert_ids = hidden_states.device, top_k_index.reshape(-1)
        order = torch.argsort(expert_ids)
        counts = torch.bincount(expert_ids, minlength=num_local_experts * ep_size).view(ep_size, num_local_experts)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=ep_group)
        send_sizes, receive_sizes = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()
        tokens = _Exchange.apply(hidden_states[order // top_k_index.size(-1)], receive_sizes, send_sizes, ep_group,
                                 True)
        local_ids = torch.arange(num_local_experts, device=device).repeat(ep_size)
        return tokens, local_ids.repeat_interleave(arriving.reshape(-1)), order, send_sizes, receive_sizes

    def _combine_tokens(self, expert_output, top_k_weights, order, send_sizes, recv_sizes, ep_group):
        """Override of `EpDispatchExpertsParallel._combine_tokens`: outputs in BF16, summed in their own dtype."""
        returned = _Exchange.apply(expert_output, send_sizes, recv_sizes, ep_group, False)
        outputs = torch.empty_like(returned)
        outputs[order] = returned
        outputs = outputs.view(*top_k_weights.shape, expert_output.size(-1))
        return (outputs * top_k_weights.unsqueeze(-1)).sum(dim=1)


ALL_PARALLEL_STYLES.register(FP8, Fp8DispatchExperts())
