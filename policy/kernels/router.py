"""Which experts a token goes to, and how much each counts: sigmoid, bias, groups, top-k, normalised weights.

DeepSeek-V3 (arXiv 2412.19437) section 2.1.2: the choice is by score plus balance bias, among the groups whose two
best experts score highest; the weights are made of the scores alone. All in FP32: a bias rounded to BF16 already
changes the experts of some tokens. A replay gives the choice from outside, so that a policy is trained through the
experts its rollout went through; the weights are then those of the current scores.

CUDA tensors take the Triton kernel (not run on a GPU yet), all others the torch operators below.
"""

from __future__ import annotations

import torch

from policy.kernels import runs_triton


def route(logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int, top_k: int, scale: float,
          norm: bool, replay: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of each token: (indices int64 [tokens, top_k], weights float32 [tokens, top_k]).

    logits: float32 [tokens, experts]; bias: float32 [experts]; `norm` makes a token's weights sum to `scale`.
    replay: int64 [tokens, top_k], the experts to take; a row that begins with -1 chooses for itself.
    Weights are differentiable in `logits`. Raises TypeError for logits or a bias that are not float32, ValueError
    for a replay of another shape.
    """
    if logits.dtype != torch.float32 or bias.dtype != torch.float32:
        raise TypeError(f"route: logits and bias must be float32 (got {logits.dtype} and {bias.dtype})")
    if replay is not None and replay.shape != (logits.shape[0], top_k):
        raise ValueError(f"route: replay must be [{logits.shape[0]}, {top_k}], a row for each token of this pass "
                         f"(got {list(replay.shape)})")
    if runs_triton(logits):
        return _Fused.apply(logits, bias, n_group, topk_group, top_k, scale, norm, replay)
    indices = choose(logits, bias, n_group, topk_group, top_k)
    if replay is not None:
        indices = torch.where(replay[:, :1] < 0, indices, replay)
    return indices, expert_weights(logits, indices, scale, norm)


@torch.no_grad()
def choose(logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
    """The experts a token would choose by itself, int64 [tokens, top_k]; the order says nothing."""
    biased = logits.sigmoid() + bias
    grouped = biased.view(-1, n_group, biased.shape[1] // n_group)
    best_groups = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1, sorted=False).indices
    closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best_groups, False)
    open_only = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
    return open_only.topk(top_k, dim=-1, sorted=False).indices


def expert_weights(logits: torch.Tensor, indices: torch.Tensor, scale: float, norm: bool) -> torch.Tensor:
    """Weights float32 [tokens, top_k] of the chosen experts, from their scores alone."""
    weights = logits.gather(1, indices).sigmoid()
    if norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


class _Fused(torch.autograd.Function):
    """The Triton kernel forward; backward through `expert_weights`, recomputed from the logits."""

    @staticmethod
    def forward(context, logits, bias, n_group, topk_group, top_k, scale, norm, replay):
        from policy.kernels.triton_router import launch

        indices, weights = launch(logits, bias, n_group, topk_group, top_k, scale, norm, replay)
        context.save_for_backward(logits, indices)
        context.scale, context.norm = scale, norm
        context.mark_non_differentiable(indices)
        return indices, weights

    @staticmethod
    def backward(context, _, gradient):
        logits, indices = context.saved_tensors
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            weights = expert_weights(logits, indices, context.scale, context.norm)
        return torch.autograd.grad(weights, logits, gradient)[0], None, None, None, None, None, None, None
