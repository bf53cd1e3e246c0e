"""The Triton way back from the experts, and its gradients, against autograd through plain torch."""

import pytest
import torch

from policy.kernels import permute as operations
from policy.kernels import triton_permute
from policy.kernels.permute import permute, sort_by_expert, unpermute

EXPERTS = 5


def plain(monkeypatch, operation, *operands):
    with monkeypatch.context() as patch:
        patch.setattr(operations, "runs_triton", lambda x: False)
        return operation(*operands)


def choices(generator, device, tokens=13, top_k=3, ids=EXPERTS):
    return torch.stack([torch.randperm(ids, generator=generator)[:top_k] for _ in range(tokens)]).to(device)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("ids", [EXPERTS, EXPERTS + 2], ids=["all here", "some experts elsewhere"])
def test_the_way_there_and_back_and_their_gradients(dtype, error, ids, generator, device, monkeypatch):
    order = sort_by_expert(choices(generator, device, ids=ids), EXPERTS)
    x = torch.randn(13, 1100, generator=generator).to(dtype).to(device).requires_grad_()
    weights = torch.rand(13, 3, generator=generator).to(device).requires_grad_()
    upstream = torch.randn(13, 1100, generator=generator).to(dtype).to(device)

    def there_and_back():
        out = unpermute(permute(x, order) ** 2, weights, order)
        return out, *torch.autograd.grad(out, (x, weights), upstream)

    for got, expected in zip(there_and_back(), plain(monkeypatch, there_and_back), strict=True):
        assert got.dtype == expected.dtype
        assert (got.double() - expected.double()).norm() <= error * expected.double().norm()


def test_outputs_are_wholly_written_and_spare_rows_neither_read_nor_written(generator, device, monkeypatch):
    order = sort_by_expert(choices(generator, device, ids=EXPERTS + 2), EXPERTS)
    live = int(order.offsets[-1])
    rows = torch.randn(39, 70, generator=generator).to(device)
    rows[live:] = torch.nan
    weights, empty = torch.rand(13, 3, generator=generator).to(device), torch.empty
    monkeypatch.setattr(triton_permute.torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan))
    out = triton_permute.unpermute(rows, weights, order)
    d_rows, d_weights = triton_permute.unpermute_backward(out, rows, weights, order)
    assert 0 < live < 39 and out.isfinite().all() and d_weights.isfinite().all()
    assert d_rows[:live].isfinite().all() and d_rows[live:].isnan().all()
