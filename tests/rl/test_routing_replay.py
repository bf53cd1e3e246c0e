"""GRPO through the experts of the rollout; the settings and the engine are those of test_grpo."""

import numpy as np
import pytest
import torch
from scripted_rollouts import ScriptedEngine
from test_grpo import assert_same, first_gradient, first_slots, make_trainer, train
from tiny_models import save_tiny, tiny_policy, tiny_tokenizer

from pipeline.records import Rollout, read_table
from pipeline.stage import StageError
from policy.model import DeepseekV3WithMTP, save_policy
from policy.replay import OWN, RouteReplay, stack_routes
from policy.training import read_curve
from rl.engine import Generation
from rl.routes import engine_routes


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("start"))


def test_every_slot_carries_the_routes_its_rows_take_alone(tmp_path, start):
    """Alone, without padding, in one pass: so neither left padding nor the cutting of slots can have moved them."""
    trainer = make_trainer(tmp_path, start, device_batch=4, routing_replay=True)
    slots = [slot for slot in first_slots(trainer) if slot is not None]
    replay, widths = RouteReplay(trainer.model), set()
    for slot in slots:
        ids = torch.cat([slot["prompt_ids"], slot["completion_ids"]], 1)
        mask = torch.cat([slot["prompt_mask"], slot["completion_mask"]], 1).bool()
        assert slot["routes"].shape == (*ids.shape, 2, 2)
        widths |= {(int(row[:slot["prompt_ids"].shape[1]].sum()), int(row.sum())) for row in mask}
        for row in range(len(ids)):
            with torch.no_grad(), replay.recording() as recorded:
                trainer.model(ids[row, mask[row]][None], use_cache=False)
            alone = stack_routes(recorded, 1)[0].sort(-1).values
            assert torch.equal(alone, slot["routes"][row, mask[row]].sort(-1).values)
    assert len(widths) > 5 and len({prompt for prompt, _ in widths}) > 1


def test_a_replay_at_the_weights_of_the_rollout_leaves_gradient_and_routes_as_they_are(tmp_path, start):
    without = first_gradient(tmp_path / "without", start)
    replayed = first_gradient(tmp_path / "replayed", start, routing_replay=True)
    assert_same(without, replayed)
    curve = read_curve(tmp_path / "replayed/work/curve.jsonl")
    assert curve[0]["rerouted_share"] == 0.0 and curve[0]["dropped_tokens"] == 0
    assert "rerouted_share" not in read_curve(tmp_path / "without/work/curve.jsonl")[0]


def test_later_mini_batches_take_the_routes_of_the_rollout_and_the_curve_says_how_many_would_not(tmp_path, start):
    settings = dict(steps=1, mini_batches=4, learning_rate=3e-2, kl_coef=0.0)
    routes = {}
    for replayed in (True, False):
        trainer = make_trainer(tmp_path / str(replayed), start, routing_replay=replayed, **settings)
        taken = routes[replayed] = []
        gate = trainer.model.model.layers[1].mlp.gate

        def note(_router, _inputs, output, taken=taken):
            if torch.is_grad_enabled():
                taken.append(output[2].sort(-1).values)

        gate.register_forward_hook(note)
        trainer.train()
        assert gate.replay is None  # nothing is replayed once training has ended
    assert len(routes[True]) == len(routes[False]) == 4
    assert torch.equal(routes[True][0], routes[False][0])  # the first mini-batch meets the weights of the rollout
    assert not torch.equal(routes[True][3], routes[False][3])
    shares = [read_curve(tmp_path / f"{replayed}/work/curve.jsonl")[0].get("rerouted_share") for replayed in routes]
    assert 0.02 < shares[0] < 1 and shares[1] is None


def test_routes_of_the_engine_are_taken_recorded_and_those_that_differ_counted(tmp_path, start):
    def run(name, **faults):
        engine = ScriptedEngine(start, tmp_path / name / "engine", routes=True, **faults)
        train(tmp_path / name, start, engine=engine, steps=1, routing_replay=True, max_drift=10.0)
        return read_curve(tmp_path / name / "out/curve.jsonl")[0]

    same, noisy = run("same"), run("noisy", router_noise=0.02)
    assert same["rerouted_share"] == 0.0 and same["sampling/sampling_logp_difference/max"] < 1e-4
    assert 0.02 < noisy["rerouted_share"] < 0.9
    # this engine's log-probs are those of its own routes; the trainer's, through the noisy ones, are others
    assert noisy["sampling/sampling_logp_difference/max"] > 1e-3
    rollout = read_table(tmp_path / "same/out/rollouts.parquet", Rollout)[0]
    tokens = len(rollout.prompt_ids) + len(rollout.completion_ids) - 1
    routes = np.frombuffer(rollout.routes, "<i2").reshape(tokens, 3, 2)
    assert not routes[:, 0].any() and (routes[:, 1, 0] != routes[:, 1, 1]).all() and routes.max() < 8


def test_engine_routes_stand_where_the_tokens_stand():
    found = np.arange(5 * 3 * 2).reshape(5, 3, 2).astype(np.uint8)
    rows = [([1, 2, 3, 4], Generation((5, 6), (0.0, 0.0), "stop", found)),
            ([1], Generation((2, 3, 4, 5, 6), (0.0,) * 5, "stop", found))]
    batch = engine_routes(rows, prompt_width=4, width=9, layers=[1, 2], top_k=2)
    assert batch[0, :5].tolist() == found[:, 1:].tolist() and (batch[0, 5:] == OWN).all()
    assert batch[1, 3:8].tolist() == found[:, 1:].tolist()
    assert (batch[1, :3] == OWN).all() and (batch[1, 8:] == OWN).all()
    assert engine_routes([(prompt, Generation(g.token_ids, g.logprobs, "stop")) for prompt, g in rows], 4, 9, [1, 2],
                         2) is None


@pytest.mark.parametrize("wrong", [None, np.zeros((6, 3, 2), np.uint8), np.zeros((5, 2, 2), np.uint8),
                                   np.zeros((5, 3, 4), np.uint8)], ids=["none", "tokens", "layers", "top-k"])
def test_engine_routes_of_another_layout_stop_the_run(wrong):
    right = ([1, 2, 3, 4], Generation((5, 6), (0.0, 0.0), "stop", np.zeros((5, 3, 2), np.uint8)))
    with pytest.raises(StageError, match="for 5 tokens, layers 1 to 2, 2 experts .* engine.return_routes: false"):
        engine_routes([right, ([1, 2, 3, 4], Generation((5, 6), (0.0, 0.0), "stop", wrong))], 4, 9, [1, 2], 2)


def test_replay_of_a_dense_model_is_a_clear_error(tmp_path):
    config = tiny_policy().config
    config.first_k_dense_replace, config.num_nextn_predict_layers = config.num_hidden_layers, 0
    save_policy(DeepseekV3WithMTP(config), tiny_tokenizer(), tmp_path / "dense")
    with pytest.raises(StageError, match=r"rl\.routing_replay: .* has no routers .* set routing_replay: false"):
        make_trainer(tmp_path, tmp_path / "dense", routing_replay=True)
    train(tmp_path / "run", tmp_path / "dense", steps=1)  # and without it a dense model trains
