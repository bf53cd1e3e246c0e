import torch

from policy.kernels.permute import permute, sort_by_expert, unpermute


def choices(tokens=7, top_k=2, experts=4):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])


def test_rows_are_sorted_by_expert_and_keep_the_order_of_tokens():
    experts_of = choices()
    order = sort_by_expert(experts_of, 4)
    of_rows = experts_of.flatten()[order.choices]
    assert (of_rows.diff() >= 0).all() and order.offsets.dtype == torch.int32
    assert order.offsets.tolist() == [int((experts_of <= expert).sum()) for expert in range(4)]
    for expert in range(4):
        assert (order.tokens[of_rows == expert].diff() > 0).all()
    assert torch.equal(order.choices[order.positions.flatten()], torch.arange(14))


def test_there_and_back_is_the_weighted_sum_over_a_token_s_experts():
    experts_of, x, weights = choices(), torch.randn(7, 5), torch.rand(7, 2)
    order = sort_by_expert(experts_of, 4)
    rows = permute(x, order) * (1 + experts_of.flatten()[order.choices])[:, None]
    expected = (x[:, None] * (1 + experts_of)[..., None] * weights[..., None]).sum(1)
    assert torch.allclose(unpermute(rows, weights, order), expected, rtol=1e-6, atol=1e-6)


def test_gradients_are_right():
    order = sort_by_expert(choices(), 3)  # expert 3 is elsewhere
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weights: unpermute(permute(x, order) ** 2, weights, order), (x, weights))


def test_experts_elsewhere_come_last_and_count_as_zeros():
    experts_of = torch.tensor([[0, 5], [5, 6], [1, 0]])
    order = sort_by_expert(experts_of, 2)
    assert order.offsets.tolist() == [2, 3]
    rows = torch.ones(6, 4)
    rows[3:] = torch.nan
    assert unpermute(rows, torch.ones(3, 2), order)[:, 0].tolist() == [1, 0, 2]
