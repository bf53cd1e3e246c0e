import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_policy
from transformers import Qwen2Config, Qwen2ForCausalLM

from pipeline.stage import StageError
from policy.balance import RouterProbe
from policy.kernels.experts import IMPLEMENTATION
from policy.precision import apply_precision
from policy.recompute import recompute

ROOT = Path(__file__).parents[2]
PARTS = ("norm", "mla_up", "swiglu")
CHOICES = [parts for count in range(1, 4) for parts in itertools.combinations(PARTS, count)]
IDS = torch.randint(1, 300, (2, 48), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(48).remainder(31).expand(2, -1)  # two packed samples a row


def train_once(parts, dtype=torch.float32, passes=1, experts="grouped_mm", precision="dtype"):
    """Loss, gradients by name and expert loads of the main model and the MTP module."""
    model = tiny_policy().to(dtype).train()
    model.set_experts_implementation(experts)
    apply_precision(model, precision)
    recompute(model, parts)
    probe = RouterProbe(model)
    for _ in range(passes):
        probe.begin(torch.ones_like(IDS, dtype=torch.bool))
        hidden = model.model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).last_hidden_state
        loss = model.lm_head(hidden).logsumexp(-1).mean()
        loss = loss + model.lm_head(model.mtp_hidden_states(hidden, IDS, POSITIONS)).logsumexp(-1).mean()
        (loss + 0.01 * probe.balance_loss(POSITIONS, IDS.numel())).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, probe.loads


@pytest.fixture(scope="module")
def plain():
    return train_once(())


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_gradients_are_equal_in_every_bit_whatever_is_recomputed(plain, parts):
    loss, gradients, loads = train_once(parts)
    assert torch.equal(loss, plain[0]) and gradients.keys() == plain[1].keys()
    assert [name for name in gradients if not torch.equal(gradients[name], plain[1][name])] == []
    assert torch.equal(loads, plain[2]), "a router that ran twice was counted twice"


def test_gradients_over_passes_in_other_precisions_and_of_other_experts_are_equal_too():
    for options in ({"passes": 2}, {"dtype": torch.bfloat16}, {"experts": IMPLEMENTATION}, {"precision": "fp8"}):
        one, two = train_once((), **options)[1], train_once(PARTS, **options)[1]
        assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture
def benchmark(monkeypatch):
    """The module benchmarks/recompute_memory.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("recompute_memory")


def test_each_part_leaves_less_alive_between_the_passes(benchmark):
    none, *each, everything = (benchmark.measure(list(parts), small=True)["kept"]
                               for parts in ((), *((part,) for part in PARTS), PARTS))
    assert all(kept < 0.99 * none for kept in each)
    assert everything < 0.8 * none


def test_nothing_is_kept_of_a_pass_without_gradient():
    model = tiny_policy().eval()
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
        recompute(model, PARTS)
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)


def test_a_model_without_the_parts_is_a_clear_error():
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))
    recompute(model, ())
    with pytest.raises(StageError, match="recompute: norm are parts of DeepSeek-V3 layers, which a qwen2"):
        recompute(model, ("norm",))


def test_the_benchmark_runs_at_its_smallest_size(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes it measures in
    benchmark.main(["--small", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures[-1] == {"what": "gradients equal in every bit", "figure": 1.0, "unit": "1 = yes"}
