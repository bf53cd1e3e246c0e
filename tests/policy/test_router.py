import pytest
import torch
from tiny_models import save_tiny, tiny_policy
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from policy.kernels.router import choose, expert_weights, route
from policy.model import load_policy
from policy.router import Router

V3 = dict(n_group=8, topk_group=4, top_k=8)


def made(tokens=64, experts=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator), 0.1 * torch.randn(experts, generator=generator)


def paper_choice(logits, bias, n_group, topk_group, top_k):
    """Section 2.1.2 of DeepSeek-V3 for one token, spelled out in Python."""
    biased = (torch.sigmoid(logits) + bias).tolist()
    width = len(biased) // n_group
    worth = [sum(sorted(biased[group * width:(group + 1) * width])[-2:]) for group in range(n_group)]
    groups = sorted(range(n_group), key=lambda group: -worth[group])[:topk_group]
    allowed = [expert for expert in range(len(biased)) if expert // width in groups]
    return sorted(sorted(allowed, key=lambda expert: -biased[expert])[:top_k])


@pytest.mark.parametrize(("experts", "shape"), [(256, V3), (16, dict(n_group=4, topk_group=2, top_k=2)),
                                                (64, dict(n_group=1, topk_group=1, top_k=6))])
def test_the_choice_is_that_of_the_paper(experts, shape):
    logits, bias = made(experts=experts)
    for row, chosen in zip(logits, choose(logits, bias, **shape).sort(-1).values.tolist(), strict=True):
        assert chosen == paper_choice(row, bias, **shape)


def test_weights_are_normalised_scores_without_the_bias():
    logits, bias = made()
    indices, weights = route(logits, bias, **V3, scale=2.5, norm=True)
    scores = torch.sigmoid(logits.double()).gather(1, indices)
    torch.testing.assert_close(weights.double(), 2.5 * scores / scores.sum(-1, keepdim=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(route(logits, bias, **V3, scale=1.0, norm=False)[1].double(), scores, rtol=1e-6, atol=0)


def test_our_router_is_the_one_of_transformers():
    model = tiny_policy()
    for module in (module for module in model.modules() if isinstance(module, Router)):
        hidden = torch.randn(40, module.hidden_dim, generator=torch.Generator().manual_seed(1))
        for mine, theirs in zip(module(hidden), DeepseekV3TopkRouter.forward(module, hidden), strict=True):
            # which of two sums is rounded last depends on the processor
            torch.testing.assert_close(mine, theirs, rtol=3e-7, atol=0)
    assert sum(type(module) is Router for module in model.modules()) == 3


def test_replayed_experts_get_weights_of_the_current_scores_and_its_gradient():
    logits, bias = made(tokens=6)
    replay = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(row))[:8] for row in range(6)])
    replay[4] = -1
    logits.requires_grad_()
    indices, weights = route(logits, bias, **V3, scale=2.5, norm=True, replay=replay)
    own = choose(logits, bias, **V3)
    assert torch.equal(indices[4], own[4]) and torch.equal(indices[:4], replay[:4])
    assert torch.equal(weights, expert_weights(logits, indices, 2.5, True))
    (weights * torch.arange(8.0)).sum().backward()
    for row in range(6):  # only chosen experts are trained
        assert set(logits.grad[row].nonzero().flatten().tolist()) <= set(indices[row].tolist())
        assert logits.grad[row].abs().sum() > 0


def test_weights_pass_gradcheck():
    logits = made(tokens=3, experts=16)[0].double().requires_grad_()
    indices = torch.tensor([[0, 5], [3, 2], [15, 9]])
    assert torch.autograd.gradcheck(lambda x: expert_weights(x, indices, 2.5, True), logits)


def test_low_precision_inputs_and_a_replay_of_other_tokens_are_refused():
    logits, bias = made(tokens=4)
    with pytest.raises(TypeError, match="must be float32 .got torch.float32 and torch.bfloat16"):
        route(logits, bias.bfloat16(), **V3, scale=2.5, norm=True)
    with pytest.raises(ValueError, match=r"replay must be \[4, 8\], a row for each token .* \[3, 8\]"):
        route(logits, bias, **V3, scale=2.5, norm=True, replay=torch.zeros(3, 8, dtype=torch.int64))


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half(),
                                  lambda model: model.bfloat16().to("cpu", torch.float16)])
def test_a_cast_of_the_model_leaves_its_balance_biases_alone(cast):
    model = tiny_policy()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "correction_bias" in name}
    cast(model)
    after = dict(model.named_buffers())
    assert len(before) == 3 and model.lm_head.weight.dtype != torch.float32
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], bias) for name, bias in before.items())
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()


def test_a_bfloat16_policy_routes_in_float32(tmp_path):
    model = load_policy(save_tiny(tmp_path), "bfloat16")
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16 and gate.e_score_correction_bias.dtype == torch.float32
    hidden = torch.randn(50, gate.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits, weights, _ = gate(hidden)
    exact = hidden.double() @ gate.weight.double().T
    assert logits.dtype == weights.dtype == torch.float32 and (logits - exact).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(hidden)[0], logits)
