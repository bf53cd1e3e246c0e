import json
import shutil
import time

import pyarrow.parquet as pq
import pytest
import torch
from test_packing import random_samples
from tiny_models import Killed, Quiet, save_tiny, tiny_tokenizer

from pipeline.recipe import TrainConfig
from pipeline.stage import StageError
from policy.average import WeightAverage
from policy.model import load_policy
from policy.training import COMPLETE, _Watch, last_checkpoint, read_curve
from sft.packing import IGNORE, pack_samples
from sft.trainer import train_sft

PACK = 32


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"batch_tokens": 4 * PACK, "pack_length": PACK, "packs_per_device": 4, "max_steps": 6,
                          "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 2, "mtp_lambda": 0.3,
                          "balance_alpha": 0.01, "bias_gamma": 1e-3, "save_steps": 3, **changes})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    made, _ = pack_samples(random_samples(80, 5), PACK, tiny_tokenizer().pad_token_id, seed=0)
    path = tmp_path_factory.mktemp("packs") / "packs.parquet"
    pq.write_table(made, path)
    return path


def train(folder, start, packs, progress=None, precision="dtype", **changes):
    """Train in folder/work into folder/out; returns the curve."""
    for name in ("work", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    train_sft(config(**changes), start=start, packs=packs, out=folder / "out", work=folder / "work", seed=0,
              dtype="float32", progress=progress or Quiet(), precision=precision)
    return read_curve(folder / "out/curve.jsonl")


def losses(curve):
    return [(row["step"], row["loss"], row["mtp_loss"], row["grad_norm"]) for row in curve]


def test_the_loss_does_not_depend_on_packs_per_device(tmp_path, start, packs):
    curves = [train(tmp_path / str(size), start, packs, packs_per_device=size, max_steps=3) for size in (1, 4)]
    assert [row["step"] for row in curves[0]] == [1, 2, 3]
    for one, four in zip(*curves, strict=True):
        for key in ("loss", "mtp_loss", "grad_norm"):
            assert one[key] == pytest.approx(four[key], rel=1e-5)
        assert one["max_violation"] == four["max_violation"]


def test_the_first_loss_is_cross_entropy_plus_mtp_plus_balance(tmp_path, start, packs):
    """Computed a second time from the formulas, over one step that holds every pack."""
    rows = pq.read_table(packs).to_pylist()
    curve = train(tmp_path, start, packs, batch_tokens=len(rows) * PACK, packs_per_device=len(rows), max_steps=1)
    ids, labels, positions = (torch.tensor([row[key] for row in rows])
                              for key in ("input_ids", "labels", "position_ids"))
    model = load_policy(start)
    with torch.no_grad():
        hidden = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
        following = torch.log_softmax(model.lm_head(hidden), -1)
        after = torch.log_softmax(model.lm_head(model.mtp_hidden_states(hidden, ids, positions)), -1)
    count, main, mtp = int((labels[:, 1:] != IGNORE).sum()), 0.0, 0.0
    for row in range(len(rows)):
        for t in range(PACK - 1):
            if labels[row, t + 1] != IGNORE:
                main -= float(following[row, t, labels[row, t + 1]])
            same_sample = t + 2 < PACK and positions[row, t + 2] == positions[row, t] + 2
            if same_sample and labels[row, t + 2] != IGNORE:
                mtp -= float(after[row, t, labels[row, t + 2]])
    assert curve[0]["mtp_loss"] == pytest.approx(mtp / count, rel=1e-5)
    balance = (curve[0]["loss"] - main / count - 0.3 * mtp / count) / 0.01
    assert 3 * 0.9 < balance < 3 * 1.5  # three routers, each near 1 when its load is even


def test_two_mtp_modules_follow_one_another_and_share_the_weight(tmp_path, packs):
    start = save_tiny(tmp_path / "start", mtp_depth=2)
    rows = pq.read_table(packs).to_pylist()
    curve = train(tmp_path, start, packs, batch_tokens=len(rows) * PACK, packs_per_device=len(rows), max_steps=1,
                  warmup_steps=0)
    ids, labels, positions = (torch.tensor([row[key] for row in rows])
                              for key in ("input_ids", "labels", "position_ids"))
    model, total, seen = load_policy(start), 0.0, 0
    with torch.no_grad():
        states = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
        for depth in (1, 2):
            states = model.mtp_hidden_states(states, ids, positions, depth=depth)
            logprobs = torch.log_softmax(model.lm_head(states), -1)
            right, seen = 0, 0
            for row in range(len(rows)):
                for t in range(PACK - depth - 1):
                    label = labels[row, t + depth + 1]
                    if positions[row, t + depth + 1] == positions[row, t] + depth + 1 and label != IGNORE:
                        total -= float(logprobs[row, t, label])
                        right, seen = right + int(logprobs[row, t].argmax() == label), seen + 1
            assert curve[0]["mtp_accuracy" if depth == 1 else "mtp_accuracy_2"] == pytest.approx(right / seen)
    count = int((labels[:, 1:] != IGNORE).sum())
    assert curve[0]["mtp_loss"] == pytest.approx(total / 2 / count, rel=1e-5)
    before, after = load_policy(start).state_dict(), load_policy(tmp_path / "out/checkpoint").state_dict()
    for module in (3, 4):
        assert not torch.equal(before[f"model.layers.{module}.eh_proj.weight"],
                               after[f"model.layers.{module}.eh_proj.weight"])


@pytest.mark.parametrize("optimizer", [{}, {"muon_learning_rate": 0.01}], ids=["adamw", "muon"])
def test_without_trunk_gradient_the_main_model_trains_bit_for_bit_as_without_mtp(tmp_path, start, packs, optimizer):
    """Gradients are clipped in every step, and the packs of a step go one by one."""
    runs = {"without": {"mtp_lambda": 0.0}, "apart": {"mtp_lambda": 0.3, "mtp_trunk_gradient": False},
            "joined": {"mtp_lambda": 0.3}}
    states, curves = {}, {}
    for name, changes in runs.items():
        curves[name] = train(tmp_path / name, start, packs, packs_per_device=2, max_steps=3, max_grad_norm=0.1,
                             balance_alpha=0.0, **optimizer, **changes)
        states[name] = load_policy(tmp_path / name / "out/checkpoint").state_dict()
    differ = {name: {key for key in states["without"] if not torch.equal(states["without"][key], states[name][key])}
              for name in ("apart", "joined")}
    assert differ["apart"] and all(key.startswith("model.layers.3.") for key in differ["apart"])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= differ["joined"]
    assert [row["grad_norm"] for row in curves["apart"]] == [row["grad_norm"] for row in curves["without"]]
    assert curves["apart"][0]["grad_norm"] > 0.1 and "mtp_loss" not in curves["without"][0]


@pytest.mark.parametrize("optimizer", [{"ema_decay": 0.9}, {"muon_learning_rate": 0.01}, {"precision": "fp8"},
                                       {"muon_learning_rate": 0.01, "precision": "fp8"}],
                         ids=["adamw-ema", "muon", "fp8-adamw", "fp8-muon"])
def test_a_run_killed_after_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path, start, packs, optimizer):
    unbroken = train(tmp_path / "unbroken", start, packs, **optimizer)
    with pytest.raises(Killed):
        train(tmp_path / "killed", start, packs, Quiet(kill_at=4), **optimizer)
    assert [row["step"] for row in read_curve(tmp_path / "killed/work/curve.jsonl")] == [1, 2, 3, 4]
    progress = Quiet()
    resumed = train(tmp_path / "killed", start, packs, progress, **optimizer)
    assert progress.done == 6
    assert losses(resumed) == losses(unbroken)
    final = [load_policy(tmp_path / name / "out/checkpoint").state_dict() for name in ("unbroken", "killed")]
    assert [name for name in final[0] if not torch.equal(final[0][name], final[1][name])] == []
    if "ema_decay" in optimizer:
        averages = [load_policy(tmp_path / name / "out/checkpoint-ema").state_dict() for name in ("unbroken", "killed")]
        assert [name for name in averages[0] if not torch.equal(averages[0][name], averages[1][name])] == []
    before = load_policy(start).state_dict()
    moved = [name for name in before if not torch.equal(before[name], final[0][name])]
    assert {"model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.3.eh_proj.weight",
            "model.layers.3.mlp.gate.e_score_correction_bias"} <= set(moved)


def test_the_exported_average_is_the_formula_over_every_steps_weights_however_slow_its_thread(
        tmp_path, start, packs, monkeypatch):
    fold, on_save, after_each_step = WeightAverage._fold, _Watch.on_save, []

    def slowly(self, weights):
        time.sleep(0.1)  # long enough for the next forward and backward pass to be over
        fold(self, weights)

    def remember(self, args, state, control, model, **kwargs):
        after_each_step.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return on_save(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(WeightAverage, "_fold", slowly)
    monkeypatch.setattr(WeightAverage, "save", lambda self, folder: None)  # saving waits, which hides a missing wait
    monkeypatch.setattr(_Watch, "on_save", remember)
    train(tmp_path, start, packs, ema_decay=0.8, save_steps=1)
    exported, expected = load_policy(tmp_path / "out/checkpoint-ema").state_dict(), load_policy(start).state_dict()
    assert len(after_each_step) == 6
    for weights in after_each_step:
        for name in expected:
            expected[name].lerp_(weights[name], 1 - 0.8)
    assert [name for name in expected if not torch.equal(expected[name], exported[name])] == []
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert not torch.equal(exported[bias], after_each_step[-1][bias])


def test_a_checkpoint_without_an_average_cannot_be_resumed_with_one(tmp_path, start, packs):
    with pytest.raises(Killed):
        train(tmp_path, start, packs, Quiet(kill_at=4))
    with pytest.raises(FileNotFoundError, match="average.safetensors"):
        train(tmp_path, start, packs, ema_decay=0.9)


def test_fp8_follows_the_loss_of_exact_products_with_half_the_moments(tmp_path, start, packs):
    curves = {precision: train(tmp_path / precision, start, packs, precision=precision, max_steps=12,
                               learning_rate=5e-3)
              for precision in ("dtype", "fp8")}
    for exact, ours in zip(*curves.values(), strict=True):
        assert ours["loss"] == pytest.approx(exact["loss"], rel=0.01)
    assert curves["fp8"][-1]["loss"] < 0.97 * curves["fp8"][0]["loss"]
    assert losses(curves["fp8"]) != losses(curves["dtype"])
    saved = {precision: sum(value.nbytes for state in torch.load(
                 tmp_path / precision / "work/checkpoint-12/optimizer.pt")["state"].values()
                            for name, value in state.items() if name != "step") for precision in curves}
    assert 2 * saved["fp8"] == saved["dtype"] > 0


def test_a_run_that_ended_inside_an_epoch_trains_no_step_more(tmp_path, start, packs):
    first = train(tmp_path, start, packs)
    weights = load_policy(tmp_path / "out/checkpoint").state_dict()
    shutil.rmtree(tmp_path / "out")  # as if the disk had been full when the result was written
    assert losses(train(tmp_path, start, packs)) == losses(first)
    again = load_policy(tmp_path / "out/checkpoint").state_dict()
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []


def test_a_curve_line_that_a_full_disk_cut_short_does_not_count(tmp_path):
    (tmp_path / "curve.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": ')
    assert read_curve(tmp_path / "curve.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_half_written_checkpoint_is_removed_and_the_whole_one_before_it_used(tmp_path):
    for step, whole in ((3, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_kill_before_a_checkpoint_is_marked_whole_leaves_the_one_before_it(tmp_path, start, packs, monkeypatch):
    on_save = _Watch.on_save

    def killed_at_the_second(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed("between the last file and the marker")
        return on_save(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_Watch, "on_save", killed_at_the_second)
        with pytest.raises(Killed):
            train(tmp_path, start, packs, save_steps=2)
    assert last_checkpoint(tmp_path / "work") == str(tmp_path / "work/checkpoint-2")


def test_one_whole_checkpoint_is_left_when_training_ends(tmp_path, start, packs):
    train(tmp_path, start, packs, save_steps=2)
    assert [path.name for path in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-6"]


def test_no_packs_is_a_clear_error(tmp_path, start, packs):
    empty = tmp_path / "packs.parquet"
    pq.write_table(pq.read_table(packs).slice(0, 0), empty)
    with pytest.raises(StageError, match="no packs to train on"):
        train(tmp_path, start, empty)


def test_a_loss_that_is_not_a_number_is_a_clear_error(tmp_path, packs):
    broken = save_tiny(tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="not a number; lower the stage's learning_rate"):
        train(tmp_path, broken, packs, max_steps=1)
    assert json.loads((tmp_path / "work/curve.jsonl").read_text().splitlines()[0])["step"] == 1
