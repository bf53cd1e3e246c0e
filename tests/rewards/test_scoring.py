import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from posttrain_command import posttrain

from rewards.scoring import ScoringError
from rewards.scoring_file import BATCH, read_items, score_file

ROOT = Path(__file__).parents[2]
MATH = {"kind": "math", "completion": r"\boxed{\frac{1}{2}}", "reference": "0.5"}
CODE = {"kind": "code", "completion": "```python\ndef f(x):\n    return x + 1\n```", "entry_point": "f",
        "tests": [{"args": [1], "expected": 2}]}


def write(path, rows):
    path.write_text("".join(json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(rows)))
    return path


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(_scored):
    pass


def test_every_item_gets_its_result_in_order(tmp_path, verifier):
    rows = [MATH, {**MATH, "reference": "2"}, CODE, {**CODE, "tests": [{"args": [1], "expected": 3}]},
            {"kind": "exact", "completion": "Ann", "reference": "Ann"},
            {**CODE, "tests": [{"args": [1]}]}] * 20
    items = read_items(write(tmp_path / "in.jsonl", rows))
    seen = []
    assert score_file(items, tmp_path / "out.jsonl", verifier, seen.append) == 0
    assert seen == [0, BATCH, len(rows)]
    found = results(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [str(number) for number in range(len(rows))]
    assert [(row["status"], row["score"]) for row in found] == [
        ("correct", 1.0), ("wrong", 0.0), ("correct", 1.0), ("wrong", 0.0), ("malformed", 0.0),
        ("infra_error", None)] * 20  # the last check cannot be run: no score, and no 0
    assert {"id", "status", "score", "reason", "evidence", "verifier", "version", "votes", "agreement", "critique",
            "latency_ms"} == set(found[0])


def test_scoring_goes_on_after_a_torn_line_and_refuses_the_results_of_others(tmp_path, verifier):
    items = read_items(write(tmp_path / "in.jsonl", [MATH] * 5))
    out = tmp_path / "out.jsonl"
    score_file(items, out, verifier, quiet)
    whole = out.read_text()
    first = whole.splitlines()[0]
    out.write_text(first + "\n" + whole.splitlines()[1][:20])
    assert score_file(items, out, verifier, quiet) == 1
    assert [row["id"] for row in results(out)] == list("01234")
    with pytest.raises(ScoringError, match="line 1: holds the result of '0' where the input has '1'"):
        score_file(items[1:], out, verifier, quiet)
    with pytest.raises(ScoringError, match="line 3: holds the result of '2' where the input has no more"):
        score_file(items[:2], out, verifier, quiet)
    assert [row["id"] for row in results(out)] == list("01234"), "nothing is lost"


def test_lines_that_are_no_items_are_named(tmp_path):
    path = write(tmp_path / "in.jsonl", [MATH, {**MATH, "reference": None}, {**CODE, "language": "cobol"}])
    path.write_text(path.read_text() + '{"id": "x"\n')
    with pytest.raises(ScoringError) as caught:
        read_items(path)
    message = str(caught.value)
    assert "3 of 4 lines are no items; nothing was scored" in message
    assert "line 2: an item of kind math needs reference" in message
    assert "line 3: language: Input should be 'python', 'c'" in message
    assert "line 4: Invalid JSON" in message
    with pytest.raises(ScoringError, match="gone.jsonl"):
        read_items(tmp_path / "gone.jsonl")


def test_a_killed_command_goes_on_and_scores_nothing_twice(tmp_path):
    write(tmp_path / "in.jsonl", [{**CODE, "tests": [{"args": [number], "expected": number + 1}]}
                                  for number in range(4 * BATCH)])
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "pipeline.cli", "score", "--input",
               str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.jsonl").is_file() or not (tmp_path / "out.jsonl").read_text():
        assert first.poll() is None and time.monotonic() < deadline, first.stdout.read()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = (tmp_path / "out.jsonl").read_text().rpartition("\n")[0]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_text().startswith(kept)
    found = results(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [str(number) for number in range(4 * BATCH)]
    assert all(row["score"] == 1.0 for row in found)
    assert f"{4 * BATCH - len(kept.splitlines())} items scored" in done.stdout


def test_a_weaker_isolation_is_asked_for_by_name_and_shown_in_the_verdict(tmp_path):
    source = write(tmp_path / "in.jsonl", [CODE])
    done = posttrain("score", "-i", source, "-o", "out.jsonl", "--isolation", "rlimits", folder=tmp_path)
    assert done.code == 0, done.both
    found, = results(tmp_path / "out.jsonl")
    assert found["score"] == 1.0 and found["evidence"].startswith("[isolation: rlimits]")


def test_the_command_names_a_broken_line_and_exits_with_1(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    done = subprocess.run(["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "pipeline.cli", "score", "--input",
                           str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "line 1: id: Field required" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
