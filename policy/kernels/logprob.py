"""Log-probabilities of given tokens and the entropy, straight from hidden states, without [tokens, vocab] logits.

Everything from the logits on is FP32, whatever the model's dtype: logits rounded to BF16 move log-probs by 1e-2.
Logits exist for a chunk of tokens at a time and are computed again in the backward pass, so memory does not grow with
tokens x vocabulary. TRL's head (`trl.trainer.utils.add_fused_lm_head`) rounds logits to the model's dtype, and on a CPU
it scores ignored positions too, in tiles of 4096 tokens that leave the cache.
"""

from __future__ import annotations

import functools
import sys
import types

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from policy.kernels import runs_triton

CPU_CHUNK, GPU_CHUNK = 256, 4096  # tokens whose logits exist at a time
IGNORE = -100
# config keys of models whose logits are more than the head's product
CHANGE_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def linear_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of `targets` under softmax(hidden @ weight.T / temperature), entropies, and whether each is the mode.

    hidden: [tokens, width]; weight: [vocab, width]; targets: int64 [tokens]. Returns float32 [tokens], float32
    [tokens] and bool [tokens]. Gradients flow through the first two: those of logits are computed in FP32 and rounded
    to the model's dtype for the last two products, that of `weight` is summed over chunks in FP32.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.set_materialize_grads(False)  # entropy is mostly logged only
        logprobs, normalizers, entropies, is_mode = _implementation(hidden).statistics(
            hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(is_mode)
        return logprobs, entropies, is_mode

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies, _grad_is_mode):
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        logit_gradient, grad_hidden = _implementation(hidden).logit_gradient, torch.empty_like(hidden)
        head = weight if runs_triton(hidden) else weight.float()  # once, not for every chunk
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden):
            upstream = (None if grad is None else grad[rows] for grad in (grad_logprobs, grad_entropies))
            grad = logit_gradient(hidden[rows], head, targets[rows], normalizers[rows], entropies[rows], *upstream,
                                  ctx.temperature)
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _implementation(hidden: torch.Tensor) -> types.ModuleType:
    """Where `statistics` and `logit_gradient` come from."""
    if runs_triton(hidden):
        from policy.kernels import triton_logprob

        return triton_logprob
    return sys.modules[__name__]


def statistics(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of `targets`, logsumexps and entropies, FP32 [tokens], and whether each target is the mode."""
    head = weight.float().t()
    logprobs, normalizers, entropies = hidden.new_empty((3, len(hidden)), dtype=torch.float32).unbind()
    is_mode = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
    # room for a chunk, taken once: fresh memory for each would cost more than the arithmetic on it
    buffers = hidden.new_empty((2, min(len(hidden), CPU_CHUNK), len(weight)), dtype=torch.float32)
    for rows in _chunks(hidden):
        logits, powers = buffers[:, :rows.stop - rows.start]
        torch.mm(hidden[rows].float(), head, out=logits).div_(temperature)
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, targets[rows, None])
        is_mode[rows] = (chosen == top)[:, 0]
        torch.exp(logits.sub_(top), out=powers)
        total = powers.sum(-1, keepdim=True)
        log_total = total.log()
        entropies[rows] = (log_total - powers.mul_(logits).sum(-1, keepdim=True) / total)[:, 0]
        normalizers[rows] = (top + log_total)[:, 0]
        logprobs[rows] = (chosen - top - log_total)[:, 0]
    return logprobs, normalizers, entropies, is_mode


def logit_gradient(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, normalizers: torch.Tensor,
                   entropies: torch.Tensor, d_logprobs: torch.Tensor | None, d_entropies: torch.Tensor | None,
                   temperature: float) -> torch.Tensor:
    """The gradient [tokens, vocab] of hidden @ weight.T, computed in FP32 and returned in hidden's dtype.

    `normalizers` and `entropies` are those of `statistics`; a gradient from above that is None counts as zeros.
    """
    grad = (hidden.float() @ weight.float().t()).div_(temperature).sub_(normalizers[:, None])
    if d_entropies is None:
        # d logprob(target) / d logit = 1[target] - p
        grad.exp_().mul_(-d_logprobs[:, None])
    else:
        # d entropy / d logit = -p (log p + entropy)
        slope = (grad + entropies[:, None]).mul_(-d_entropies[:, None])
        grad.exp_().mul_(slope if d_logprobs is None else slope.sub_(d_logprobs[:, None]))
    if d_logprobs is not None:
        grad.scatter_add_(1, targets[:, None], d_logprobs[:, None])
    return grad.div_(temperature).to(hidden.dtype)


def _chunks(hidden: torch.Tensor) -> list[slice]:
    size = GPU_CHUNK if hidden.is_cuda else CPU_CHUNK
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def add_logprob_head(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` return TRL's `FusedCausalLMOutput` computed here.

    Takes the place of what `trl.trainer.utils.add_fused_lm_head` put there, which stays for models that change logits
    behind the head (soft cap, scale, bias). labels: [batch, tokens], IGNORE where no log-prob is wanted.
    """
    config = model.config.get_text_config()
    if (any(getattr(config, key, None) is not None for key in CHANGE_LOGITS)
            or getattr(model.get_output_embeddings(), "bias", None) is not None):
        return
    plain_forward = types.MethodType(type(model).forward, model)

    # the signature of the class: `generate` validates its arguments against it
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return plain_forward(*args, **kwargs) if labels is None else plain_forward(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        mask = wanted != IGNORE
        weight = self.get_output_embeddings().weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()  # FSDP2 shards it
        outputs = linear_logprobs(hidden[mask], weight, wanted[mask], temperature)
        # masked_scatter keeps the graph even where no label is wanted
        logprobs, entropy, is_mode = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in outputs)
        return FusedCausalLMOutput(log_probs=logprobs, entropy=entropy, is_top1=is_mode, label_mask=mask)

    model.forward = types.MethodType(forward, model)
