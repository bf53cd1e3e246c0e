import pytest
import torch

from policy.adamw import BETAS, MOST_BETA2, LowPrecisionAdamW, adamw_class


def weights(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((scale * torch.randn(shape, generator=generator)).to(dtype))
            for shape in [(30, 40), (40,), (4, 10, 20)]]


def train(params, optimizer, steps, begin=0):
    """Steps of gradients that have a mean and a spread, the same for every optimizer."""
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = (0.1 + torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


def state_bytes(optimizer):
    return sum(value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step")


def test_moments_take_half_the_memory_and_training_stays_close():
    exact, ours = weights(), weights()
    optimizers = (torch.optim.AdamW(exact, lr=1e-2, betas=BETAS, weight_decay=0.1),
                  LowPrecisionAdamW(ours, lr=1e-2, betas=BETAS, weight_decay=0.1))
    before = [p.detach().clone() for p in exact]
    for params, optimizer in zip((exact, ours), optimizers, strict=True):
        train(params, optimizer, 40)
    assert 2 * state_bytes(optimizers[1]) == state_bytes(optimizers[0]) == 8 * sum(p.numel() for p in exact)
    for start, one, other in zip(before, exact, ours, strict=True):
        assert (one - other).norm() < 0.01 * (one - start).norm()


def test_a_step_of_post_training_is_not_lost_in_a_bf16_weight():
    """At lr 5e-6 a BF16 weight of 0.02 stands still under torch's AdamW; the FP32 master moves until it shows."""
    moved = {}
    for cls in (torch.optim.AdamW, LowPrecisionAdamW):
        params = weights(torch.bfloat16, scale=0.02)
        before = [p.detach().float() for p in params]
        train(params, cls(params, lr=5e-6, betas=BETAS, weight_decay=0.0), 60)
        moved[cls] = sum(float((p.detach().float() - old).sum()) for p, old in zip(params, before, strict=True))
    assert moved[LowPrecisionAdamW] < 3 * moved[torch.optim.AdamW] < 0


def test_a_saved_state_goes_on_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        unbroken, broken = weights(dtype), weights(dtype)
        train(unbroken, LowPrecisionAdamW(unbroken, lr=1e-3), 8)
        first = LowPrecisionAdamW(broken, lr=1e-3)
        train(broken, first, 5)
        second = LowPrecisionAdamW(broken, lr=1e-3)
        second.load_state_dict(first.state_dict())
        for state in second.state.values():
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
            assert ("master" in state) == (dtype == torch.bfloat16) and state.get("master", p32).dtype == torch.float32
        train(broken, second, 3, begin=5)
        assert all(torch.equal(one, other) for one, other in zip(unbroken, broken, strict=True))


p32 = torch.zeros(())


def test_a_second_moment_decays_at_the_largest_beta2_and_would_not_above():
    value = torch.linspace(1, 2, 128).bfloat16()
    assert ((MOST_BETA2 * value.float()).bfloat16() < value).all()
    assert ((0.999 * value.float()).bfloat16() == value).any()
    with pytest.raises(ValueError, match="beta2 0.999"):
        LowPrecisionAdamW(weights(), lr=1e-3, betas=(0.9, 0.999))


@pytest.mark.parametrize(("dtype", "precision", "low"), [
    ("float32", "dtype", False), ("float32", "fp8", True), ("bfloat16", "dtype", True), ("bfloat16", "fp8", True)])
def test_only_fp32_training_keeps_fp32_moments(dtype, precision, low):
    assert (adamw_class(dtype, precision) is LowPrecisionAdamW) == low
