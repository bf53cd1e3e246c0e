"""Log-probabilities of given tokens and the entropy, straight from hidden states, without [tokens, vocab] logits.

Everything from the logits on is FP32, whatever the model's dtype: logits rounded to BF16 move log-probs by 1e-2.
Logits exist for CHUNK tokens at a time and are computed again in the backward pass, so memory grows with the tokens and
not with tokens x vocabulary. TRL has the same head for GPUs (`trl.trainer.utils.add_fused_lm_head`); without one it
scores ignored positions too, and in tiles of 4096 tokens, which on a CPU costs several times the matrix products.
"""

from __future__ import annotations

import functools
import types

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

CHUNK = 256  # tokens whose logits exist at a time
IGNORE = -100
# config keys of models whose logits are more than the head's product
CHANGE_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def linear_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of `targets` under softmax(hidden @ weight.T / temperature), entropies, and whether each is the mode.

    hidden: [tokens, width]; weight: [vocab, width]; targets: int64 [tokens]. Returns float32 [tokens], float32
    [tokens] and bool [tokens]. Gradients flow through the first two, accumulated in FP32.
    """
    return _LinearLogprobs.apply(hidden, weight, targets, temperature)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.set_materialize_grads(False)  # entropy is mostly logged only
        head = weight.float().t()
        logprobs, normalizers, entropies = hidden.new_empty((3, len(hidden)), dtype=torch.float32).unbind()
        is_mode = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        buffers = _buffers(hidden, weight, 2)
        for rows in _chunks(len(hidden)):
            logits, powers = (buffer[:rows.stop - rows.start] for buffer in buffers)
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
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(is_mode)
        return logprobs, entropies, is_mode

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies, _grad_is_mode):
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        head = weight.float()
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        (buffer,) = _buffers(hidden, weight, 1)
        for rows in _chunks(len(hidden)):
            states, grad = hidden[rows].float(), buffer[:rows.stop - rows.start]
            torch.mm(states, head.t(), out=grad).div_(ctx.temperature).sub_(normalizers[rows, None])
            if grad_entropies is None:
                # d logprob(target) / d logit = 1[target] - p
                grad.exp_().mul_(-grad_logprobs[rows, None])
            else:
                # d entropy / d logit = -p (log p + entropy)
                slope = (grad + entropies[rows, None]).mul_(-grad_entropies[rows, None])
                grad.exp_().mul_(slope if grad_logprobs is None else slope.sub_(grad_logprobs[rows, None]))
            if grad_logprobs is not None:
                grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            grad.div_(ctx.temperature)
            grad_hidden[rows] = grad @ head
            if grad_head is not None:
                grad_head.addmm_(grad.t(), states)
        return grad_hidden, None if grad_head is None else grad_head.to(weight.dtype), None, None


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]


def _buffers(hidden: torch.Tensor, weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Room for the logits of a chunk, taken once: fresh memory for each would cost more than the arithmetic on it."""
    return [hidden.new_empty(min(len(hidden), CHUNK), len(weight), dtype=torch.float32) for _ in range(count)]


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
