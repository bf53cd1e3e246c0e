"""One real vLLM engine on a random tiny policy, shared by all tests here (its start takes most of the time)."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from tiny_models import Quiet, save_tiny, scatter_biases, tiny_policy, tiny_tokenizer

from pipeline.recipe import EngineConfig, ModelConfig, TinyModel
from pipeline.stage import StageContext, StageError
from policy.model import load_policy, save_policy
from policy.shards import checksum
from rl.engine import _OPEN, Request, RolloutEngine, Sampling, chat_generator, make_room, open_engine
from rl.sync import PROBE_LENGTHS, _prove, engine_tensors, logprob_error, prove_checkpoint, sync_weights
from workflows.context import prove_beyond
from workflows.inference import open_replicas

ROOT = Path(__file__).parents[2]
LENGTH, BOUND = 64, 1e-4
SHAPE = {"hidden_size": 128, "layers": 3, "max_length": LENGTH, "yarn_factor": 4}  # all probes go beyond 16 tokens
CONFIG = EngineConfig(max_sequences=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("policy"), **SHAPE)


@pytest.fixture(scope="module")
def engine(folder):
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
                 runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield open_engine(folder, CONFIG, dtype="float32", max_length=LENGTH, seed=0)
    if mine:
        ray.shutdown()


def changed_policy(seed, **shape):
    """A policy with every weight moved and other biases."""
    model = tiny_policy(**{**SHAPE, **shape})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    scatter_biases(model, seed)
    return model.eval()


def sent(model, engine):
    """What a sync sends, and its checksums."""
    tensors = {name: tensor.clone() for name, tensor in engine_tensors(model, engine).items()}
    return tensors, {name: checksum(tensor) for name, tensor in tensors.items()}


def test_the_stage_that_extends_a_context_proves_the_engine_beyond_the_original_length(engine, folder, tmp_path):
    model = ModelConfig(source=TinyModel(context_length=16), dtype="float32", max_length=LENGTH)
    context = StageContext("extend", {"model": model, "engine": CONFIG}, {}, tmp_path, tmp_path, 0, Quiet())
    assert 0 < prove_beyond(context, folder, 16, LENGTH) <= BOUND


def test_engine_and_trainer_agree_beyond_the_length_the_policy_was_extended_from(engine, folder):
    original = json.loads((folder / "config.json").read_text())["rope_parameters"]["original_max_position_embeddings"]
    model, lengths = load_policy(folder).eval(), (original + 1, 2 * original, LENGTH - 1)
    assert min(PROBE_LENGTHS) > original and logprob_error(model, engine, BOUND, lengths=lengths) <= BOUND
    plain = tiny_policy(**{**SHAPE, "yarn_factor": None}).eval()
    plain.load_state_dict(model.state_dict())
    assert logprob_error(plain, engine, BOUND, lengths=lengths) > 10 * BOUND, "plain frequencies would not be noticed"


def test_an_engine_proves_the_checkpoint_it_started_from(engine, folder):
    proof = prove_checkpoint(folder, "float32", engine, BOUND)
    assert proof.max_logprob_error <= BOUND and proof.read_back > 10


@pytest.mark.parametrize("seed", [1, 2])
def test_a_sync_of_new_weights_and_biases_is_proved(engine, seed):
    model = changed_policy(seed)
    assert logprob_error(model, engine, BOUND) > 1000 * BOUND  # the engine still has other weights
    proof = sync_weights(model, engine, seed, BOUND)
    assert proof.max_logprob_error <= BOUND
    tensors, checksums = sent(model, engine)
    held = engine.read_back({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and set(biases) <= set(held)
    assert all(held[name] == checksums[name] for name in held)
    norms = {name for name in tensors if name.endswith("layernorm.weight")} | {"model.norm.weight"}
    assert norms <= set(held), sorted(held)


def test_the_biases_alone_change_what_the_engine_computes(engine):
    model = changed_policy(1)
    sync_weights(model, engine, 1, BOUND)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)))
    assert logprob_error(model, engine, BOUND) > BOUND
    assert sync_weights(model, engine, 2, BOUND).max_logprob_error <= BOUND


def test_an_expert_that_differs_is_caught_by_the_log_probs(engine):
    model = changed_policy(3)
    tensors, checksums = sent(model, engine)
    wrong = {name: tensor * (3 if ".experts." in name else 1) for name, tensor in tensors.items()}
    engine.update(wrong, sent_checksums(wrong), 3)
    with pytest.raises(StageError, match="log-probs of the fixed prompts differ by .*max_logprob_error is 0.0001"):
        _prove(model, engine, tensors, checksums, BOUND)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.gate.e_score_correction_bias", "model.norm.weight"])
def test_a_tensor_that_differs_is_named(engine, name):
    model = changed_policy(3)
    tensors, checksums = sent(model, engine)
    wrong = {**tensors, name: tensors[name] + 0.01}
    engine.update(wrong, sent_checksums(wrong), 3)
    with pytest.raises(StageError, match=f"does not hold the trainer's \\['{name}'\\] \\(1 tensors\\)"):
        _prove(model, engine, tensors, checksums, BOUND)


def sent_checksums(tensors):
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def test_a_tensor_damaged_on_the_way_is_named_and_nothing_is_loaded(engine):
    model = changed_policy(1)
    sync_weights(model, engine, 1, BOUND)
    tensors, checksums = sent(changed_policy(2), engine)
    with pytest.raises(StageError, match="lm_head.weight arrived damaged"):
        engine.update(tensors, {**checksums, "lm_head.weight": "0" * 16}, 2)
    assert logprob_error(model, engine, BOUND) <= BOUND


def test_an_engine_killed_at_work_is_replaced_and_every_request_is_answered_once(engine, folder):
    model, notes, batches = ModelConfig(source=TinyModel(), dtype="float32", max_length=LENGTH), [], 24
    requests = [[Request((5, 6, 7 + seed % 50), seed) for seed in range(4 * batch, 4 * batch + 4)]
                for batch in range(batches)]
    with open_replicas(folder, model, CONFIG, 0, 2, notes.append) as opened:
        while len(opened.logprob_errors) < 2:  # both are proved
            time.sleep(0.1)
        [second] = [name for name in _OPEN if name.startswith("engine-replica-1-")]
        pid = ray.get(_OPEN[second].__ray_call__.remote(lambda actor: os.getpid()))
        found = {}
        for place, generations in opened.engine.generate_batches(requests, Sampling(1.0, 24)):
            if not found:
                os.kill(pid, signal.SIGKILL)
            assert place not in found
            found[place] = generations
    assert sorted(found) == list(range(batches)) and all(len(lot) == 4 for lot in found.values())
    assert len(notes) == 1 and notes[0].startswith("engine 1 of 2 died and is started again")
    assert not [name for name in _OPEN if name.startswith("engine-replica-")] and not psutil.pid_exists(pid)
    for place in (0, batches - 1):  # the same requests give the same samples in whichever engine
        again = engine.generate(requests[place], Sampling(1.0, 24))
        assert [lot.token_ids for lot in again] == [lot.token_ids for lot in found[place]]
    assert max(opened.logprob_errors) <= BOUND


def test_a_folder_is_loaded_into_the_running_engine(engine, tmp_path):
    save_policy(changed_policy(4), tiny_tokenizer(LENGTH), tmp_path)
    again = open_engine(tmp_path, CONFIG, dtype="float32", max_length=LENGTH, seed=0)
    assert again.actor == engine.actor
    assert prove_checkpoint(tmp_path, "float32", again, BOUND).max_logprob_error <= BOUND


def test_log_probs_are_those_of_the_distribution_sampled_from(engine):
    model = changed_policy(1)
    sync_weights(model, engine, 1, BOUND)
    requests = [Request(tuple(range(20 + index, 30 + index)), index) for index in range(8)]
    for request, generation in zip(requests, engine.generate(requests, Sampling(0.7, 12)), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0, 9:-1] / 0.7, -1)
        expected = logprobs.gather(1, ids[0, 10:, None])[:, 0]
        assert generation.logprobs == pytest.approx(expected.tolist(), abs=BOUND)


def test_a_completion_depends_on_its_seed_and_not_on_what_is_beside_it(engine):
    requests = [Request((5 + index, 6, 7), index) for index in range(12)]
    together = engine.generate(requests, Sampling(1.0, 8))
    assert [engine.generate([request], Sampling(1.0, 8))[0].token_ids for request in requests[:3]] == \
        [generation.token_ids for generation in together[:3]]
    assert engine.generate([Request((5, 6, 7), 99)], Sampling(1.0, 8))[0].token_ids != together[0].token_ids


def test_completions_end_with_the_end_of_turn_token_or_at_the_limit(engine):
    found = engine.generate([Request((9, 10), seed) for seed in range(96)], Sampling(1.0, 40))
    eos = tiny_tokenizer(LENGTH).eos_token_id
    stopped = [generation for generation in found if generation.finish_reason == "stop"]
    assert stopped and all(generation.token_ids[-1] == eos for generation in stopped)
    assert all(eos not in generation.token_ids[:-1] for generation in found)
    assert {len(generation.token_ids) for generation in found if generation.finish_reason == "length"} == {40}
    assert all(len(generation.logprobs) == len(generation.token_ids) for generation in found)


def test_a_prompt_too_long_is_said_and_the_others_still_come(engine):
    requests = [Request((1,) * length, 0) for length in (4, LENGTH, LENGTH - 1, 500)]
    found = engine.generate(requests, Sampling(1.0, 8))
    assert [generation.finish_reason for generation in found][1::2] == ["too_long", "too_long"]
    assert found[1].token_ids == found[3].token_ids == ()
    assert len(found[2].token_ids) == 1 and 1 <= len(found[0].token_ids) <= 8
    assert [g.finish_reason for g in engine.generate(requests[1:2], Sampling(1.0, 8))] == ["too_long"]


def test_a_chat_generator_gives_n_texts_per_conversation(engine):
    tokenizer = tiny_tokenizer(LENGTH)
    generate = chat_generator(engine, lambda text: tokenizer(text)["input_ids"], tokenizer.decode, Sampling(1.0, 4))
    texts = generate(["ab", "cd", "ef"], 2, 5)
    assert [len(found) for found in texts] == [2, 2, 2]
    assert generate(["ab", "cd", "ef"], 2, 5) == texts != generate(["ab", "cd", "ef"], 2, 6)


def test_a_reload_that_keeps_the_packed_kernel_still_leaves_experts_wrong(engine, tmp_path):
    """Pins the fault behind `EngineActor._reload`; when this fails, the remedy there can go."""
    model = changed_policy(5)
    save_policy(model, tiny_tokenizer(LENGTH), tmp_path)

    def reload_without_remedy(actor, path):
        from safetensors.torch import load_file

        weights = load_file(path)
        actor.llm.collective_rpc(lambda worker: worker.model_runner.reload_weights(
            weights_iterator=iter(weights.items()), is_checkpoint_format=True))
        actor.llm.reset_prefix_cache()

    ray.get(engine.actor.__ray_call__.remote(reload_without_remedy, str(tmp_path / "model.safetensors")))
    assert logprob_error(model, engine, BOUND) > 100 * BOUND
    engine.load_folder(tmp_path)
    assert logprob_error(model, engine, BOUND) <= BOUND


def test_the_rotary_kernel_of_the_cpu_back_end_is_still_wrong(engine, folder):
    """Pins the fault behind `custom_ops: none`: in vLLM's own configuration for an eager engine the rotary layer turns
    queries by the wrong angles. When this fails, that remedy can go. YaRN's frequencies take another kernel.
    """

    def turned(_actor, folder):
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.rotary_embedding import get_rope

        with set_current_vllm_config(EngineArgs(model=folder, enforce_eager=True).create_engine_config()):
            rotary = get_rope(32, max_position=64, is_neox_style=False,
                              rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
        generator = torch.Generator().manual_seed(0)
        queries, keys = (torch.randn(10, heads, 32, generator=generator) for heads in (4, 1))
        return [[tensor.reshape(10, -1, 32) for tensor in run(torch.arange(10), queries.clone(), keys.clone())]
                for run in (rotary, rotary.forward_native)]

    (queries, keys), (right_queries, right_keys) = ray.get(
        engine.actor.__ray_call__.remote(turned, str(folder)))
    torch.testing.assert_close(keys, right_keys)
    assert (queries - right_queries).abs().max() > 1


def test_the_probe_covers_every_expert():
    """Otherwise a wrong expert could hide; over random policies of the tiny shape and the fixed prompts."""
    model = changed_policy(1)
    from policy.balance import RouterProbe

    probe = RouterProbe(model)
    generator = torch.Generator().manual_seed(0)
    for length in PROBE_LENGTHS:
        ids = torch.randint(0, 300, (1, length), generator=generator)
        probe.begin(torch.ones_like(ids, dtype=torch.bool))
        model.model(ids, use_cache=False)
    assert (probe.loads[:2] > 0).all()


def test_an_idle_engine_stays_unless_a_training_would_not_fit_beside_it(engine, folder, monkeypatch):
    """Second to last, as it ends the shared engine."""
    make_room(folder)
    assert engine.generate([Request((1, 2), 0)], Sampling(1.0, 4))
    monkeypatch.setattr("rl.engine.TRAINING_COPIES", 10**9)
    make_room(folder)
    with pytest.raises(StageError, match="the rollout engine died"):
        engine.generate([Request((1, 2), 0)], Sampling(1.0, 4))
    make_room(folder)  # nothing is left to end


def test_a_dead_engine_is_a_clear_error_and_the_next_one_starts_anew(engine, folder):
    """Last, as it ends the shared engine."""
    engine = open_engine(folder, CONFIG, dtype="float32", max_length=LENGTH, seed=0)
    ray.kill(engine.actor)
    with pytest.raises(StageError, match="the rollout engine died during generate (?s:.*)lower engine.kv_cache_gib"):
        engine.generate([Request((1, 2), 0)], Sampling(1.0, 4))
    again = open_engine(folder, CONFIG, dtype="float32", max_length=LENGTH, seed=0)
    assert isinstance(again, RolloutEngine) and again.actor != engine.actor
    ray.kill(again.actor)
