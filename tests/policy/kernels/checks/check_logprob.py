"""The Triton log-probability head against FP64 logits and autograd."""

import pytest
import torch

from policy.kernels import triton_logprob
from policy.kernels.logprob import linear_logprobs


def operands(dtype, generator, device, n=37, vocab=1300, width=80):
    hidden, weight = (torch.randn(rows, width, generator=generator).to(dtype).to(device) for rows in (n, vocab))
    targets = torch.randint(vocab, (n,), generator=generator).to(device)
    return hidden, weight, targets


def exact(hidden, weight, targets, temperature):
    logps = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1), logps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_entropies_are_those_of_fp32_logits(dtype, generator, device):
    hidden, weight, targets = operands(dtype, generator, device)
    logps = exact(hidden, weight, targets, 0.7)[2]
    targets[:5] = logps[:5].argmax(-1)
    logprobs, normalizers, entropies, is_mode = triton_logprob.statistics(hidden, weight, targets, 0.7)
    right, entropy, logps = exact(hidden, weight, targets, 0.7)
    logits = hidden.double() @ weight.double().T / 0.7
    assert (logprobs - right).abs().max() < 3e-5 and (entropies - entropy).abs().max() < 3e-5
    assert (normalizers - logits.logsumexp(-1)).abs().max() < 3e-5
    assert torch.equal(is_mode, logps.argmax(-1) == targets) and is_mode[:5].all()


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
def test_gradients_of_logits_are_autograd_s(kinds, generator, device):
    hidden, weight, targets = operands(torch.float32, generator, device, vocab=300)
    _, normalizers, entropies, _ = triton_logprob.statistics(hidden, weight, targets, 1.3)
    d_logprobs, d_entropies = (torch.randn(37, generator=generator).to(device) if kind else None for kind in kinds)
    got = triton_logprob.logit_gradient(hidden, weight, targets, normalizers, entropies, d_logprobs, d_entropies, 1.3)
    logits = (hidden.double() @ weight.double().T).requires_grad_()
    logps = (logits / 1.3).log_softmax(-1)
    loss = sum((value * upstream).sum() for value, upstream in (
        (logps.gather(1, targets[:, None])[:, 0], d_logprobs), (-(logps.exp() * logps).sum(-1), d_entropies))
        if upstream is not None)
    right, = torch.autograd.grad(loss, logits)
    assert (got - right).norm() < 1e-5 * right.norm()


def test_outputs_are_wholly_written_and_nothing_beside_operands_and_outputs_is_touched(generator, device, monkeypatch):
    hidden, weight, targets = operands(torch.float32, generator, device, n=5, vocab=131)
    hidden, weight = (torch.cat([value, torch.full_like(value[:2], torch.nan)])[:-2] for value in (hidden, weight))
    buffers, empty = [], torch.empty

    def poisoned(*shape, **kind):
        count = torch.Size(shape).numel()
        buffers.append(empty(count + 64, **kind).fill_(torch.nan))
        return buffers[-1][:count].view(shape)

    monkeypatch.setattr(triton_logprob.torch, "empty", poisoned)
    logprobs, normalizers, entropies, _ = triton_logprob.statistics(hidden, weight, targets, 1.0)
    grad = triton_logprob.logit_gradient(hidden, weight, targets, normalizers, entropies, logprobs, None, 1.0)
    monkeypatch.undo()
    assert all(value.isfinite().all() for value in (logprobs, normalizers, entropies, grad))
    assert len(buffers) == 2 and all(buffer[-64:].isnan().all() for buffer in buffers)


def test_the_head_trains_through_the_kernels(generator, device):
    hidden, weight, targets = operands(torch.float32, generator, device, n=9, vocab=140)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropies, _ = linear_logprobs(hidden, weight, targets, 0.7)
    found = torch.autograd.grad(logprobs.sum() + 0.3 * entropies.sum(), (hidden, weight))
    right, entropy, _ = exact(hidden, weight, targets, 0.7)
    for mine, theirs in zip(found, torch.autograd.grad(right.sum() + 0.3 * entropy.sum(), (hidden, weight)),
                            strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
