"""The runner with real Ray: a driver process is killed with SIGKILL half way and the command given again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.artifacts import RunDirectory

HERE = Path(__file__).parent
DRIVER = HERE / "toy_workflow.py"


def start(run_dir, last="ok"):
    """A driver in a process of its own; `pythonpath` of the settings reaches only pytest itself."""
    paths = f"{HERE.parents[1]}:{HERE}"
    return subprocess.Popen(["env", f"PYTHONPATH={paths}", sys.executable, str(DRIVER), str(run_dir), last],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_written(run_dir):
    files = list(run_dir.glob("work/count-*/work/rows.txt"))
    return len(files[0].read_text().splitlines()) if files else 0


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_dead(processes):
    """Ray's workers end by themselves when their driver is gone."""
    deadline = time.monotonic() + 60
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run killed in its second stage, resumed, and failing in its third; then one whose worker dies."""
    run_dir = tmp_path_factory.mktemp("resume") / "run"
    first = start(run_dir, "refuse")
    deadline = time.monotonic() + 120
    while rows_written(run_dir) < 20 or not list(run_dir.glob("work/count-*/spent.json")):
        assert first.poll() is None and time.monotonic() < deadline, first.stdout.read()
        time.sleep(0.05)
    children = psutil.Process(first.pid).children(recursive=True)
    workers = [process for process in children if process.name().startswith("ray::stage")]
    first.send_signal(signal.SIGKILL)
    first.wait()
    # with `go` there a worker that has not noticed yet would go on: allowed, but then nothing is left to resume
    assert workers
    wait_until_dead(workers)
    prepared = (next(run_dir.glob("stages/prepare/*/manifest.json"))).read_text()
    status_after_kill = RunDirectory(run_dir).lock_holder()
    spent, = run_dir.glob("work/count-*/spent.json")
    seconds, peak = json.loads(spent.read_text())
    assert seconds >= 0 and peak > 0
    spent.write_text(json.dumps([1000 + seconds, 512 << 30]))
    run_dir.with_name("go").touch()
    second = start(run_dir, "refuse")
    output = second.communicate(timeout=240)[0]
    third = start(run_dir, "die")
    died = third.communicate(timeout=240)[0]
    return {"run_dir": run_dir, "prepared": prepared, "holder": status_after_kill, "output": output,
            "code": second.returncode, "died": died, "died_code": third.returncode}


def test_a_killed_run_leaves_no_lock(resumed):
    assert resumed["holder"] is None


def test_the_same_command_resumes_by_row_and_does_not_run_finished_stages_again(resumed):
    run_dir = resumed["run_dir"]
    assert "[prepare]" not in resumed["output"]
    assert (next(run_dir.glob("stages/prepare/*/manifest.json"))).read_text() == resumed["prepared"]
    rows = next(run_dir.glob("stages/count/*/rows.txt")).read_text().splitlines()
    assert [int(row.split()[0]) for row in rows] == list(range(40)), "no row lost, none twice"
    assert len({row.split()[1] for row in rows}) == 2, "written by two processes"
    manifest = json.loads(next(run_dir.glob("stages/count/*/manifest.json")).read_text())
    assert manifest["counts"]["resumed_from"] == 20
    assert 1000 < manifest["timings"]["seconds"] < 1200, "with the time of the killed attempt"
    assert manifest["timings"]["peak_memory_gib"] == 512
    assert not list(run_dir.glob("work/count-*"))


def test_the_driver_shows_notes_and_the_way_to_the_dashboard(resumed):
    assert "[count] resumed after 20 rows" in resumed["output"]
    assert "Ray dashboard: http://" in resumed["output"]


def test_a_stage_error_is_shown_as_its_message_alone_with_the_log(resumed):
    assert resumed["code"] == 1
    assert "stage last: the fuel is missing; bring some" in resumed["output"]
    assert "logs/last.log" in resumed["output"]
    assert "Traceback" not in resumed["output"]


def test_a_dead_worker_is_reported_with_the_way_on(resumed):
    assert resumed["died_code"] == 1
    assert "the worker process died" in resumed["died"]
    assert "the same command resumes" in resumed["died"]


LEAN = """
import sys
from pathlib import Path
from rich.console import Console
import toy_workflow
from pipeline import runner
from pipeline.stage import Stage

runner.WORKER_SHARE = 0.0  # every worker holds too much
config = {"rows": 1, "pause_at": -1, "go": ""}
stages = [Stage(name, toy_workflow.count_rows, config, modules=("toy_workflow",)) for name in ("one", "two")]
runner.run(toy_workflow.recipe(), stages, Path(sys.argv[1]), console=Console(force_terminal=False))
"""


def test_a_worker_that_keeps_too_much_memory_gives_way_to_a_new_one(tmp_path):
    subprocess.run(["env", f"PYTHONPATH={HERE.parents[1]}:{HERE}", sys.executable, "-c", LEAN, str(tmp_path / "run")],
                   check=True, capture_output=True, text=True, timeout=120)
    rows = [file.read_text() for file in (tmp_path / "run").glob("stages/*/*/rows.txt")]
    assert len({row.split()[1] for row in rows}) == 2, rows  # the process that wrote each stage's row
