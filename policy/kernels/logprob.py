"""Log-probabilities of given tokens and the entropy, straight from hidden states, without autograd's copies of logits.

Everything from the logits on is FP32, whatever the model's dtype: logits rounded to BF16 move log-probs by 1e-2.
Logits exist for a chunk of tokens at a time and are computed again in the backward pass, so memory does not grow with
tokens x vocabulary; on a CPU the backward pass takes over those of a few MiB. TRL's head
(`trl.trainer.utils.add_fused_lm_head`) rounds logits to the model's dtype, and on a CPU it scores ignored positions
too, in tiles of 4096 tokens that leave the cache.
"""

from __future__ import annotations

import functools
import types

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from policy.kernels import cpu_logprob, runs_triton

GPU_CHUNK = 4096  # tokens whose gradients of logits exist at a time
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
    return _LinearLogprobs.apply(hidden, weight, targets, temperature, torch.is_grad_enabled())


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, trains):
        ctx.set_materialize_grads(False)  # entropy is mostly logged only
        ctx.temperature, ctx.kept = temperature, None
        if runs_triton(hidden):
            from policy.kernels import triton_logprob

            found = triton_logprob.statistics(hidden, weight, targets, temperature)
        else:
            ctx.kept = cpu_logprob.room_to_keep(hidden, weight) if trains else None
            found = cpu_logprob.statistics(hidden, weight, targets, temperature, ctx.kept)
        logprobs, normalizers, entropies, is_mode = found
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.mark_non_differentiable(is_mode)
        return logprobs, entropies, is_mode

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies, _grad_is_mode):
        hidden, weight, *_ = ctx.saved_tensors
        known = (*ctx.saved_tensors, grad_logprobs, grad_entropies, ctx.temperature)
        # used up by gradients in their place: a second pass through a retained graph computes logits again
        kept, ctx.kept = ctx.kept, None
        gradients = _triton_gradients(*known) if runs_triton(hidden) else cpu_logprob.logit_gradients(*known, kept)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows, grad in gradients:
            grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _triton_gradients(hidden, weight, *each_token_and_temperature):
    """What `cpu_logprob.logit_gradients` yields."""
    from policy.kernels import triton_logprob

    *each_token, temperature = each_token_and_temperature
    for start in range(0, len(hidden), GPU_CHUNK):
        rows = slice(start, min(start + GPU_CHUNK, len(hidden)))
        upstream = (None if value is None else value[rows] for value in each_token)
        yield rows, triton_logprob.logit_gradient(hidden[rows], weight, *upstream, temperature)


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
