import copy

import pytest
import torch
from tiny_models import save_tiny
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from policy.kernels import experts
from policy.kernels.experts import IMPLEMENTATION
from policy.model import load_policy
from policy.presets import tiny_config


def layer(implementation: str, dtype: torch.dtype = torch.float64) -> DeepseekV3Experts:
    """16 experts from 16 to 8 wide."""
    config = tiny_config(hidden_size=16)
    config._experts_implementation = implementation
    module = DeepseekV3Experts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.to(dtype)


def routed(tokens: int, low: int = 0, high: int = 16, dtype: torch.dtype = torch.float64):
    """Hidden states, top-2 experts among [low, high) and their weights."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    indices = low + torch.rand(tokens, high - low, generator=generator).topk(2, -1).indices
    weights = torch.rand(tokens, 2, generator=generator).to(dtype).requires_grad_()
    return hidden, indices, weights


def gradients(module: DeepseekV3Experts, hidden, indices, weights):
    inputs = (hidden, weights, *module.parameters())
    output = module(hidden, indices, weights)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output, *torch.autograd.grad((output * target).sum(), inputs)


@pytest.mark.parametrize(("tokens", "low", "high"), [(64, 0, 16), (1, 0, 16), (9, 5, 7), (40, 14, 16)])
def test_output_and_gradients_are_those_of_the_eager_loop(tokens, low, high):
    for mine, theirs in zip(gradients(layer(IMPLEMENTATION), *routed(tokens, low, high)),
                            gradients(layer("eager"), *routed(tokens, low, high)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 999, 10_000])
def test_the_block_of_experts_taken_at_a_time_changes_nothing(size, monkeypatch):
    whole = gradients(layer(IMPLEMENTATION), *routed(50))
    monkeypatch.setattr(experts, "BLOCK_BYTES", size)
    for mine, theirs in zip(gradients(layer(IMPLEMENTATION), *routed(50)), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_as_near_to_the_exact_result_as_the_grouped_path():
    exact = gradients(layer("eager", torch.bfloat16).double(), *(
        tensor.double() if tensor.is_floating_point() else tensor for tensor in routed(64, dtype=torch.bfloat16)))
    distances = []
    for implementation in (IMPLEMENTATION, "grouped_mm"):
        found = gradients(layer(implementation, torch.bfloat16), *routed(64, dtype=torch.bfloat16))
        distances.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    assert all(mine < 1.3 * theirs + 1e-3 for mine, theirs in zip(*distances, strict=True)), distances


def test_rows_of_a_token_are_added_in_float32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 200, generator=generator).bfloat16()
    positions = torch.randperm(600, generator=generator).view(100, 6)
    exact = rows.double()[positions].sum(1)
    # ties may go either way
    assert (experts._combine(rows, positions) - exact).norm() < 1.001 * (exact.bfloat16() - exact).norm()


def test_no_tokens_give_no_output_and_zero_gradients():
    output, *grads = gradients(layer(IMPLEMENTATION), torch.zeros(0, 16, dtype=torch.float64, requires_grad=True),
                               torch.zeros(0, 2, dtype=torch.int64),
                               torch.zeros(0, 2, dtype=torch.float64, requires_grad=True))
    assert output.shape == (0, 16) and all(not grad.any() for grad in grads)


def test_a_loaded_policy_uses_it_and_agrees_with_the_eager_experts(tmp_path):
    mine = load_policy(save_tiny(tmp_path))
    theirs = copy.deepcopy(mine)
    theirs.set_experts_implementation("eager")
    assert mine.config._experts_implementation == IMPLEMENTATION
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    ids = torch.arange(40, 72).view(2, 16)
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
