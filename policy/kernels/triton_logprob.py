"""Triton sources of the log-probability head, for Hopper. Not run on a GPU yet; tests run them in Triton's interpreter.

Logits are FP32 and exist only as a program's tile in registers: forward keeps a few figures a token of each piece of
the vocabulary (the online softmax of Milakov and Gimelshein, arXiv 1805.02867), backward computes a tile again and
writes its gradient. TRL's kernels (`trl.kernels.chunked_logprob`) round the logits to the model's type in between,
which moves log-probs by 1e-2 in BF16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
VOCAB_TILES = 8  # tiles of the vocabulary a program goes through
LOWEST = tl.constexpr(-1e30)  # below any logit, yet 0 * LOWEST is 0


@triton.jit
def _logits(hidden, weight, row, col, n, vocab, width, temperature, BLOCK_K: tl.constexpr):
    """FP32 logits [rows, columns], LOWEST past the vocabulary."""
    step = tl.arange(0, BLOCK_K)
    hidden_pointers = hidden + row.to(tl.int64)[:, None] * width + step[None, :]
    weight_pointers = weight + col.to(tl.int64)[None, :] * width + step[:, None]
    acc = tl.zeros((row.shape[0], col.shape[0]), dtype=tl.float32)
    for i in range(0, tl.cdiv(width, BLOCK_K)):
        mask = step < width - i * BLOCK_K
        h = tl.load(hidden_pointers + i * BLOCK_K, mask=(row < n)[:, None] & mask[None, :], other=0.0)
        w = tl.load(weight_pointers + i * BLOCK_K, mask=(col < vocab)[None, :] & mask[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    return tl.where((col < vocab)[None, :], acc / temperature, LOWEST)


@triton.jit
def statistics_kernel(hidden, weight, targets, tops, sums, moments, chosen, n, vocab, width, temperature,
                      TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: BLOCK_M tokens and TILES x BLOCK_N of the vocabulary; writes row program_id(1) of each [pieces, n].

    Of the logits z of its piece: their maximum, sum e^(z - max), sum e^(z - max) (z - max), and the target's or 0.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + row, mask=row < n, other=-1)
    top = tl.zeros((BLOCK_M,), dtype=tl.float32) + LOWEST
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mine = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in range(TILES):
        col = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        z = _logits(hidden, weight, row, col, n, vocab, width, temperature, BLOCK_K)
        mine += tl.sum(tl.where(col[None, :] == target[:, None], z, 0.0), axis=1)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        z -= new_top[:, None]
        power = tl.exp(z)
        rescale = tl.exp(top - new_top)
        moment = (moment + total * (top - new_top)) * rescale + tl.sum(power * z, axis=1)
        total = total * rescale + tl.sum(power, axis=1)
        top = new_top
    at = tl.program_id(1).to(tl.int64) * n + row
    tl.store(tops + at, top, mask=row < n)
    tl.store(sums + at, total, mask=row < n)
    tl.store(moments + at, moment, mask=row < n)
    tl.store(chosen + at, mine, mask=row < n)


@triton.jit
def gradient_kernel(hidden, weight, targets, normalizers, entropies, d_logprobs, d_entropies, out, n, vocab, width,
                    temperature, LOGPROBS: tl.constexpr, ENTROPIES: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program: a tile of the gradient of hidden @ weight.T. LOGPROBS, ENTROPIES: which gradients come from above."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    log_p = _logits(hidden, weight, row, col, n, vocab, width, temperature, BLOCK_K)
    log_p -= tl.load(normalizers + row, mask=live, other=0.0)[:, None]
    p = tl.exp(log_p)
    grad = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if LOGPROBS:  # d logprob(target) / d logit = 1[target] - p
        target = tl.load(targets + row, mask=live, other=-1)
        upstream = tl.load(d_logprobs + row, mask=live, other=0.0)[:, None]
        grad += upstream * (tl.where(col[None, :] == target[:, None], 1.0, 0.0) - p)
    if ENTROPIES:  # d entropy / d logit = -p (log p + entropy)
        entropy = tl.load(entropies + row, mask=live, other=0.0)[:, None]
        grad -= tl.load(d_entropies + row, mask=live, other=0.0)[:, None] * p * (log_p + entropy)
    tl.store(out + row.to(tl.int64)[:, None] * vocab + col[None, :], (grad / temperature).to(out.dtype.element_ty),
             mask=live[:, None] & (col < vocab)[None, :])


def statistics(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of `targets`, logsumexps and entropies, FP32 [n], and whether each target is the mode, bool [n].

    hidden [n, width] and weight [vocab, width] of one type; targets int64 [n].
    """
    (n, width), vocab = hidden.shape, len(weight)
    pieces = triton.cdiv(vocab, TILE["BLOCK_N"] * VOCAB_TILES)
    tops, sums, moments, chosen = torch.empty(4, pieces, n, device=hidden.device).unbind()
    if n:
        statistics_kernel[(triton.cdiv(n, TILE["BLOCK_M"]), pieces)](
            hidden.contiguous(), weight.contiguous(), targets, tops, sums, moments, chosen, n, vocab, width,
            temperature, TILES=VOCAB_TILES, **TILE)
    top = tops.amax(0)
    shift = tops - top
    total = (sums * shift.exp()).sum(0)
    moment = ((moments + sums * shift) * shift.exp()).sum(0)
    log_total, target = total.log(), chosen.sum(0)
    return target - top - log_total, top + log_total, log_total - moment / total, target == top


def logit_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, normalizers: Tensor, entropies: Tensor,
                   d_logprobs: Tensor | None, d_entropies: Tensor | None, temperature: float) -> Tensor:
    """The gradient [n, vocab] of hidden @ weight.T in hidden's type; give it a chunk of the tokens at a time.

    `normalizers` and `entropies` are those of `statistics`; a gradient from above that is None counts as zeros.
    """
    (n, width), vocab = hidden.shape, len(weight)
    out = torch.empty(n, vocab, dtype=hidden.dtype, device=hidden.device)
    if n:
        gradient_kernel[(triton.cdiv(n, TILE["BLOCK_M"]), triton.cdiv(vocab, TILE["BLOCK_N"]))](
            hidden.contiguous(), weight.contiguous(), targets, normalizers, entropies,
            None if d_logprobs is None else d_logprobs.contiguous(),
            None if d_entropies is None else d_entropies.contiguous(), out, n, vocab, width, temperature,
            LOGPROBS=d_logprobs is not None, ENTROPIES=d_entropies is not None, **TILE)
    return out
