import copy

import torch
from tiny_models import tiny_policy

from sft.optimizer import MuonWithAdamW


def make(model):
    return MuonWithAdamW(model, muon_learning_rate=0.02, learning_rate=1e-3, adam_beta2=0.95, weight_decay=0.1)


def backward(model, seed):
    model.zero_grad()
    ids = torch.randint(1, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(16).expand(2, -1)
    hidden = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
    loss = model.lm_head(hidden).logsumexp(-1).mean() + model.mtp_hidden_states(hidden, ids, positions).pow(2).mean()
    loss.backward()


def test_every_parameter_is_in_one_part_and_matrices_but_lookups_and_routers_in_muon():
    model = tiny_policy()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ([names[id(p)] for group in part.param_groups for p in group["params"]] for part in make(model).parts)
    assert sorted(muon + adamw) == sorted(names.values())
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.kv_b_proj.weight",
            "model.layers.3.eh_proj.weight"} <= set(muon)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight",
            "model.layers.1.mlp.experts.down_proj"} <= set(adamw)


def test_a_scheduler_scales_both_rates():
    optimizer = make(tiny_policy())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.01, 0.0005]


def test_a_loaded_optimizer_goes_on_with_the_same_steps_and_still_obeys_the_scheduler():
    one, two = tiny_policy().train(), tiny_policy().train()
    first, second = make(one), make(two)
    for seed in range(2):
        backward(one, seed)
        first.step()
    two.load_state_dict(one.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 0.5**step)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from disk: torch would share the moments
    for model, optimizer in ((one, first), (two, second)):
        backward(model, 2)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    scheduler.step()
    assert [group["lr"] for part in second.parts for group in part.param_groups] == [0.01, 0.0005]
