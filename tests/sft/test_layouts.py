"""Data parallel, FSDP2, expert parallel, both and the pipeline, on 2 and 4 gloo processes, against one process."""

import filecmp
import json
import multiprocessing

import layouts_on_processes as layouts
import pyarrow.parquet as pq
import pytest
import torch
from test_packing import random_samples
from tiny_models import save_tiny, tiny_tokenizer

from policy.model import load_policy, save_policy
from policy.training import read_curve
from sft.packing import pack_samples

SHAPES = [(processes, name) for processes in (2, 4) for name in layouts.EXACT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four processes left, and beside it `1/` and `1-7/` of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    for layers in sorted(set(layouts.LAYERS.values())):
        save_tiny(folder / f"start-{layers}", layers=layers)
    packs, _ = pack_samples(random_samples(40, 5), layouts.PACK, tiny_tokenizer().pad_token_id, seed=0)
    # the second step is not full, nor is its last round of 2 or 4 processes
    packs = packs.slice(0, 2 * layouts.PACKS - 3)
    pq.write_table(packs, folder / "packs.parquet")
    context = multiprocessing.get_context("forkserver")  # torch and TRL are imported once for all of them
    context.set_forkserver_preload([layouts.__name__])
    processes = [context.Process(target=layouts.run_process, args=(rank, folder), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    try:
        layouts.train(folder / "1", folder / "start-3", folder / "packs.parquet")
        layouts.train(folder / "1-7", folder / "start-7", folder / "packs.parquet")
        for process in processes:
            process.join(2 * layouts.SECONDS)
    finally:
        for process in processes:
            process.kill()
    failed = "\n".join(f"rank {rank}, exit code {process.exitcode}:\n{(folder / f'{rank}.log').read_text()[-3000:]}"
                       for rank, process in enumerate(processes) if process.exitcode != 0)
    assert not failed, failed
    return folder


def first_step(folder):
    return torch.load(folder / "first_step.pt")


def gradient_error(one, other):
    """The largest relative L2 difference of a tensor's gradient."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize(("processes", "name"), SHAPES)
def test_loss_and_gradients_do_not_depend_on_the_layout(folder, processes, name):
    here, there = (read_curve(folder / run / "out/curve.jsonl") for run in ("1", f"{processes}/{name}"))
    assert [row["step"] for row in there] == [1, 2]
    for one, many in zip(here, there, strict=True):
        for key in ("loss", "mtp_loss", "grad_norm"):
            assert many[key] == pytest.approx(one[key], rel=1e-5), key
        assert many["max_violation"] == one["max_violation"]
    error = gradient_error(*(first_step(folder / run)["gradients"] for run in ("1", f"{processes}/{name}")))
    assert error < 1e-5


def test_the_layouts_that_recompute_did(folder):
    runs = {run.parents[1].relative_to(folder).as_posix() for run in folder.glob("**/out/checkpoint")}
    assert len(runs) == 2 + len(SHAPES) + 1
    did = {run for run in runs if (folder / run / "recomputed").exists()}
    assert did == {f"4/{name}" for name in layouts.RECOMPUTED}


@pytest.mark.parametrize("processes", [2, 4])
def test_loss_and_gradients_of_the_pipeline_are_those_of_one_process(folder, processes):
    one = folder / ("1" if layouts.LAYERS[processes] == 3 else "1-7")
    loss = json.loads((folder / f"{processes}/pp/loss.json").read_text())
    assert loss == pytest.approx(read_curve(one / "out/curve.jsonl")[0]["loss"], rel=1e-5)
    error = gradient_error(first_step(one)["gradients"], first_step(folder / f"{processes}/pp")["gradients"])
    assert error < 1e-5


def test_tokens_sent_in_fp8_move_loss_and_gradients_by_little(folder):
    one, fp8 = (read_curve(folder / run / "out/curve.jsonl")[0] for run in ("1", "4/fsdp-ep-fp8"))
    assert 0 < abs(fp8["loss"] / one["loss"] - 1) < 1e-3
    before, after = (torch.cat([gradient.flatten() for gradient in first_step(folder / run)["gradients"].values()])
                     for run in ("1", "4/fsdp-ep-fp8"))
    assert 1e-5 < (after - before).norm() / before.norm() < 0.02


@pytest.mark.parametrize(("processes", "name"), SHAPES)
def test_the_balance_bias_moves_as_on_one_process(folder, processes, name):
    one, many = (load_policy(folder / run / "out/checkpoint").state_dict() for run in ("1", f"{processes}/{name}"))
    biases = [tensor for tensor in one if tensor.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for bias in biases:
        assert torch.equal(one[bias], many[bias])
    assert max(float((one[tensor] - many[tensor]).abs().max()) for tensor in one) < 1e-5


def test_each_process_holds_its_part(folder):
    whole = first_step(folder / "1")["held"]
    share = {name: first_step(folder / f"4/{name}")["held"] / whole for name in layouts.LAYOUTS}
    assert share["dp"] == 1 and 0.5 < share["ep"] < 1
    assert share["fsdp"] < 0.27 and share["fsdp-ep"] < 0.27


def test_a_checkpoint_moves_through_every_layout_bit_for_bit(folder, tmp_path):
    """Loaded in another layout and saved, it is the folder that one process writes, each file of it."""
    names = list(layouts.LAYOUTS)
    moves = [(name, folder / f"4/{source}/out/checkpoint", folder / f"4/{name}/from-{source}")
             for name, source in zip(names, [*names[1:], names[0]], strict=True)]
    moves.append(("pp", folder / "start-7", folder / "4/pp/from-start-7"))
    for name, source, moved in moves:
        save_policy(load_policy(source), tiny_tokenizer(), tmp_path / name)
        files = sorted(file.name for file in moved.iterdir())
        assert files == sorted(file.name for file in (tmp_path / name).iterdir())
        for file in files:
            assert filecmp.cmp(moved / file, tmp_path / name / file, shallow=False), f"{name}: {file}"
        assert filecmp.cmp(moved / "model.safetensors", source / "model.safetensors", shallow=False), name


def test_a_training_on_many_processes_resumes_as_if_it_had_not_died(folder):
    assert (folder / "4/fsdp-ep/killed").exists()
    assert [row["step"] for row in read_curve(folder / "4/fsdp-ep/out/curve.jsonl")] == [1, 2]
    files = sorted(path.name for path in (folder / "4/fsdp-ep/work/checkpoint-2").iterdir())
    assert {"complete", "optimizer.pt", "rng_state_3.pth", "state.safetensors"} <= set(files)
