"""Trainings on processes that Ray starts, as a stage does it."""

import re
from pathlib import Path

import layouts_on_processes as layouts
import pyarrow.parquet as pq
import pytest
import ray
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from test_packing import random_samples
from tiny_models import Quiet, save_tiny, tiny_tokenizer

from pipeline.progress import FileProgress, read_progress
from pipeline.stage import StageError
from policy.model import load_policy
from policy.parallel.processes import explained
from policy.training import read_curve
from sft.packing import pack_samples
from sft.trainer import train_sft

HERE = Path(__file__).parent


@pytest.fixture
def running_ray():
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {
            "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}:{HERE}"}})
    yield
    if mine:
        ray.shutdown()


def test_a_training_on_two_processes_is_that_of_one(tmp_path, running_ray):
    start = save_tiny(tmp_path / "start")
    made, _ = pack_samples(random_samples(40, 5), layouts.PACK, tiny_tokenizer().pad_token_id, seed=0)
    packs = tmp_path / "packs.parquet"
    pq.write_table(made.slice(0, 11), packs)
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


def test_what_processes_raised_is_told_by_rank_with_its_stack():
    def failed(raised):
        statuses = {rank: WorkerStatus(False, UserExceptionWithTraceback(error, f"Traceback: {error}"))
                    for rank, error in raised.items()}
        return WorkerGroupPollStatus(statuses).get_worker_group_error()  # as Ray Train makes it

    told = str(explained(failed({0: RuntimeError("closed by peer"), 3: RuntimeError("what one met")}), 4))
    assert told.startswith("2 of 4 processes of a training failed:")
    assert re.search(r"Rank 0 .*Traceback: closed by peer.*Rank 3 .*Traceback: what one met", told, re.DOTALL)
    told = explained(failed({0: RuntimeError("closed by peer"), 1: StageError("give a folder")}), 2)
    assert str(told) == "give a folder"
