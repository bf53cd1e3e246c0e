"""Expert load: what the routers chose, the balance bias update and the sequence-wise balance loss.

DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; the bias rule is that of auxiliary-loss-free balancing
(arXiv 2408.15664). The bias is a buffer: it is moved by `update_bias`, never by gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RouterProbe:
    """Watches every router of a policy during forward passes.

    `loads` [routers, experts] counts the tokens sent to each expert since `reset`, padding left out, `tokens`
    [routers] those that came; `logits` holds the router logits [tokens, experts] of the last forward pass, for the
    balance loss. Routers stand in layer order, those of MTP modules last.
    """

    def __init__(self, model: PreTrainedModel):
        self.routers: list[nn.Module] = [module for module in model.modules()
                                         if hasattr(module, "e_score_correction_bias")]
        self.token_mask: torch.Tensor | None = None  # [batch, tokens] bool; set before each forward pass
        self.logits: list[tuple[nn.Module, torch.Tensor]] = []
        self.reset()
        for index, router in enumerate(self.routers):
            router.register_forward_hook(self._watch(index))

    def reset(self) -> None:
        experts = self.routers[0].num_experts if self.routers else 0
        self.loads = torch.zeros(len(self.routers), experts, dtype=torch.int64)
        self.tokens = torch.zeros(len(self.routers), dtype=torch.int64)

    def begin(self, token_mask: torch.Tensor) -> None:
        """Start a forward pass over tokens [batch, tokens]; False marks padding."""
        self.token_mask, self.logits = token_mask, []

    def _watch(self, index: int):
        def hook(router: nn.Module, _inputs, output) -> None:
            if not torch.is_grad_enabled() or self.token_mask is None:
                return
            logits, _, chosen = output
            mask = self._mask_for(chosen.shape[0])
            # an expert number out of range reaches no expert, and then counts as dropped
            sent = chosen[mask].flatten()
            sent = sent[(sent >= 0) & (sent < router.num_experts)]
            self.loads[index] += torch.bincount(sent, minlength=router.num_experts).cpu()
            self.tokens[index] += int(mask.sum())
            self.logits.append((router, logits))

        return hook

    def _mask_for(self, tokens: int) -> torch.Tensor:
        """The mask over flattened tokens; MTP module k sees every row without its last k tokens."""
        mask = self.token_mask
        return mask[:, :tokens // mask.shape[0]].reshape(-1)

    def balance_loss(self, position_ids: torch.Tensor, batch_tokens: int) -> torch.Tensor:
        """Sequence-wise balance loss of the last forward pass, without alpha (equations 17 to 20).

        position_ids: [batch, tokens], restarting at each packed sample, so each sample is one sequence.
        Sequences weigh by their length over `batch_tokens`, the tokens of the whole optimizer step, so that
        micro-batches add up to the same value however the step is cut.
        """
        total = torch.zeros((), device=position_ids.device)
        for router, logits in self.logits:
            positions = position_ids[:, :logits.shape[0] // position_ids.shape[0]]
            mask = self._mask_for(logits.shape[0])
            segments = (positions == 0).reshape(-1).cumsum(0) - 1
            segments, kept = segments[mask], logits[mask]
            if not len(kept):
                continue
            scores = kept.sigmoid()
            chosen = torch.zeros_like(scores).scatter_(1, scores.topk(router.top_k, dim=-1).indices, 1.0)
            affinity = scores / scores.sum(-1, keepdim=True)
            count = int(segments.max()) + 1
            shape = (count, router.num_experts)
            lengths = torch.bincount(segments, minlength=count).clamp(min=1).unsqueeze(1)
            frequency = chosen.new_zeros(shape).index_add_(0, segments, chosen) * router.num_experts / router.top_k
            probability = affinity.new_zeros(shape).index_add_(0, segments, affinity)
            per_sequence = (frequency / lengths * probability / lengths).sum(-1)
            total = total + (per_sequence * lengths.squeeze(1)).sum() / batch_tokens
        return total

    def sum_over_ranks(self) -> None:
        """Add up `loads` and `tokens` of all processes where torch.distributed runs; call once after each `reset`."""
        if not (distributed.is_initialized() and self.routers):
            return
        both = torch.cat([self.loads, self.tokens.unsqueeze(1)], dim=1)
        on_device = both.to(self.routers[0].weight.device)  # NCCL reduces what lies on the device
        distributed.all_reduce(on_device)
        self.loads, self.tokens = on_device[:, :-1].cpu(), on_device[:, -1].cpu()

    @torch.no_grad()
    def update_bias(self, gamma: float) -> None:
        """One step of `b += gamma * sign(mean load - load)`, over the loads since `reset`."""
        for router, load in zip(self.routers, self.loads, strict=True):
            load = load.float()
            step = gamma * torch.sign(load.mean() - load)
            router.e_score_correction_bias += step.to(router.e_score_correction_bias.device)

    def max_violation(self) -> float:
        """The largest MaxVio = max load / mean load - 1 over routers that saw tokens; 0 when none did."""
        return max_violation(self.loads)

    def dropped(self) -> int:
        """Tokens x top_k less what was sent to experts, over all routers."""
        wanted = sum(int(tokens) * router.top_k for router, tokens in zip(self.routers, self.tokens, strict=True))
        return wanted - int(self.loads.sum())


def max_violation(loads: torch.Tensor) -> float:
    """The largest MaxVio over the rows of loads [routers, experts] that are not all zero; 0 when all are."""
    loads = loads[loads.any(1)].float()
    return float((loads.max(1).values / loads.mean(1) - 1).max()) if len(loads) else 0.0
