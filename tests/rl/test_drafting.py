"""A real vLLM engine that drafts, on a tiny policy trained on a random chain of tokens; started once for all tests."""

import copy
import math
from pathlib import Path

import pytest
import ray
import torch
from tiny_models import tiny_policy, tiny_tokenizer
from torch.nn import functional

from pipeline.recipe import EngineConfig
from pipeline.stage import StageError
from policy.model import load_policy, save_policy
from policy.mtp import is_mtp, predictions
from policy.shards import checksum
from rl.engine import Request, Sampling, open_engine, stop_engines
from rl.sync import _prove, engine_tensors, prove_checkpoint, sync_weights

ROOT = Path(__file__).parents[2]
LENGTH, BOUND, STATES = 64, 1e-4, 24
CONFIG = EngineConfig(max_sequences=64, draft=True)


def chain(count, length, seed, rule=0):
    """Sequences in which each of STATES tokens has two successors, one of them three times as likely."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(10, 10 + STATES, (10 + STATES, 2), generator=torch.Generator().manual_seed(rule))
    ids = torch.randint(10, 10 + STATES, (count, length), generator=generator)
    for t in range(1, length):
        which = (torch.rand(count, generator=generator) < 0.25).long()
        ids[:, t] = successors[ids[:, t - 1], which]
    return ids


def train_on_the_chain(model, steps, rule=0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = torch.arange(24).expand(16, -1)
    for step in range(steps):
        ids = chain(16, 24, step, rule)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        loss = functional.cross_entropy(model.lm_head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        (module,) = predictions(model, hidden, ids, positions, ids, trunk_gradient=True)
        (loss + module.losses.sum() / module.labelled.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    model = tiny_policy(hidden_size=128, layers=3, max_length=LENGTH)
    return train_on_the_chain(model, 60)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("drafting")
    save_policy(trained, tiny_tokenizer(LENGTH), path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
                 runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    opened = open_engine(folder, CONFIG, dtype="float32", max_length=LENGTH, seed=0, role="drafting")
    yield opened
    stop_engines("engine-drafting-")  # ends its actor and forgets it
    if mine:
        ray.shutdown()


def requests(count, rule=0):
    return [Request(tuple(ids), seed) for seed, ids in enumerate(chain(count, 8, 1000, rule).tolist())]


@torch.no_grad()
def judged(model, request, generation, temperature):
    """The trainer's log-probs at each completion token [tokens, vocab], and the MTP module's drafts [tokens].

    The draft of token t was made at t - 2; the first token of a completion has none.
    """
    ids = torch.tensor([[*request.prompt_ids, *generation.token_ids]])
    hidden = model.model(ids, use_cache=False).last_hidden_state
    start = len(request.prompt_ids)
    logprobs = torch.log_softmax(model.lm_head(hidden)[0, start - 1:-1].float() / temperature, -1)
    mtp = model.mtp_hidden_states(hidden, ids, torch.arange(ids.shape[1])[None])
    return logprobs, model.lm_head(mtp)[0, start - 2:-1].argmax(-1)


def acceptance(engine, *args):
    before = engine.draft_counts()
    found = engine.generate(*args)
    drafted, accepted = (now - then for now, then in zip(engine.draft_counts(), before, strict=True))
    return found, drafted, accepted


def test_main_model_and_drafter_compute_what_the_trainer_does(engine, folder):
    proof = prove_checkpoint(folder, "float32", engine, BOUND)
    assert proof.max_logprob_error <= BOUND
    held = engine.read_back({name: tuple(tensor.shape) for name, tensor in
                             engine_tensors(load_policy(folder), engine).items()})
    assert {"model.layers.3.mlp.gate.e_score_correction_bias", "model.layers.3.input_layernorm.weight",
            "model.layers.3.enorm.weight", "model.layers.3.eh_proj.weight"} <= set(held)


def test_greedy_texts_are_those_without_drafts_and_drafts_are_accepted_as_the_trainer_foretells(engine, trained):
    asked, drafted, accepted = requests(24), 0, 0
    found, engine_drafted, engine_accepted = acceptance(engine, asked, Sampling(0.0, 20))
    for request, generation in zip(asked, found, strict=True):
        logprobs, drafts = judged(trained, request, generation, 1.0)
        assert generation.token_ids == tuple(logprobs.argmax(-1).tolist())
        expected = logprobs.max(-1).values
        assert generation.logprobs == pytest.approx(expected.tolist(), abs=BOUND)
        t = 1  # the first token comes without a draft; an accepted one brings the token after it along
        while t < len(generation.token_ids):
            right = int(drafts[t]) == generation.token_ids[t]
            drafted, accepted, t = drafted + 1, accepted + right, t + 1 + right
    assert engine_drafted >= drafted > 200 and accepted > 0.4 * drafted
    # drafts that would stand behind the last token wanted are made and thrown away
    assert accepted <= engine_accepted <= accepted + len(asked)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_samples_are_distributed_as_without_drafts(engine, trained, temperature, top_p):
    """Two sums over all tokens with known mean and variance: how often the draft came out, and the log-prob."""
    asked, sums, variances = requests(160), torch.zeros(2), torch.zeros(2)
    found, drafted, accepted = acceptance(engine, asked, Sampling(temperature, 16, top_p))
    for request, generation in zip(asked, found, strict=True):
        logprobs, drafts = judged(trained, request, generation, temperature)
        if top_p < 1:
            ranked, order = logprobs.exp().sort(-1, descending=True)
            kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter(1, order, ranked.cumsum(-1) - ranked < top_p)
            logprobs = torch.log_softmax(logprobs.masked_fill(~kept, -math.inf), -1)
        tokens = torch.tensor(generation.token_ids)
        expected = logprobs.gather(1, tokens[:, None])[:, 0]
        assert generation.logprobs == pytest.approx(expected.tolist(), abs=BOUND)
        probabilities = logprobs.exp()
        finite = logprobs.masked_fill(probabilities == 0, 0)
        draft = probabilities.gather(1, drafts[:, None])[:, 0]
        entropy = -(probabilities * finite).sum(-1)
        for index, (seen, mean, variance) in enumerate([
                ((tokens == drafts).float(), draft, draft * (1 - draft)),
                (expected, -entropy, (probabilities * finite ** 2).sum(-1) - entropy ** 2)]):
            sums[index] += (seen - mean)[1:].sum()
            variances[index] += variance[1:].sum()
    assert drafted > 500 and 0.2 * drafted < accepted < 0.95 * drafted
    assert (sums / variances.sqrt()).abs().max() < 4


def test_a_completion_depends_on_its_seed_and_not_on_what_is_beside_it(engine):
    asked = requests(12)
    together = engine.generate(asked, Sampling(1.0, 12))
    assert [engine.generate([request], Sampling(1.0, 12))[0].token_ids for request in asked[:3]] == \
        [generation.token_ids for generation in together[:3]]
    other = Request(asked[0].prompt_ids, 99)
    assert engine.generate([other], Sampling(1.0, 12))[0].token_ids != together[0].token_ids


def test_completions_reach_the_end_of_the_context_and_no_further(engine):
    asked = [Request(tuple(ids), 0) for ids in chain(4, LENGTH - 9, 5).tolist()]
    asked.append(Request(tuple(chain(1, LENGTH - 1, 5)[0].tolist()), 0))
    assert [len(g.token_ids) for g in engine.generate(asked, Sampling(0.0, 40))] == [9, 9, 9, 9, 1]


def test_drafts_follow_a_policy_that_moves_only_with_its_mtp_module(engine, trained):
    model = train_on_the_chain(copy.deepcopy(trained), 60, rule=1)
    tensors = engine_tensors(model, engine)
    left_behind = {name: tensor for name, tensor in engine_tensors(trained, engine).items()
                   if is_mtp(trained.config, name)}
    mixed = tensors | left_behind
    engine.update(mixed, {name: checksum(tensor) for name, tensor in mixed.items()}, 1)
    asked, rates = requests(48, rule=1), []
    for sync in (False, True):
        if sync:
            assert sync_weights(model, engine, 2, BOUND).max_logprob_error <= BOUND
        found, drafted, accepted = acceptance(engine, asked, Sampling(0.0, 20))
        rates.append(accepted / drafted)
    assert rates[0] < 0.6 * rates[1], rates


def test_a_drafter_left_behind_is_caught(engine, trained):
    changed = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if is_mtp(changed.config, name):
                parameter *= 1.5
    tensors, stale = (engine_tensors(model, engine) for model in (changed, trained))
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    engine.update(stale, {name: checksum(tensor) for name, tensor in stale.items()}, 3)
    with pytest.raises(StageError, match="does not hold the trainer's .*model.layers.3"):
        _prove(changed, engine, tensors, checksums, BOUND)
    main = {name: tensor for name, tensor in tensors.items() if not is_mtp(changed.config, name)}
    with pytest.raises(StageError, match="log-probs of the drafter differ by .*engine.draft: false"):
        _prove(changed, engine, main, checksums, BOUND)
    with pytest.raises(StageError, match="no MTP weights were sent for the drafter"):
        engine.update(main, checksums, 4)
    assert sync_weights(changed, engine, 5, BOUND).max_logprob_error <= BOUND


def test_the_benchmark_measures_acceptance_and_speed(engine, folder, monkeypatch):
    """One engine stands for both sides here; the benchmark itself starts two."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import mtp_drafting

    assert mtp_drafting.checkpoints(folder) == [(folder.name, folder)]
    asked = mtp_drafting.requests(folder, folder, 4)
    assert len(asked) == 4
    rows = mtp_drafting.measure("tiny", engine, engine, requests(4), 2, Sampling(0.0, 12), rounds=1)
    assert [unit for _, _, unit in rows] == ["%", "tokens/s", "tokens/s", "x"]
    assert 0 < rows[0][1] <= 100 and min(figure for _, figure, _ in rows) > 0
    with pytest.raises(SystemExit, match="neither a checkpoint"):
        mtp_drafting.checkpoints(ROOT / "recipes")


def test_the_expansion_of_the_cpu_back_end_is_still_wrong(engine):
    """Pins the fault behind `drafting.expand_with_torch`; when this fails, that remedy can go."""

    def expand(_actor):
        from vllm.v1.sample import rejection_sampler

        expanded = torch.full((4,), -1.0)
        rejection_sampler._expand(expanded, torch.tensor([0.5, 0.25]), torch.tensor([1, 4], dtype=torch.int32), 0, 1)
        return expanded.tolist(), rejection_sampler.expand_batch_to_tokens(
            torch.tensor([0.5, 0.0]), torch.tensor([1, 4], dtype=torch.int32), 4, 0, 1).tolist()

    theirs, ours = ray.get(engine.actor.__ray_call__.remote(expand))
    assert theirs != [0.5, 0.25, 0.25, 0.25] and ours == [0.5, 1.0, 1.0, 1.0]


def test_an_engine_that_cannot_draft_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"num_nextn_predict_layers": 0}')
    with pytest.raises(StageError, match="engine.draft needs a model with an MTP module, and .* has none"):
        open_engine(tmp_path, CONFIG, dtype="float32", max_length=LENGTH, seed=0)
