"""Trainings on processes that Ray starts, as a stage does it."""

import time
from pathlib import Path

import layouts_on_processes as layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from test_packing import random_samples
from tiny_models import Quiet, save_tiny, tiny_tokenizer
from torch import distributed

from pipeline.progress import FileProgress, read_progress
from pipeline.stage import StageError
from policy.model import load_policy
from policy.parallel.processes import run_on_processes
from policy.training import read_curve
from sft.packing import pack_samples
from sft.trainer import train_sft

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def running_ray():
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {
            "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}:{HERE}"}})
    yield
    if mine:
        ray.shutdown()


def test_a_training_on_two_processes_is_that_of_one(tmp_path):
    start = save_tiny(tmp_path / "start")
    made, _ = pack_samples(random_samples(40, 5), layouts.PACK, tiny_tokenizer().pad_token_id, seed=0)
    packs = tmp_path / "packs.parquet"
    pq.write_table(pa.Table.from_pylist([vars(pack) for pack in made[:11]]), packs)
    progress = FileProgress(tmp_path / "progress.json")
    metrics = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        for name in ("out", "work"):
            (folder / name).mkdir(parents=True)
        config = layouts.config({"processes": processes, "expert": processes, "dispatch": "exact"})
        metrics.append(train_sft(config, start=start, packs=packs, out=folder / "out", work=folder / "work", seed=3,
                                 dtype="float32", progress=Quiet() if processes == 1 else progress))
    one, two = (read_curve(tmp_path / f"{processes}/out/curve.jsonl") for processes in (1, 2))
    for key in ("loss", "mtp_loss", "grad_norm", "max_violation"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5), key
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-5) and metrics[1]["steps"] == 2
    weights = [load_policy(tmp_path / f"{processes}/out/checkpoint").state_dict() for processes in (1, 2)]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5
    state = read_progress(tmp_path / "progress.json")  # written by the process of rank 0
    assert (state.done, state.total, state.unit) == (2, 2, "steps")
    progress.close()


def fails_on_one() -> None:
    if distributed.get_rank() == 1:
        raise RuntimeError("what one process met")
    distributed.barrier()


def test_one_process_that_fails_ends_them_all_and_is_named(tmp_path):
    started = time.monotonic()
    with pytest.raises(StageError, match="(?s)by rank:.*1.*what one process met"):
        run_on_processes(fails_on_one, 2, tmp_path)
    assert time.monotonic() - started < 120  # the other one does not wait for its time-out
