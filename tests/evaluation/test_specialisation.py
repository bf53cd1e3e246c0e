import json

import pytest
import torch
from tiny_models import Quiet, save_tiny, tiny_policy, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.specialisation import _batches, expert_load, specialisation
from pipeline.recipe import ModelConfig, TinyModel
from pipeline.records import Sample
from pipeline.stage import StageContext
from policy.tokenizer import completion_ids, prompt_ids
from workflows.ending import ROUTED_TEXTS, _write_expert_load


def test_loads_are_counted_per_domain_and_layer_whatever_is_padded_beside_a_text():
    model, generator = tiny_policy().eval(), torch.Generator().manual_seed(0)
    texts = {domain: [torch.randint(low, low + 60, (size,), generator=generator).tolist() for size in (3, 17, 9, 30)]
             for domain, low in (("math", 20), ("code", 150))}
    together = expert_load(model, texts)
    assert together["layers"] == [1, 2]
    for domain, rows in texts.items():
        alone = [expert_load(model, {domain: [row]})["load"][domain] for row in rows]
        assert together["load"][domain] == torch.tensor(alone).sum(0).tolist()
        assert torch.tensor(together["load"][domain]).sum(-1).tolist() == [2 * 59, 2 * 59]
    assert together["load"]["math"] != together["load"]["code"]


def test_batches_hold_every_text_once_and_a_long_text_alone():
    rows = [[1] * length for length in (9000, 10, 4000, 4000, 4000)]
    assert [[len(row) for row in batch] for batch in _batches(rows)] == [[10, 4000], [4000, 4000], [9000]]


def test_specialisation_is_none_where_domains_share_experts_and_near_one_where_each_has_its_own():
    assert specialisation({"a": [[5, 5, 0, 0]], "b": [[50, 50, 0, 0]]}) == pytest.approx(0)
    assert specialisation({"a": [[5, 5, 0, 0]], "b": [[0, 0, 1, 1]]}) == pytest.approx(0.5)
    own = {str(domain): [[int(domain == expert) for expert in range(10)]] for domain in range(10)}
    assert specialisation(own) == pytest.approx(0.9)


def test_a_dense_model_has_no_expert_load():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))
    assert expert_load(model, {"math": [[1, 2]]}) is None


def test_the_evaluation_writes_the_load_of_the_final_policys_answers(tmp_path):
    save_tiny(tmp_path / "rl/checkpoint")
    messages = ({"role": "user", "content": "What is 17 + 25?"},)
    answers = {domain: [Sample(f"{domain}{index}", "p", domain, "original", messages, "the answer", "c", "{}", "stop",
                               1)] * count for index, (domain, count) in enumerate({"math": 2, "code": 100}.items())}
    model = ModelConfig(source=TinyModel(), dtype="float32")
    context = StageContext("evaluate", {"model": model}, {"rl": tmp_path / "rl"}, tmp_path, tmp_path, 0, Quiet())
    _write_expert_load(context, answers)
    found, tokenizer = json.loads((tmp_path / "expert_load.json").read_text()), tiny_tokenizer()
    tokens = len(prompt_ids(tokenizer, messages)) + len(completion_ids(tokenizer, "the answer"))
    assert found["layers"] == [1, 2]
    for domain, texts in (("math", 2), ("code", ROUTED_TEXTS)):
        assert [sum(counts) for counts in found["load"][domain]] == [2 * texts * tokens] * 2
