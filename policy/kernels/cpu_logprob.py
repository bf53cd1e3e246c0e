"""The log-probability head on a CPU: plain torch on a chunk of tokens at a time, from the logits on in FP32.

Where all logits take at most KEPT_BYTES they are kept: the forward pass leaves them as log-probs, the backward pass
turns them into gradients in place. Beyond that they are computed again. Everything else of a chunk's size is taken once
for all chunks: fresh memory for each would cost more than the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

KEPT_BYTES = 32 << 20
CHUNK, KEPT_CHUNK = 256, 512  # tokens worked on at a time where logits are computed again, and where they are kept


def room_to_keep(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """FP32 [tokens, vocab] for all log-probs, or None where they would take more than KEPT_BYTES."""
    if 4 * len(hidden) * len(weight) > KEPT_BYTES:
        return None
    return hidden.new_empty((len(hidden), len(weight)), dtype=torch.float32)


def statistics(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float,
               kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of `targets`, logsumexps and entropies, FP32 [tokens], and whether each target is the mode.

    `kept` [tokens, vocab], where given, holds all log-probs afterwards.
    """
    head = weight.float().t()
    logprobs, normalizers, entropies = hidden.new_empty((3, len(hidden)), dtype=torch.float32).unbind()
    is_mode = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    for rows, logits, powers in _chunks(hidden, weight, kept):
        torch.mm(hidden[rows].float() / temperature, head, out=logits)
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, targets[rows, None])
        is_mode[rows] = (chosen == top)[:, 0]
        torch.exp(logits.sub_(top), out=powers)
        total = powers.sum(-1, keepdim=True)
        log_total = total.log()
        entropies[rows] = (log_total - powers.mul_(logits).sum(-1, keepdim=True) / total)[:, 0]
        normalizers[rows] = (top + log_total)[:, 0]
        logprobs[rows] = (chosen - top - log_total)[:, 0]
        if kept is not None:
            logits.sub_(log_total)
    return logprobs, normalizers, entropies, is_mode


def logit_gradients(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, normalizers: torch.Tensor,
                    entropies: torch.Tensor, d_logprobs: torch.Tensor | None, d_entropies: torch.Tensor | None,
                    temperature: float, kept: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and gradient [rows, vocab] of hidden @ weight.T, computed in FP32 and given in hidden's dtype, by chunks.

    `normalizers`, `entropies` and `kept` are those of `statistics`; `kept` is used up. A gradient from above that is
    None counts as zeros. What is yielded holds until the next is asked for.
    """
    head = weight.float().t() if kept is None else None
    d_chosen, d_entropy = (None if d is None else (d / temperature)[:, None] for d in (d_logprobs, d_entropies))
    for rows, grad, slope in _chunks(hidden, weight, kept):
        if kept is None:
            torch.mm(hidden[rows].float() / temperature, head, out=grad).sub_(normalizers[rows, None])
        if d_entropy is None:
            # d logprob(target) / d logit = 1[target] - p
            grad.exp_().mul_(-d_chosen[rows])
        else:
            # d entropy / d logit = -p (log p + entropy)
            torch.mul(grad, -d_entropy[rows], out=slope)
            constant = d_entropy[rows] * entropies[rows, None]
            slope.sub_(constant if d_chosen is None else constant + d_chosen[rows])
            grad.exp_().mul_(slope)
        if d_chosen is not None:
            grad.scatter_add_(1, targets[rows, None], d_chosen[rows])
        if hidden.dtype != torch.float32:
            grad = slope.view(hidden.dtype).flatten()[:grad.numel()].view_as(grad).copy_(grad)
        yield rows, grad


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None
            ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows and two FP32 [rows, vocab] to work in, the first of them `kept`'s where that is given."""
    size = CHUNK if kept is None else KEPT_CHUNK
    room = hidden.new_empty((2 if kept is None else 1, min(size, len(hidden)), len(weight)), dtype=torch.float32)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        part = room[:, :rows.stop - start]
        yield rows, part[1] if kept is None else kept[rows], part[0]
