"""Start the processes of one training: Ray Train places them, joins them by torch.distributed and watches them.

On a machine without GPUs they talk by gloo, with GPUs by NCCL, one GPU each (not run on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.stage import StageError

SILENCE_SECONDS = 1800  # in one collective: then each process fails and says where it stood


def run_on_processes(function: Callable[[], None], count: int, folder: Path) -> None:
    """Call `function` in `count` processes that form one torch.distributed group; wait for all.

    Ends all of them when one fails or waits in vain. `folder` is one that all of them see. Raises the StageError a
    process raised, or one with the rank and stack of each that failed.
    """
    import ray
    import torch
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = torch.cuda.is_available()
    # so that a machine with fewer CPUs than processes can hold them: they only wait the longer for each other
    cpus = min(1.0, ray.cluster_resources().get("CPU", 1.0) / count)
    trainer = TorchTrainer(
        function, torch_config=TorchConfig(timeout_s=SILENCE_SECONDS),
        scaling_config=ScalingConfig(num_workers=count, use_gpu=gpus, resources_per_worker=None if gpus else {
            "CPU": cpus}),
        run_config=RunConfig(name="processes", storage_path=str(folder)))
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise explained(error, count) from None


def explained(error: Any, count: int) -> StageError:
    """The StageError among what processes raised; where there is none, one with rank and stack of each that failed.

    error: ray.train.WorkerGroupError.
    """
    for failure in error.worker_failures.values():
        if isinstance(failure, StageError):
            return failure
    return StageError(f"{len(error.worker_failures)} of {count} processes of a training failed:\n{error}")
