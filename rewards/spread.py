"""Code verdicts on all machines of a Ray cluster: one actor a CPU, each with a sandbox of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray

from pipeline.records import Check, Verdict
from rewards.code import verify_code_batch
from rewards.registry import CodeRunner
from rewards.sandbox import Isolation, Limits, Sandbox


class CodeWorker:
    """One sandbox on some machine of the cluster."""

    def __init__(self, slot: int, limits: Limits, isolation: Isolation) -> None:
        self.sandbox = Sandbox(limits, isolation, slot)

    def verify(self, items: Sequence[tuple[str, Check]]) -> list[Verdict]:
        return verify_code_batch(items, self.sandbox)

    def machine(self) -> str:
        return ray.get_runtime_context().get_node_id()


@contextmanager
def cluster_runners(limits: Limits | None = None, isolation: Isolation = "bubblewrap") -> Iterator[list[CodeRunner]]:
    """A runner per free CPU of the cluster; none where Ray has one machine, whose threads do as well.

    A machine that dies costs nothing: Ray starts its actors elsewhere and sends their work again. Raises RayActorError
    when that fails too, for example where no machine has bubblewrap.
    """
    machines = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    count = int(ray.available_resources().get("CPU", 0)) if len(machines) > 1 else 0
    worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3, scheduling_strategy="SPREAD")(CodeWorker)
    actors = [worker.options(name=f"code-{slot}-{ray.get_runtime_context().get_job_id()}").remote(
        slot, limits or Limits(), isolation) for slot in range(count)]

    def runner(actor: ray.actor.ActorHandle) -> CodeRunner:
        return lambda items: ray.get(actor.verify.remote(items))

    try:
        yield [runner(actor) for actor in actors]
    finally:
        for actor in actors:
            ray.kill(actor)
