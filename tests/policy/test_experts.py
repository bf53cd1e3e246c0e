import copy
import subprocess

import pytest
import torch
from tiny_models import save_tiny
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from policy.kernels import cpu_experts
from policy.kernels.experts import IMPLEMENTATION
from policy.model import load_policy
from policy.presets import tiny_config


def layer(implementation: str, dtype: torch.dtype = torch.float32) -> DeepseekV3Experts:
    """16 experts from 64 to 32 wide."""
    config = tiny_config(hidden_size=64)
    config.moe_intermediate_size = 32
    config._experts_implementation = implementation
    module = DeepseekV3Experts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.to(dtype)


def routed(tokens: int, low: int = 0, high: int = 16, dtype: torch.dtype = torch.float32, top_k: int = 2):
    """Hidden states, `top_k` experts among [low, high) and their weights."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 64, generator=generator).to(dtype).requires_grad_()
    indices = low + torch.rand(tokens, high - low, generator=generator).topk(top_k, -1).indices
    weights = torch.rand(tokens, top_k, generator=generator).to(dtype).requires_grad_()
    return hidden, indices, weights


def gradients(module: DeepseekV3Experts, hidden, indices, weights):
    inputs = (hidden, weights, *module.parameters())
    output = module(hidden, indices, weights)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output.detach(), *torch.autograd.grad((output * target).sum(), inputs)


def exactly(dtype: torch.dtype, *arguments, **options):
    """Output and gradients of the eager loop in FP64, from the same values of `dtype`."""
    hidden, indices, weights = routed(*arguments, dtype=dtype, **options)
    return gradients(layer("eager", dtype).double(), hidden.detach().double().requires_grad_(), indices,
                     weights.detach().double().requires_grad_())


def distances(found, exact) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(("tokens", "low", "high"), [(64, 0, 16), (1, 0, 16), (9, 5, 7), (40, 14, 16), (1100, 3, 5)])
def test_output_and_gradients_are_those_of_the_eager_loop(tokens, low, high):
    found = gradients(layer(IMPLEMENTATION), *routed(tokens, low, high))
    assert max(distances(found, exactly(torch.float32, tokens, low, high))) < 1e-6


@pytest.mark.parametrize("top_k", [1, 6, 16])
def test_any_number_of_experts_a_token_is_added_up(top_k):
    found = gradients(layer(IMPLEMENTATION), *routed(50, top_k=top_k))
    assert max(distances(found, exactly(torch.float32, 50, top_k=top_k))) < 1e-6


@pytest.mark.parametrize("tokens", [64, 2100])
@pytest.mark.skipif(not cpu_experts.runs(torch.empty(1, 64, 64, dtype=torch.bfloat16)),
                    reason="no matrix tiles: the grouped path runs BF16")
def test_bfloat16_is_nearer_to_the_exact_result_than_the_grouped_path(tokens):
    exact = exactly(torch.bfloat16, tokens, 0, 3)
    mine, theirs = (distances(gradients(layer(implementation, torch.bfloat16), *routed(tokens, 0, 3, torch.bfloat16)),
                              exact) for implementation in (IMPLEMENTATION, "grouped_mm"))
    assert all(a < b < 2 ** -7 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def test_no_tokens_give_no_output_and_zero_gradients():
    output, *grads = gradients(layer(IMPLEMENTATION), torch.zeros(0, 64, requires_grad=True),
                               torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, requires_grad=True))
    assert output.shape == (0, 64) and all(not grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(gradients(layer(IMPLEMENTATION, dtype), *routed(150, dtype=dtype)))
    torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_far_from_zero_saturate_and_what_is_not_a_number_stays_with_its_token(dtype):
    module = layer(IMPLEMENTATION, dtype)
    with torch.no_grad():
        module.gate_up_proj.zero_()
        module.down_proj.zero_()
        module.gate_up_proj[0, 0, 0] = module.gate_up_proj[0, 32, 32] = 1  # the gate and what it lets through
        module.down_proj[0, 0, 0] = 1
    gates = torch.tensor([-1e30, -1e4, -100., -88., -20., -0., 0., 20., 88., 100., 1e4, 1e30, torch.nan], dtype=dtype)
    hidden = torch.zeros(13, 64, dtype=dtype)
    hidden[:, 0], hidden[:, 32] = gates, 1
    found = module(hidden, torch.zeros(13, 1, dtype=torch.int64), torch.ones(13, 1))
    expected = torch.nn.functional.silu(gates)
    torch.testing.assert_close(found[1:12, 0], expected[1:12], rtol=2 ** -7 if dtype == torch.bfloat16 else 2e-6,
                               atol=1e-30)
    assert found[0, 0].abs() < 1e-6  # -1e30 / e^87, where the limit is 0
    assert not found[:12].isnan().any() and found[12, 0].isnan()


def test_an_expert_that_is_not_there_and_shapes_that_do_not_fit_are_named():
    module, (hidden, indices, weights) = layer(IMPLEMENTATION), routed(10)
    for wrong in (16, -1):
        with pytest.raises(IndexError, match="where there are 16"):
            module(hidden, indices.clone().fill_(wrong), weights)
    with pytest.raises(ValueError, match="do not fit together"):
        module(hidden, indices[:9], weights[:9])


def test_sizes_it_does_not_take_run_on_the_grouped_path():
    module = DeepseekV3Experts(tiny_config(hidden_size=40))
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    hidden, indices, weights = routed(20)
    found = []
    for module.config._experts_implementation in (IMPLEMENTATION, "grouped_mm"):
        found.append(module(hidden[:, :40], indices, weights))
    assert found[0].equal(found[1])


def test_without_a_compiler_it_warns_once_and_runs_on_the_grouped_path(monkeypatch):
    expected = layer("eager")(*routed(20))
    monkeypatch.setattr(cpu_experts, "COMPILE", ("no-such-compiler",))
    cpu_experts._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install g\\+\\+"):
            found = layer(IMPLEMENTATION)(*routed(20))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    finally:
        cpu_experts._library.cache_clear()


def test_sanitisers_find_no_stray_access_and_no_undefined_behaviour(tmp_path):
    """The C++ source under AddressSanitizer and UBSan, with plain products in place of torch's."""
    caller = tmp_path / "caller.cpp"
    caller.write_text(f'''
#include "{cpu_experts.SOURCE}"
#include <vector>

namespace at::native::cpublas {{
bool could_pack(c10::ScalarType) {{ return true; }}
void brgemm_release(bool) {{}}
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, bool add, const T *a, const T *b, float *c, int pair) {{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {{
            float sum = add ? c[i * n + j] : 0;
            for (int64_t x = 0; x < k; x++)
                sum += load(a[i * k + x]) * load(b[(x / pair * n + j) * pair + x % pair]);
            c[i * n + j] = sum;
        }}
}}
void brgemm(int64_t m, int64_t n, int64_t k, int64_t, int64_t, int64_t, bool add, const float *a, const float *b,
            float *c, bool) {{
    multiply(m, n, k, add, a, b, c, 1);
}}
void brgemm(int64_t m, int64_t n, int64_t k, int64_t, int64_t, int64_t, bool add, const c10::BFloat16 *a,
            const c10::BFloat16 *b, float *c, bool) {{
    multiply(m, n, k, add, (const bfloat16 *)a, (const bfloat16 *)b, c, 2);
}}
}}

template <class T, class Forward, class Backward> void run(Forward forward, Backward backward) {{
    for (int64_t tokens : {{0, 1, 33, 600}})
        for (int64_t top_k : {{1, 3}}) {{
            int64_t experts = 4, size = 64, width = 32, rows = tokens * top_k;
            std::vector<T> hidden(tokens * size), gate_up(experts * 2 * width * size), down(experts * size * width);
            std::vector<T> projected(rows * 2 * width), returned(rows * size), out(tokens * size);
            std::vector<T> grad_gate_up(gate_up.size()), grad_down(down.size()), grad_hidden(hidden.size());
            std::vector<int64_t> indices(rows);
            std::vector<float> weights(rows, 0.5f), grad_weights(rows);
            std::vector<int32_t> order(2 * rows + experts + 2);
            for (int64_t i = 0; i < rows; i++)
                indices[i] = i % 3 ? 2 : i % 2; // expert 3 has no rows
            if (!forward(hidden.data(), gate_up.data(), down.data(), indices.data(), weights.data(), order.data(),
                         projected.data(), returned.data(), out.data(), tokens, top_k, experts, size, width))
                abort();
            backward(hidden.data(), gate_up.data(), down.data(), weights.data(), order.data(), projected.data(),
                     out.data(), returned.data(), grad_hidden.data(), grad_gate_up.data(), grad_down.data(),
                     grad_weights.data(), tokens, top_k, experts, size, width);
            if (rows) {{
                indices[rows - 1] = experts;
                if (forward(hidden.data(), gate_up.data(), down.data(), indices.data(), weights.data(), order.data(),
                            projected.data(), returned.data(), out.data(), tokens, top_k, experts, size, width))
                    abort();
            }}
        }}
}}

int main() {{
    run<float>(forward_float, backward_float);
    run<bfloat16>(forward_bfloat16, backward_bfloat16);
}}''')
    program = tmp_path / "caller"
    subprocess.run(["g++", "-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fopenmp",
                    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", str(caller), "-o", str(program)],
                   check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_loaded_policy_uses_it_and_agrees_with_the_eager_experts(tmp_path):
    mine = load_policy(save_tiny(tmp_path))
    theirs = copy.deepcopy(mine)
    theirs.set_experts_implementation("eager")
    assert mine.config._experts_implementation == IMPLEMENTATION
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    ids = torch.arange(40, 72).view(2, 16)
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
