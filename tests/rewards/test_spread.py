import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCENARIO = """
import json, os, signal, time
import ray
from ray.cluster_utils import Cluster
from pipeline.records import Check, Problem
from rewards.registry import Verifier
from rewards.spread import cluster_runners

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
with cluster_runners() as runners:
    print("one machine:", len(runners))
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
check = Check("code", language="python", entry_point="f", tests=json.dumps([{"args": [1], "expected": 2}]))
problem = Problem("p", "code", "code", ({"role": "user", "content": "?"},), check, "test", "rl")
answers = [f"```python\\ndef f(x):\\n    return x + {n % 2}  # {n}\\n```" for n in range(60)]
with cluster_runners() as runners, Verifier(runners=runners) as verifier:
    actors = [runner.__closure__[0].cell_contents for runner in runners]
    print("machines:", len(set(ray.get([actor.machine.remote() for actor in actors]))), "of", len(runners), "runners")
    verifier.run_canaries(["code"], ["python"])
    pids = ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in actors])
    os.kill(pids[0], signal.SIGKILL)
    found = verifier.verify_batch([problem] * 60, answers)
    print("right after a kill:", [v.score for v in found] == [0.0, 1.0] * 30)
    print("pids again:", ray.get(actors[0].__ray_call__.remote(lambda self: os.getpid())) not in pids)
ray.shutdown()
cluster.shutdown()
"""


def test_code_runs_on_all_machines_of_a_cluster_and_a_killed_worker_costs_nothing():
    """In a process of its own: it makes a cluster of two Ray nodes on this machine."""
    done = subprocess.run(["env", f"PYTHONPATH={ROOT}", sys.executable, "-W", "ignore", "-c", SCENARIO],
                          capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("one machine: 0", "machines: 2 of 2 runners", "right after a kill: True", "pids again: True"):
        assert line in done.stdout, done.stdout + done.stderr[-2000:]
