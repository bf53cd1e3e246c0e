"""The router's Triton kernel against the torch operators: choice, weights, gradient, replay."""

import pytest
import torch

from policy.kernels import router as operations
from policy.kernels.router import route
from policy.kernels.triton_router import launch

SHAPES = {"V3": (256, 8, 4, 8), "tiny": (16, 4, 2, 2), "two a group": (8, 4, 2, 2), "V2, 160 experts": (160, 8, 3, 6),
          "one group": (64, 1, 1, 6), "nothing a power of two": (21, 7, 3, 5)}


def made(generator, device, tokens, experts):
    logits, bias = torch.randn(tokens, experts, generator=generator), 0.1 * torch.randn(experts, generator=generator)
    return logits.to(device), bias.to(device)


def in_order(indices, weights):
    order = indices.argsort(1)
    return indices.gather(1, order), weights.gather(1, order)


def plain(monkeypatch, *operands):
    with monkeypatch.context() as patch:
        patch.setattr(operations, "runs_triton", lambda x: False)
        return route(*operands)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_experts_are_those_of_the_reference_and_weights_within_rounding(shape, generator, device, monkeypatch):
    experts, *grouping = shape
    logits, bias = made(generator, device, 9, experts)
    for norm in (True, False):
        got, expected = (in_order(*found) for found in (
            route(logits, bias, *grouping, 2.5, norm), plain(monkeypatch, logits, bias, *grouping, 2.5, norm)))
        assert torch.equal(got[0], expected[0]) and got[0].dtype == torch.int64
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [SHAPES["V3"], SHAPES["nothing a power of two"]], ids=["V3", "ragged"])
def test_replayed_experts_and_the_gradient_are_those_of_the_reference(shape, generator, device, monkeypatch):
    experts, *grouping = shape
    top_k = grouping[-1]
    logits, bias = made(generator, device, 6, experts)
    replay = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(6)]).to(device)
    replay[2] = -1
    upstream, found = torch.randn(6, top_k, generator=generator).to(device), []
    for way in (route, lambda *operands: plain(monkeypatch, *operands)):
        leaf = logits.clone().requires_grad_()
        indices, weights = way(leaf, bias, *grouping, 2.5, True, replay)
        slots = indices.argsort(1).argsort(1)  # the same gradient for the same expert, in whatever order they come
        (weights * upstream.gather(1, slots)).sum().backward()
        found.append((indices, weights.detach(), leaf.grad))
    (indices, weights, gradient), (own, own_weights, own_gradient) = found
    assert torch.equal(indices[replay[:, 0] >= 0], replay[replay[:, 0] >= 0])
    assert torch.equal(in_order(indices, weights)[0], in_order(own, own_weights)[0])
    torch.testing.assert_close(in_order(indices, weights)[1], in_order(own, own_weights)[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-5, atol=1e-7)


def test_equal_scores_give_different_experts_of_open_groups(generator, device):
    """Untrained routers tie everywhere; a choice twice would drop a token's expert in silence."""
    for logits in (torch.zeros(2, 256), torch.full((2, 256), -200.0), torch.full((2, 256), 200.0)):
        indices, weights = launch(logits.to(device), torch.zeros(256, device=device), 8, 4, 8, 2.5, True, None)
        for row in indices.tolist():
            assert len(set(row)) == 8 and all(0 <= expert < 256 for expert in row)
        assert weights.isfinite().all()


def test_rows_beside_the_operands_are_neither_read_nor_written(generator, device, monkeypatch):
    logits, bias = made(generator, device, 5, 160)
    canary = torch.full((7, 160), torch.nan, device=device)
    canary[1:6] = logits
    made_empty, kept = torch.empty, []

    def guarded(tokens, top_k, dtype, device):
        """A view of a larger tensor whose rest must keep its marks."""
        whole = made_empty(tokens + 2, top_k, dtype=dtype, device=device).fill_(-7)
        kept.append(whole)
        return whole[1:-1]

    monkeypatch.setattr("policy.kernels.triton_router.torch.empty", guarded)
    indices, weights = launch(canary[1:6], bias, 8, 3, 6, 2.5, True, None)
    monkeypatch.undo()
    assert weights.isfinite().all() and (indices >= 0).all()
    assert all((whole[0] == -7).all() and (whole[-1] == -7).all() for whole in kept) and len(kept) == 2
    assert launch(logits[:0], bias, 8, 3, 6, 2.5, True, None)[0].shape == (0, 6)
