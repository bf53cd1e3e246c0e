import copy

import pytest
import torch
from tiny_models import tiny_policy
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from policy.kernels import fp8_experts
from policy.model import export_tensors, save_policy
from policy.precision import FP8Linear, FP8SwiGLU, apply_precision, exact_products

IDS = torch.arange(40, 104).view(4, 16)


def loss_of(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


def small_qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True))


def test_names_values_and_exports_are_those_of_the_model_before():
    plain, swapped = tiny_policy(), apply_precision(tiny_policy(), "fp8")
    for mine, theirs in ((dict(export_tensors(swapped)), dict(export_tensors(plain))),
                         (swapped.state_dict(), plain.state_dict())):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert [name for name, _ in swapped.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_what_stays_in_its_precision_is_what_the_paper_names():
    """Section 3.3.1: embedding, head, routers, norms, attention; and the MTP module's joining linear."""
    model = apply_precision(tiny_policy(), "fp8")
    in_fp8 = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
              "experts"}
    owners = {name.rpartition(".")[0]: module for name, _ in model.named_parameters()
              for module in [model.get_submodule(name.rpartition(".")[0])]}
    assert {name.rpartition(".")[2] for name, module in owners.items() if isinstance(module, FP8Linear)} \
        == in_fp8 - {"experts"}
    assert {name.rpartition(".")[2] for name in owners} - in_fp8 == {
        "embed_tokens", "lm_head", "gate", "norm", "q_a_layernorm", "kv_a_layernorm", "input_layernorm",
        "post_attention_layernorm", "enorm", "hnorm", "eh_proj"}
    assert type(owners["lm_head"]) is type(owners["model.layers.3.eh_proj"]) is nn.Linear
    assert model.config._experts_implementation == fp8_experts.NAME
    assert sum(isinstance(module, FP8SwiGLU) for module in model.modules()) == 4  # the dense MLP, three shared experts
    assert {name.rpartition(".")[2] for name, module in model.named_modules()
            if isinstance(module, FP8Linear) and module.after_attention} == {"o_proj"}


def test_the_attention_core_sees_the_dtype_of_the_model():
    seen, model = set(), apply_precision(tiny_policy().bfloat16(), "fp8")
    for layer in model.model.layers[:3]:
        for part in (layer.self_attn.q_b_proj, layer.self_attn.kv_b_proj, layer.self_attn.o_proj, layer.mlp):
            part.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    loss_of(model).backward()
    assert seen == {torch.bfloat16}
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_precision_dtype_changes_nothing():
    model = tiny_policy()
    before = [type(module) for module in model.modules()]
    assert apply_precision(model, "dtype") is model
    assert [type(module) for module in model.modules()] == before


def test_inside_exact_products_the_model_computes_as_it_did_before():
    plain, model = tiny_policy(), apply_precision(tiny_policy(), "fp8")
    with torch.no_grad():
        with exact_products(model):
            assert torch.equal(loss_of(model), loss_of(plain))
        noisy = loss_of(model)
        assert not torch.equal(noisy, loss_of(plain))
        assert noisy == pytest.approx(float(loss_of(plain)), rel=0.01)
        with pytest.raises(KeyError), exact_products(model):
            raise KeyError
        assert torch.equal(loss_of(model), noisy)  # an error inside does not leave it exact
        with exact_products(plain):  # nothing to do
            assert torch.equal(loss_of(plain), loss_of(tiny_policy()))


@pytest.mark.parametrize("make", [tiny_policy, small_qwen])
def test_gradients_point_where_exact_ones_do(make):
    """Routes are those of the exact model, as a changed choice of experts is no matter of rounding."""
    grads = []
    for precision in ("dtype", "fp8"):
        model = apply_precision(make(), precision)
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias[:2] = 10.0
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, exact in grads[0].items():
        cosine = torch.cosine_similarity(exact.flatten(), grads[1][name].flatten(), dim=0)
        assert cosine > 0.95 or exact.norm() < 1e-6, (name, float(cosine))


def test_a_copy_of_the_model_has_layers_of_its_own():
    model = apply_precision(tiny_policy(), "fp8")
    before, twin = loss_of(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(loss_of(model), before)


def test_a_tied_head_stays_out_of_fp8():
    model = apply_precision(small_qwen(), "fp8")
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].self_attn.q_proj, FP8Linear)
    loss_of(model).backward()
    assert model.model.layers[0].self_attn.q_proj.bias.grad.abs().sum() > 0


def test_experts_of_another_family_are_fp8_and_their_router_is_not():
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True))
    exact = float(loss_of(model))
    assert float(loss_of(apply_precision(model, "fp8"))) == pytest.approx(exact, rel=0.01)
    assert model.config._experts_implementation == fp8_experts.NAME
    assert not isinstance(model.model.layers[0].mlp.gate, FP8Linear)


def test_experts_of_another_layout_are_refused():
    model = tiny_policy()
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(ValueError, match="model.precision: fp8 has no kernel for DeepseekV3Experts"):
        apply_precision(model, "fp8")


def test_a_saved_config_does_not_ask_for_kernels_of_ours(tmp_path):
    from tiny_models import tiny_tokenizer
    save_policy(apply_precision(tiny_policy(), "fp8"), tiny_tokenizer(), tmp_path)
    assert "posttrain" not in (tmp_path / "config.json").read_text()
