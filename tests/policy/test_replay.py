import pytest
import torch
from tiny_models import tiny_policy
from transformers import LlamaConfig, LlamaForCausalLM

from policy.replay import OWN, RouteReplay, stack_routes

IDS = torch.randint(10, 300, (3, 12), generator=torch.Generator().manual_seed(0))
LEFT_PADDED = torch.tensor([[0] * 5 + [1] * 7, [1] * 12, [0] * 2 + [1] * 10])
PACKED = torch.cat([torch.arange(5), torch.arange(4), torch.arange(3)]).expand(3, -1)


def moved(model, size=0.05):
    """The same model with its routers' weights moved, as an optimizer step would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def recorded(model, replay, **inputs):
    """Logits of a pass, and its routes [3, 12, layers, top_k]."""
    with torch.no_grad(), replay.recording() as routes:
        logits = model(IDS, use_cache=False, **inputs).logits
    return logits, stack_routes(routes, 3)


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": LEFT_PADDED}, {"position_ids": PACKED}],
                         ids=["whole", "left-padded", "packed"])
def test_a_replay_at_the_same_weights_changes_no_bit(inputs):
    model = tiny_policy()
    replay = RouteReplay(model)
    before, routes = recorded(model, replay, **inputs)
    assert routes.shape == (3, 12, 2, 2) and routes.dtype == torch.int16 and 0 <= routes.min() <= routes.max() < 8
    replay.start(routes)
    after = model(IDS, use_cache=False, **inputs).logits
    replay.count(inputs.get("attention_mask", torch.ones(3, 12)).bool())
    assert torch.equal(before, after)
    assert replay.rerouted == 0 and replay.tokens == int(inputs.get("attention_mask", torch.ones(3, 12)).sum())


def test_routes_stay_when_weights_move_and_each_token_that_would_have_left_is_counted():
    model = tiny_policy()
    replay = RouteReplay(model)
    _, routes = recorded(model, replay)
    free, own = recorded(moved(model), replay)
    replay.start(routes)
    taken = []
    hooks = [router.register_forward_hook(lambda *call: taken.append(call[2][2])) for router in replay.routers]
    held = model(IDS, use_cache=False).logits
    replay.count(torch.ones(3, 12, dtype=torch.bool))
    assert torch.equal(stack_routes(taken, 3), routes) and not torch.equal(held, free)
    # the first MoE layer sees the same inputs either way, so its choice is known; later layers can only add to it
    elsewhere = (own[:, :, 0].sort(-1).values != routes[:, :, 0].sort(-1).values).any(-1)
    assert 0 < int(elsewhere.sum()) <= replay.rerouted < replay.tokens == 36
    for hook in hooks:
        hook.remove()
    replay.stop()
    assert torch.equal(model(IDS, use_cache=False).logits, free)


def test_routes_of_other_tokens_are_other_routes():
    """What the tests of alignment rely on: routes shifted by one token are noticed."""
    model = tiny_policy()
    replay = RouteReplay(model)
    before, routes = recorded(model, replay)
    replay.start(routes.roll(1, dims=1))
    assert not torch.equal(model(IDS, use_cache=False).logits, before)
    replay.count(torch.ones(3, 12, dtype=torch.bool))
    assert replay.rerouted > 18


def test_a_place_without_a_route_chooses_for_itself_and_is_not_counted():
    model = tiny_policy()
    replay = RouteReplay(model)
    _, routes = recorded(model, replay)
    free, _ = recorded(moved(model), replay)
    routes[:] = OWN
    replay.start(routes)
    assert torch.equal(model(IDS, use_cache=False).logits, free)
    replay.count(torch.ones(3, 12, dtype=torch.bool))
    assert replay.tokens == replay.rerouted == 0


def test_the_mtp_module_keeps_its_own_routes():
    model = tiny_policy()
    replay, positions = RouteReplay(model), torch.arange(12).expand(3, -1)
    assert replay.layers == [1, 2] and model.model.layers[3].mlp.gate not in replay.routers
    with torch.no_grad():
        hidden = model.model(IDS, use_cache=False).last_hidden_state
        before = model.mtp_hidden_states(hidden, IDS, positions)
        replay.start(torch.zeros(3, 12, 2, 2, dtype=torch.int16) + torch.tensor([6, 7]))
        after = model.mtp_hidden_states(hidden, IDS, positions)
    assert model.model.layers[3].mlp.gate.replay is None and torch.equal(before, after)


def test_routes_of_a_batch_of_another_size_are_refused():
    model = tiny_policy()
    replay = RouteReplay(model)
    replay.start(torch.zeros(3, 11, 2, 2, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"replay must be \[36, 2\], a row for each token of this pass"):
        model(IDS, use_cache=False)


def test_a_dense_model_is_refused():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(llama\) has no routers .* set routing_replay: false"):
        RouteReplay(model)
