import json
import math

import pytest
import torch
from scripted_rollouts import ScriptedEngine, make_prompts, scripted_scorer
from tiny_models import Killed, Quiet, save_tiny
from transformers import TrainerCallback

from pipeline.recipe import GrpoConfig
from pipeline.records import Rollout, read_table
from pipeline.stage import StageError
from policy.model import load_policy, read_checkpoint
from policy.tokenizer import load_tokenizer
from policy.training import read_curve
from rl.grpo import train_grpo
from rl.trainer import VerifiedGRPOTrainer, group_advantages, prompt_schedule

PROMPTS = make_prompts(8)
MIXED = (0.0, 1.0, 1.0, 0.0)


def config(**changes) -> GrpoConfig:
    return GrpoConfig(**{"steps": 2, "prompts_per_step": 4, "group_size": 4, "mini_batches": 1, "device_batch": 4,
                         "learning_rate": 1e-3, "max_completion_length": 12, "kl_coef": 0.01, "save_steps": 100,
                         **changes})


def by_group(*rewards):
    """Rewards of the groups of a step, the same in every step; each a tuple over the group's rows."""
    flat = [reward for group in rewards for reward in group]
    return scripted_scorer(lambda step, row: flat[row])


ALL_MIXED = by_group(MIXED, MIXED, MIXED, MIXED)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("start"))


def make_trainer(folder, start, scorer=ALL_MIXED, engine=None, cls=VerifiedGRPOTrainer, **changes):
    work = folder / "work"
    trainer = cls(config(**changes), PROMPTS, engine or ScriptedEngine(start, folder / "engine"), scorer,
                  load_policy(start), load_tokenizer(start), work, 0, 1e-4)
    trainer.watch(Quiet(), work / "curve.jsonl", 0.0)
    return trainer


def train(folder, start, scorer=ALL_MIXED, engine=None, progress=None, precision="dtype", **changes):
    for name in ("work", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return train_grpo(config(**changes), start=start, prompts=PROMPTS, scorer=scorer, out=folder / "out",
                      engine=engine or ScriptedEngine(start, folder / "engine"), work=folder / "work", seed=0,
                      dtype="float32", max_logprob_error=1e-4, progress=progress or Quiet(), precision=precision)


class KeepGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                         if parameter.grad is not None}


def first_gradient(folder, start, **options):
    """The gradient of the first optimizer step, not clipped."""
    trainer = make_trainer(folder, start, steps=1, max_grad_norm=1e9, **options)
    keep = KeepGradient()
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradient


def assert_same(one, two):
    size = max(gradient.abs().max() for gradient in one.values())
    for name in one.keys() | two.keys():
        zero = torch.zeros(())
        assert (one.get(name, zero) - two.get(name, zero)).abs().max() <= 1e-5 * size, name
    assert size > 0


def first_slots(trainer):
    """The slots of the first generation batch, prepared without training on them."""
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer._buffered_inputs


def test_every_prompt_comes_before_any_comes_again():
    schedule = prompt_schedule(PROMPTS, 20, seed=3)
    assert sorted(schedule[:8]) == sorted(schedule[8:16]) == list(range(8)) and len(schedule) == 20
    assert schedule[:8] != schedule[8:16] and schedule == prompt_schedule(PROMPTS, 20, seed=3)
    assert schedule != prompt_schedule(PROMPTS, 20, seed=4)


def test_advantages_are_normalised_in_the_group_over_rows_with_a_reward():
    found = group_advantages([0.0, 1.0, 1.0, None, 0.5, 0.5, 0.5, 0.5, None, None, None, 1.0], 4)
    spread = math.sqrt(1 / 3) + 1e-4
    assert found[:3] == pytest.approx([-2 / 3 / spread, 1 / 3 / spread, 1 / 3 / spread])
    assert found[3] is None and found[4:8] == [0.0] * 4 and found[8:] == [None, None, None, 0.0]


class KeepAll(VerifiedGRPOTrainer):
    def _trainable_groups(self, rows, indices, step):
        super()._trainable_groups(rows, indices, step)
        return list(range(len(rows)))


def test_dropping_groups_without_variance_leaves_the_gradient_as_it_is(tmp_path, start):
    scorer = by_group(MIXED, (1.0,) * 4, (0.0, 0.0, 1.0, 0.0), (0.0,) * 4)
    dropped = first_gradient(tmp_path / "dropped", start, scorer=scorer, kl_coef=0)
    kept = first_gradient(tmp_path / "kept", start, scorer=scorer, kl_coef=0, cls=KeepAll)
    assert_same(dropped, kept)


@pytest.mark.parametrize("device_batch", [2, 16])
def test_the_gradient_does_not_depend_on_device_batch(tmp_path, start, device_batch):
    scorer = by_group(MIXED, (1.0,) * 4, (0.0, 0.0, 1.0, 0.0), MIXED)  # 12 rows fill slots of 16 in part
    other = first_gradient(tmp_path / "other", start, scorer=scorer, device_batch=device_batch)
    assert_same(first_gradient(tmp_path / "four", start, scorer=scorer), other)


def mtp_names(gradient):
    return {name for name in gradient if name.startswith("model.layers.3.")}


def test_an_mtp_loss_kept_from_the_trunk_leaves_its_gradient_as_it_is_bit_for_bit(tmp_path, start):
    without = first_gradient(tmp_path / "without", start)
    apart = first_gradient(tmp_path / "apart", start, mtp_lambda=0.3)
    assert not mtp_names(without) and mtp_names(apart) == apart.keys() - without.keys()
    assert all(torch.equal(without[name], apart[name]) for name in without)
    assert apart["model.layers.3.eh_proj.weight"].abs().max() > 0
    joined = first_gradient(tmp_path / "joined", start, mtp_lambda=0.3, mtp_trunk_gradient=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert not torch.equal(without[name], joined[name])


def test_a_policy_trains_the_same_beside_an_mtp_module_kept_apart(tmp_path, start):
    """Over clipped steps, to the last bit; the module itself learns."""
    for name, mtp in (("without", 0.0), ("apart", 0.5)):
        train(tmp_path / name, start, mtp_lambda=mtp, max_grad_norm=0.01, learning_rate=1e-2, steps=3)
    states = [load_policy(tmp_path / name / "out/checkpoint").state_dict() for name in ("without", "apart")]
    differ = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differ and differ == mtp_names(differ)
    curve = read_curve(tmp_path / "apart/out/curve.jsonl")
    assert all({"mtp_loss", "mtp_accuracy", "mtp_grad_norm"} <= row.keys() for row in curve)


def test_the_mtp_loss_is_the_cross_entropy_of_completion_tokens_averaged_by_row(tmp_path, start):
    trainer = make_trainer(tmp_path, start, by_group(MIXED, (1.0,) * 4, MIXED, (0.0,) * 4), steps=1, mtp_lambda=1.0)
    trainer.train()
    kept = []
    model = load_policy(start)
    for prompt_ids, generation, _ in trainer._kept:
        ids = torch.tensor([[*prompt_ids, *generation.token_ids]])
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            hidden = model.model(ids, use_cache=False).last_hidden_state
            logprobs = torch.log_softmax(model.lm_head(model.mtp_hidden_states(hidden, ids, positions)), -1)
        count = len(generation.token_ids)
        kept.append(-logprobs[0, -count - 1:-1].gather(1, ids[0, -count:, None]).mean().item())
    curve = read_curve(tmp_path / "work/curve.jsonl")
    assert len(kept) == 8 and curve[0]["mtp_loss"] == pytest.approx(sum(kept) / 8, rel=1e-5)


def test_an_mtp_loss_without_an_mtp_module_is_refused(tmp_path):
    plain = save_tiny(tmp_path / "plain", mtp_depth=0)
    with pytest.raises(StageError, match="rl.mtp_lambda 0.1 needs a model with an MTP module"):
        make_trainer(tmp_path, plain, mtp_lambda=0.1)


@pytest.mark.parametrize("device_batch", [2, 16])
def test_the_mtp_gradient_does_not_depend_on_device_batch(tmp_path, start, device_batch):
    four, other = (first_gradient(tmp_path / str(size), start, mtp_lambda=0.3, device_batch=size)
                   for size in (4, device_batch))
    assert_same({name: four[name] for name in mtp_names(four)}, {name: other[name] for name in mtp_names(other)})


def test_losses_do_not_depend_on_device_batch_over_steps(tmp_path, start):
    curves = []
    for size in (4, 8):
        train(tmp_path / str(size), start, device_batch=size, mini_batches=2, kl_coef=1.0, learning_rate=1e-4)
        curves.append(read_curve(tmp_path / str(size) / "out/curve.jsonl"))
    for four, eight in zip(*curves, strict=True):
        assert four["loss"] == pytest.approx(eight["loss"], rel=1e-3, abs=1e-6)
        assert four["grad_norm"] == pytest.approx(eight["grad_norm"], rel=1e-3)
    assert curves[0][-1]["loss"] != 0


def test_rows_are_cut_into_slots_once_each_with_their_own_mini_batch_and_width(tmp_path, start):
    scorer = by_group(MIXED, (1.0,) * 4, MIXED, MIXED)
    trainer = make_trainer(tmp_path, start, scorer, device_batch=2, mini_batches=2)
    slots = first_slots(trainer)
    # 8 slots of 2 rows; of three kept groups two fall into the first mini-batch and one into the second
    assert [None if slot is None else len(slot["completion_ids"]) for slot in slots] == [2, 2, 2, 2, 2, 2, None, None]
    generations = [generation for _, generation, _ in trainer._kept]
    group_of = {generation.token_ids: index // 4 for index, generation in enumerate(generations)}
    seen = []
    for index, slot in enumerate(slots[:6]):
        assert slot["completion_mask"].sum(1).max() == slot["completion_ids"].shape[1]
        assert slot["prompt_mask"].sum(1).max() == slot["prompt_ids"].shape[1]
        assert slot["prompt_mask"][:, -1].all()
        for key in ("old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio", "completion_mask"):
            assert slot[key].shape == slot["completion_ids"].shape
        for ids, mask in zip(slot["completion_ids"], slot["completion_mask"], strict=True):
            tokens = tuple(ids[mask.bool()].tolist())
            seen.append(tokens)
            assert (group_of[tokens] % 2 == 1) == (index >= 4)
    assert sorted(seen) == sorted(generation.token_ids for generation in generations)


def test_passes_cut_to_their_rows_give_every_row_its_own_log_probs(tmp_path, start):
    trainer = make_trainer(tmp_path, start, device_batch=4, temperature=1.0)
    slots = [slot for slot in first_slots(trainer) if slot is not None]
    sampled = {generation.token_ids: torch.tensor(generation.logprobs) for _, generation, _ in trainer._kept}
    assert len({len(tokens) for tokens in sampled}) > 3
    for slot in slots:
        for row, mask in enumerate(slot["completion_mask"].bool()):
            tokens = tuple(slot["completion_ids"][row][mask].tolist())
            for key in ("old_per_token_logps", "ref_per_token_logps"):
                assert (slot[key][row][mask] - sampled[tokens]).abs().max() < 1e-4


def test_a_batch_without_a_trainable_group_is_no_work_and_no_error(tmp_path, start):
    trainer = make_trainer(tmp_path, start, by_group(*[(1.0,) * 4] * 4))
    assert first_slots(trainer) == [None] * 4
    assert trainer.compute_loss(trainer.model, None).item() == 0.0
    metrics, states = train(tmp_path / "run", start, by_group(*[(1.0,) * 4] * 4))
    assert states == {"zero_variance": 8} and metrics["rollout_reward_last"] == 1.0


def test_rows_without_a_reward_leave_the_baseline_and_the_training(tmp_path, start):
    scorer = by_group((0.0, 1.0, 1.0, None), (None,) * 4, (1.0, None, None, None), MIXED)
    trainer = make_trainer(tmp_path, start, scorer)
    slots = first_slots(trainer)
    assert trainer.unscored == {"seen": 16, "infra_error": 8}
    advantages = {}
    for slot in slots:
        for ids, mask, advantage in zip(*(slot[key] for key in ("completion_ids", "completion_mask", "advantages")),
                                        strict=True) if slot else ():
            advantages[tuple(ids[mask.bool()].tolist())] = advantage.item()
    assert len(trainer._kept) == 8  # the two groups with fewer than two rewards are not trained on
    found = [advantages.pop(generation.token_ids) for _, generation, _ in trainer._kept[:3]]
    assert found == pytest.approx(group_advantages([0.0, 1.0, 1.0], 3), rel=1e-4)
    assert set(advantages) == {generation.token_ids for _, generation, _ in trainer._kept[4:]}
    ledger = [json.loads(line)["state"] for line in
              (tmp_path / "work/rollouts/000000.jsonl").read_text().splitlines()]
    assert ledger == ["trained", "infra_error", "infra_error", "trained"]
    rollouts = read_table(tmp_path / "work/rollouts/000000.parquet", Rollout)
    assert [rollout.reward for rollout in rollouts[:4]] == [0.0, 1.0, 1.0, None]
    assert rollouts[3].advantage is None and [r.advantage for r in rollouts[:3]] == pytest.approx(found, rel=1e-4)


def test_too_many_infra_errors_stop_the_run(tmp_path, start):
    scorer = by_group((None, None, 0.0, 1.0), MIXED, MIXED, MIXED)
    with pytest.raises(StageError, match=r"2 of 16 verdicts are infrastructure errors, above .*budget 0\.001"):
        train(tmp_path, start, scorer, infra_error_budget=0.001)


def test_log_probs_that_drift_stop_the_run(tmp_path, start):
    with pytest.raises(StageError, match=r"rl step 0: .* differ by 0\.5.*above max_drift 0\.1"):
        train(tmp_path, start, engine=ScriptedEngine(start, tmp_path / "engine", shift=0.5))


def test_an_engine_that_keeps_old_weights_stops_the_run(tmp_path, start):
    engine = ScriptedEngine(start, tmp_path / "engine", stale=True)
    with pytest.raises(StageError, match="weight sync: the engine does not hold the trainer's"):
        train(tmp_path, start, engine=engine)
    assert engine.versions == [0, 1]  # the first load was right, as nothing had changed yet


def test_a_prompt_too_long_is_left_out_and_written_down(tmp_path, start):
    room = max(len(load_tokenizer(start)(p.messages[0]["content"])["input_ids"]) for p in PROMPTS) + 3
    engine = ScriptedEngine(start, tmp_path / "engine", room=room)
    _, states = train(tmp_path, start, engine=engine)
    assert states["prompt_too_long"] >= 1 and sum(states.values()) == 8


def test_the_ledger_has_every_prompt_once_and_the_rollouts_every_row(tmp_path, start):
    metrics, states = train(tmp_path, start, by_group(MIXED, (1.0,) * 4, MIXED, (None,) * 4), infra_error_budget=1.0)
    lines = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    assert sorted(line["prompt_id"] for line in lines) == sorted(prompt.problem.id for prompt in PROMPTS)
    assert [line["step"] for line in lines] == [0] * 4 + [1] * 4
    assert states == {"trained": 4, "zero_variance": 2, "infra_error": 2}
    rollouts = read_table(tmp_path / "out/rollouts.parquet", Rollout)
    assert len(rollouts) == 32 and len({rollout.id for rollout in rollouts}) == 32
    assert [rollout.policy_version for rollout in rollouts] == [0] * 16 + [1] * 16
    assert all(len(rollout.logprobs) == len(rollout.completion_ids) for rollout in rollouts)
    assert metrics["steps"] == 2 and metrics["drift_max"] < 1e-4 and metrics["sync_logprob_error_max"] < 1e-4


def test_a_killed_run_goes_on_with_the_same_losses_reference_and_ledger(tmp_path, start):
    settings = dict(steps=4, save_steps=2, reference_steps=2, mini_batches=2, device_batch=4, kl_coef=0.5)
    train(tmp_path / "unbroken", start, **settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed", start, progress=Quiet(kill_at=3), **settings)
    train(tmp_path / "killed", start, **settings)
    curves = [read_curve(tmp_path / name / "out/curve.jsonl") for name in ("unbroken", "killed")]
    assert [row["step"] for row in curves[0]] == [2, 4, 6, 8]
    for key in ("loss", "grad_norm", "kl", "reward", "sampling/sampling_logp_difference/mean"):
        assert [row[key] for row in curves[0]] == [row[key] for row in curves[1]], key
    assert curves[0][-1]["kl"] > 0
    ledgers = [(tmp_path / name / "out/ledger.jsonl").read_text() for name in ("unbroken", "killed")]
    assert ledgers[0] == ledgers[1] and len(ledgers[0].splitlines()) == 16
    digests = [read_checkpoint(tmp_path / name / "out/checkpoint").digest for name in ("unbroken", "killed")]
    assert digests[0] == digests[1] != read_checkpoint(start).digest


def test_the_bias_is_frozen_by_default_and_moves_with_a_gamma(tmp_path, start):
    before = load_policy(start).state_dict()
    for gamma in (0.0, 0.01):
        train(tmp_path / str(gamma), start, steps=1, bias_gamma=gamma)
        after = load_policy(tmp_path / str(gamma) / "out/checkpoint").state_dict()
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert torch.equal(before[name], after[name]) == (gamma == 0.0)


def test_no_prompts_is_a_clear_error(tmp_path, start):
    with pytest.raises(StageError, match="no prompts; give the domains rows in the rl split"):
        train_grpo(config(), start=start, prompts=[], engine=None, scorer=ALL_MIXED, out=tmp_path, work=tmp_path,
                   seed=0, dtype="float32", max_logprob_error=1e-4, progress=Quiet())


def test_fp8_shows_in_the_drift_and_neither_in_the_proof_nor_in_the_first_kl(tmp_path, start):
    for precision in ("dtype", "fp8"):
        train(tmp_path / precision, start, precision=precision)
    exact, ours = (read_curve(tmp_path / precision / "out/curve.jsonl") for precision in ("dtype", "fp8"))
    key = "sampling/sampling_logp_difference/mean"
    for row in ours:
        assert row["sync_logprob_error"] < 1e-4  # the proof multiplies exactly
        assert 1e-4 < row[key] < 0.05
    assert exact[0][key] < 1e-5
    assert ours[0]["kl"] == 0  # the reference multiplies in FP8 too
    assert ours[1]["kl"] > 0
    weights = [load_policy(tmp_path / precision / "out/checkpoint").state_dict() for precision in ("dtype", "fp8")]
    assert weights[0].keys() == weights[1].keys()
