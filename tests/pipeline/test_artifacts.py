import json
import os
import subprocess
import sys
import time

import pytest

from pipeline.artifacts import RunDirectory, RunError
from pipeline.stage import Stage, StageError, StageResult
from pipeline.worker import StageOrder, StageWorker

FINGERPRINT = "ab" * 32
PARTS = {"inputs": {}, "config": {}, "seed": 0}


def filled(directory, **files):
    out = directory.work_folder("sft", FINGERPRINT) / "out.tmp"
    out.mkdir(parents=True)
    for name, text in files.items():
        (out / name).write_text(text)
    return out


def test_a_crash_just_before_the_rename_commits_nothing(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    filled(directory, model="weights")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        directory.commit("sft", FINGERPRINT, PARTS, StageResult(), {})
    assert not directory.is_committed("sft", FINGERPRINT)
    assert directory.newest_manifest("sft") is None
    monkeypatch.undo()
    folder = directory.commit("sft", FINGERPRINT, PARTS, StageResult(), {})
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model"]


def test_work_left_by_a_crash_after_the_rename_is_removed(tmp_path):
    directory = RunDirectory(tmp_path)
    filled(directory, model="weights")
    directory.commit("sft", FINGERPRINT, PARTS, StageResult(), {})
    filled(directory, model="again")
    directory.remove_committed_work("sft", FINGERPRINT)
    assert not directory.work_folder("sft", FINGERPRINT).exists()
    assert directory.is_committed("sft", FINGERPRINT)


@pytest.fixture
def tiny_disk(tmp_path):
    """A 1 MiB file system of its own."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root and CAP_SYS_ADMIN: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def write_two_megabytes(context):
    (context.out / "big").write_bytes(b"x" * (2 << 20))
    return StageResult()


def test_a_disk_that_fills_up_in_a_stage_is_explained_and_nothing_is_committed(tiny_disk):
    directory = RunDirectory(tiny_disk / "run")
    order = StageOrder(Stage("sft", write_two_megabytes, {}), {}, directory.work_folder("sft", FINGERPRINT),
                       directory.log_file("sft"), 0)
    with pytest.raises(StageError, match=rf"disk is full.*{directory.root}.*MiB free.*same command again"):
        StageWorker().run_stage(order)
    assert not directory.is_committed("sft", FINGERPRINT)


def test_a_disk_that_fills_up_at_the_commit_is_explained_and_the_work_is_kept(tiny_disk):
    directory = RunDirectory(tiny_disk / "run")
    out = filled(directory, model="weights")
    with pytest.raises(OSError):
        (tiny_disk / "ballast").write_bytes(b"x" * (2 << 20))
    huge = StageResult(counts={"rows": ["x" * 1000] * 100})
    with pytest.raises(StageError, match="disk is full.*MiB free"):
        directory.commit("sft", FINGERPRINT, PARTS, huge, {})
    assert not directory.is_committed("sft", FINGERPRINT)
    assert (out / "model").read_text() == "weights"
    (tiny_disk / "ballast").unlink()
    assert (directory.commit("sft", FINGERPRINT, PARTS, huge, {}) / "model").read_text() == "weights"


def test_a_second_run_in_the_same_directory_is_told_the_pid_of_the_first(tmp_path):
    code = ("import sys, pathlib; from pipeline.artifacts import RunDirectory\n"
            "with RunDirectory(pathlib.Path(sys.argv[1])).lock():\n  print('held', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    directory = RunDirectory(tmp_path)
    with pytest.raises(RunError, match=f"process {holder.pid} is running there"), directory.lock():
        pass
    assert directory.lock_holder().pid == holder.pid
    holder.kill()
    holder.wait()
    with directory.lock():  # a killed run leaves no lock behind
        assert directory.lock_holder().pid == os.getpid()
    assert directory.lock_holder() is None


def test_a_directory_belongs_to_one_recipe(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim("tiny", "name: tiny\n")
    directory.claim("tiny", "name: tiny\nseed: 1\n")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == "tiny"
    with pytest.raises(RunError, match="belongs to recipe tiny, this is other.*another --run-dir"):
        directory.claim("other", "name: other\n")


def test_a_folder_of_other_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds files but no run"):
        RunDirectory(tmp_path).claim("tiny", "")


def wait_for_nobody(context):
    (context.out / "text").write_text("ran")
    return StageResult()


def test_a_worker_waits_for_the_worker_of_a_killed_run_to_let_go(tmp_path):
    directory = RunDirectory(tmp_path)
    folder = directory.work_folder("sft", FINGERPRINT)
    folder.mkdir(parents=True)
    code = ("import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('held', flush=True); time.sleep(1); print('letting go', flush=True)")
    dying = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], stdout=subprocess.PIPE)
    assert dying.stdout.readline() == b"held\n"
    StageWorker().run_stage(StageOrder(Stage("sft", wait_for_nobody, {}), {}, folder, directory.log_file("sft"), 0))
    assert dying.stdout.readline() == b"letting go\n"
    dying.wait()


def print_in_three_ways(context):
    print("from python")
    os.write(1, b"from below python\n")
    subprocess.run(["echo", "from a child"], check=True)
    context.progress.note("a note")
    time.sleep(0)
    return StageResult()


def test_all_a_stage_prints_lands_in_its_log(tmp_path):
    directory = RunDirectory(tmp_path)
    StageWorker().run_stage(StageOrder(Stage("sft", print_in_three_ways, {}), {},
                                       directory.work_folder("sft", FINGERPRINT), directory.log_file("sft"), 0))
    log = directory.log_file("sft").read_text()
    for line in ("from python", "from below python", "from a child", "a note"):
        assert line in log
