"""Rows to their experts and back (DeepSeek-V3, section 2.1.2): sort the choices by expert, weigh and add what returns.

A token with `top_k` experts has `top_k` choices; choice c is token c // top_k. Sorted by expert they are the rows of
`grouped_gemm.py`. No token is dropped. The way back reads each token's rows by their positions, so it needs no atomic
addition and its sum has one order: the same bits each time. The gather of `permute` is torch's own; where rows are
quantised anyway, `quantize_dual(x, rows=...)` gathers them in the same pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy.kernels import runs_triton


class Order(NamedTuple):
    """How choices are sorted by expert: int64 `choices` [s], the choice of each row; int64 `positions`
    [tokens, top_k], the row of each choice; int32 `offsets` [experts], the end row of each expert."""

    choices: Tensor
    positions: Tensor
    offsets: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each row, int64 [s]."""
        return self.choices // self.positions.shape[1]


def sort_by_expert(experts_of: Tensor, experts: int) -> Order:
    """Sort the choices `experts_of` [tokens, top_k], in their order within an expert.

    Ids of `experts` and above (other ranks' experts) come last, past the last offset, and take part in nothing.
    """
    by_expert, choices = torch.sort(experts_of.flatten(), stable=True)
    positions = torch.empty_like(choices)
    positions[choices] = torch.arange(len(choices), device=choices.device)
    ids = torch.arange(experts, device=choices.device, dtype=by_expert.dtype)
    offsets = torch.searchsorted(by_expert, ids, right=True, out_int32=True)
    return Order(choices, positions.view(experts_of.shape), offsets)


def permute(x: Tensor, order: Order) -> Tensor:
    """The rows [s, hidden] of tokens x [tokens, hidden], sorted by expert. Differentiable."""
    if runs_triton(x):
        return _Permute.apply(x, order)
    return x[order.tokens]


def unpermute(rows: Tensor, weights: Tensor, order: Order) -> Tensor:
    """Each token's rows [s, hidden] times `weights` FP32 [tokens, top_k], added in FP32: [tokens, hidden].

    Rows past the last offset are not read; they count as zeros. Differentiable in `rows` and `weights`.
    """
    if runs_triton(rows):
        return _Unpermute.apply(rows, weights, order)
    wide = torch.promote_types(rows.dtype, torch.float32)
    live = order.positions < order.offsets[-1]
    mine = torch.where(live[..., None], rows[order.positions], 0).to(wide)
    return (mine * weights[..., None]).sum(1).to(rows.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return x.index_select(0, order.tokens)

    @staticmethod
    def backward(ctx, d_rows: Tensor) -> tuple[Tensor, None]:
        from policy.kernels import triton_permute
        return triton_permute.unpermute(d_rows, None, ctx.order), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, order: Order) -> Tensor:
        from policy.kernels import triton_permute
        ctx.save_for_backward(rows, weights)
        ctx.order = order
        return triton_permute.unpermute(rows, weights, order)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        from policy.kernels import triton_permute
        return *triton_permute.unpermute_backward(d_out, *ctx.saved_tensors, ctx.order), None
