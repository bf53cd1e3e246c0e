"""The page in its own application, and the command as a user starts it, killed after decisions."""

import dataclasses
import json
import time

import httpx
import polars as pl
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from posttrain_command import posttrain, start
from test_rejection import CONFIG, NOTE
from test_review import judged

from distill.review import queue, read_decisions
from distill.review_page import ReviewFile, build_app, read_queue
from pipeline.artifacts import RunDirectory
from pipeline.records import Problem, Sample, write_table
from pipeline.stage import StageError, StageResult

HERE = "http://127.0.0.1:8765"
HOSTILE = "Hi.\x1b[2J</script><img src=x onerror=alert(1)>\u202egnp"
PORT = 8272


def commit(directory, name, fingerprint, inputs, write):
    out = directory.work_folder(name, fingerprint) / "out.tmp"
    out.mkdir(parents=True)
    write(out)
    directory.commit(name, fingerprint, {"inputs": inputs, "config": {}, "seed": 0}, StageResult(), {"seconds": 1.0})


@pytest.fixture
def directory(tmp_path):
    """A run with a queue of five samples, the last of them hostile."""
    run = RunDirectory(tmp_path / "run")
    run.claim("toy", "name: toy\n")
    samples = [judged(0.7 + number / 100, number) for number in range(5)]
    samples[4] = dataclasses.replace(samples[4], completion=HOSTILE)

    def reject(out):
        write_table(tmp_path / "verified.parquet", samples, Sample)
        lost = pl.DataFrame(schema={"id": pl.String, "reason": pl.String})
        (out / "review").mkdir()
        pq.write_table(queue(tmp_path / "verified.parquet", lost, CONFIG, [NOTE.domain]), out / "review/queue.parquet")

    commit(run, "problems", "a0" * 32, {}, lambda out: write_table(out / "problems.parquet", [NOTE], Problem))
    commit(run, "reject", "a1" * 32, {"problems": "a0" * 32}, reject)
    return run


@pytest.fixture
def rows(directory):
    return read_queue(directory.stage_folder("reject", "a1" * 32) / "review/queue.parquet")


@pytest.fixture
def client(rows, tmp_path):
    problem = dataclasses.asdict(NOTE)
    app = build_app(rows, {NOTE.id: problem}, ReviewFile(tmp_path / "reviews.jsonl"), "ann")
    with TestClient(app, base_url=HERE, headers={"Origin": HERE}) as client:
        yield client


def test_an_item_shows_what_the_judge_saw_and_said(client, rows):
    items = client.get("/items").json()
    assert [item["id"] for item in items] == [row["id"] for row in rows]
    assert items[0]["principles"] == list(NOTE.check.principles) and items[0]["score"] == 0.7
    assert items[0]["facts"][-1] == "kept" and items[0]["decided"] is None
    assert items[4]["answer"] == "Hi.[U+001B][2J</script><img src=x onerror=alert(1)>[U+202E]gnp"
    assert items[4]["completion"] == HOSTILE


def test_the_page_has_no_script_but_its_own_and_no_text_of_models(client):
    page = client.get("/")
    assert "Hi." not in page.text and page.text.count("<script") == 1
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
    for name in ("review.js", "review.css"):
        assert client.get(f"/{name}").status_code == 200
    script = client.get("/review.js").text
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "document.write" not in script
    assert client.get("/../review.py").status_code == 404 and client.get("/docs").status_code == 404


def test_each_decision_is_a_line_and_the_last_one_wins(client, rows, tmp_path):
    first, second = rows[0]["id"], rows[1]["id"]
    assert client.post("/decisions", json={"id": first, "decision": "accept"}).json() == {"left": 4}
    assert client.post("/decisions", json={"id": second, "decision": "edit", "completion": "Hello.\u2028Ann",
                                           "note": "shorter"}).json() == {"left": 3}
    assert client.post("/decisions", json={"id": first, "decision": "reject", "reviewer": "eve"}).json() == {"left": 3}
    assert len((tmp_path / "reviews.jsonl").read_bytes().splitlines()) == 3
    found = read_decisions(tmp_path / "reviews.jsonl")
    assert (found[first].decision, found[first].reviewer) == ("reject", "ann") and found[first].time
    assert (found[second].completion, found[second].note) == ("Hello.\u2028Ann", "shorter")
    items = client.get("/items").json()
    assert items[0]["decided"]["decision"] == "reject" and items[2]["decided"] is None


@pytest.mark.parametrize(("told", "message"), [
    ({"id": "nowhere", "decision": "accept"}, "not in the queue"), ({"decision": "accept"}, "Field required"),
    ({"id": 0, "decision": "edit", "completion": "<think>open"}, "thinking stands once"),
    ({"id": 0, "decision": "edit", "completion": "  "}, "no answer"),
    ({"id": 0, "decision": "edit"}, "an edit, and nothing else, has a completion"),
    ({"id": 0, "decision": "edit", "completion": None}, "an edit"), ({"id": 0, "decision": "drop"}, "Input should be")])
def test_a_decision_that_cannot_be_used_is_refused_and_not_kept(client, rows, tmp_path, told, message):
    if told.get("id") == 0:
        told = {**told, "id": rows[0]["id"]}
    answer = client.post("/decisions", json=told)
    assert answer.status_code == 422 and message in answer.json()["error"]
    assert not (tmp_path / "reviews.jsonl").read_bytes()


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:8765"}, {"Origin": ""},
    {"Host": "evil.example:8765", "Origin": "http://evil.example:8765"}])
def test_decisions_come_from_the_page_alone(client, rows, tmp_path, headers):
    answer = client.post("/decisions", json={"id": rows[0]["id"], "decision": "accept"}, headers=headers)
    assert answer.status_code == 403 and not (tmp_path / "reviews.jsonl").read_bytes()


def test_another_name_of_this_machine_reads_nothing(client):
    assert client.get("/items", headers={"Host": "rebound.example:8765"}).status_code == 403
    assert client.get("/items", headers={"Host": "localhost:8765"}).status_code == 200


def test_a_body_of_any_size_is_not_read(client):
    answer = client.post("/decisions", content=(b"x" for _ in range(2)))
    assert answer.status_code == 413
    assert client.post("/decisions", content=b"x" * (5 << 20)).status_code == 413


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    file = tmp_path / "reviews.jsonl"
    whole = b'{"id":"a","decision":"accept"}\n'
    file.write_bytes(whole + b'{"id":"b","deci')
    assert list(ReviewFile(file).decisions) == ["a"] and file.read_bytes() == whole
    file.write_bytes(whole + b'{"id":"b","decision":"reject"}')
    assert list(ReviewFile(file).decisions) == ["a", "b"] and file.read_bytes().endswith(b"\n")
    file.write_bytes(b"{}\n")
    with pytest.raises(StageError, match="line 1"):
        ReviewFile(file)
    with pytest.raises(StageError, match="give another --out"):
        ReviewFile(tmp_path / "nowhere/reviews.jsonl")


def test_decisions_outlive_a_kill_of_the_command(directory, rows, tmp_path):
    output = tmp_path / "output"
    process = start("review", "run", "--port", str(PORT), "--reviewer", "ann", folder=tmp_path, output=output)
    try:
        deadline = time.monotonic() + 60
        while "Ctrl-C ends" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        here = f"http://127.0.0.1:{PORT}"
        with httpx.Client(base_url=here, headers={"Origin": here}) as client:
            assert client.get("/items").json()[0]["principles"] == list(NOTE.check.principles)
            for row in rows[:3]:
                assert client.post("/decisions", json={"id": row["id"], "decision": "accept"}).status_code == 200
            process.kill()
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (directory.root / "reviews.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows[:3]]
    assert "5 of 5 samples to decide" in output.read_text()


def test_a_run_without_a_queue_is_a_message(directory, tmp_path):
    commit(directory, "reject", "a2" * 32, {}, lambda out: None)
    seen = posttrain("review", "run", folder=tmp_path)
    assert seen.code == 1 and "there is no review queue; it is made by stage reject" in seen.err
    assert "Traceback" not in seen.both
