"""The stages generate and verify over parts, with a teacher on a real HTTP server in place of engines."""

import contextlib
import dataclasses
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
from openai_server import ChatServer, completion
from tiny_models import Killed, Quiet

from distill.problems import GENERATORS
from pipeline.recipe import DomainGenerateConfig, GenerateConfig, ModelConfig, TeacherConfig, TinyModel
from pipeline.records import Problem, Sample, Status, Verdict, read_table, write_table
from pipeline.stage import StageContext, StageError
from workflows import generation

PROBLEMS = [dataclasses.replace(problem, split="sft") for problem in GENERATORS["math"](6, 0)]
WRITING = [dataclasses.replace(problem, split="sft") for problem in GENERATORS["writing"](4, 0)]
ANSWERS = {problem.messages[-1]["content"]: problem.check.reference for problem in PROBLEMS}
MODEL = ModelConfig(source=TinyModel(), dtype="float32", max_length=256)
ROUNDS = {"samples": 1, "most_samples": 4, "part_problems": 2, "max_tokens": 64}
NEVER = PROBLEMS[3]  # that the teacher solves


def solver(body):
    """Right in one of three seeds, never for the problem NEVER; prose for writing, and a judge's score."""
    question = body["messages"][-1]["content"]
    if any(question == problem.messages[-1]["content"] for problem in WRITING):
        return completion(f"A quiet morning in the hills, number {body['seed']}.")
    if question not in ANSWERS:
        return completion("It is on the subject.\nScore: 8")
    right = body["seed"] % 3 == 0 and question != NEVER.messages[-1]["content"]
    return completion(f"\\boxed{{{ANSWERS[question] if right else 'no'}}}", "think")


@pytest.fixture
def server():
    with ChatServer(solver) as server:
        yield server


def context(folder, config, progress=None, **inputs):
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "problems").exists():
        (folder / "problems").mkdir()
        write_table(folder / "problems" / "problems.parquet", PROBLEMS + WRITING, Problem)
    return StageContext("stage", {"model": MODEL, "isolation": "bubblewrap", **config},
                        {"problems": folder / "problems", **inputs}, folder / "out", folder / "work", 0,
                        progress or Quiet())


def teacher(server, **changes):
    return TeacherConfig(url=server.url, model="r1", concurrency=4, output_price=1e3, **changes)


def generate(folder, server, progress=None, domain="math", config=None, **changes):
    config = GenerateConfig(**{**ROUNDS, **changes} if config is None else config)
    return generation.generate(context(folder, {"generate": config, "teacher": "r1"}, progress), domain=domain,
                               teacher=teacher(server))


def samples(folder):
    return read_table(folder / "samples", Sample)


def asked(server):
    """(question, seed) of every request to the teacher, with its number."""
    return Counter((body["messages"][-1]["content"], len(body["messages"]), body["seed"])
                   for _, _, body in server.requests)


def test_parts_hold_the_samples_of_their_problems_in_rounds_with_verdicts_and_what_they_cost(tmp_path, server):
    result = generate(tmp_path, server)
    rows = samples(tmp_path / "out")
    files = sorted((tmp_path / "out" / "samples").iterdir())
    assert [file.name for file in files] == [f"part-{index:05}.parquet" for index in range(3)]
    assert [[s.problem_id for s in read_table(file, Sample)] == sorted(
        [s.problem_id for s in read_table(file, Sample)], key=[p.id for p in PROBLEMS].index) for file in files]
    assert [{s.problem_id for s in read_table(file, Sample)} for file in files] == [
        {problem.id for problem in PROBLEMS[start:start + 2]} for start in (0, 2, 4)]
    by_order = {(problem.id, form): [s for s in rows if (s.problem_id, s.form) == (problem.id, form)]
                for problem in PROBLEMS for form in ("original", "reasoning")}
    for own in by_order.values():
        right = [s.verdict.status is Status.CORRECT for s in own]
        # a round ends the rounds when one of it or before is right
        assert len(own) in (1, 2, 4) and not any(right[:len(own) // 2]) and (any(right) or len(own) == 4)
    assert len({len(own) for own in by_order.values()}) > 1 and len(by_order[NEVER.id, "original"]) == 4
    assert all(s.completion.startswith("<think>\nthink\n</think>\n\\boxed{") and s.checkpoint == "teacher:r1"
               for s in rows)
    assert set(asked(server).values()) == {1} and len(server.requests) == len(rows) == result.counts["samples"]
    assert result.counts["teacher"] == {"requests": len(rows), "retries": 0, "prompt_tokens": 10 * len(rows),
                                        "completion_tokens": 5 * len(rows),
                                        "usd": pytest.approx(5e-3 * len(rows))}
    assert result.counts["finish_reasons"] == {"stop": len(rows)} and result.metrics["finished_share"] == 1
    assert not list((tmp_path / "work" / "requests").iterdir())


def test_without_more_rounds_every_problem_gets_as_many_and_no_verdict_yet(tmp_path, server):
    generate(tmp_path, server, samples=2, most_samples=None, forms=("original",))
    rows = samples(tmp_path / "out")
    assert [(s.problem_id, json.loads(s.sampling)["index"]) for s in rows] == [
        (problem.id, index) for problem in PROBLEMS for index in range(2)]
    assert {s.form for s in rows} == {"original"} and all(s.verdict is None for s in rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken generation: its folder and its server."""
    folder = tmp_path_factory.mktemp("whole")
    with ChatServer(solver) as server:
        generate(folder, server)
    return folder, server


@pytest.mark.parametrize("kill_at", [1, 6, 12])
def test_a_killed_generation_pays_for_nothing_twice_and_ends_with_the_same_samples(tmp_path, server, whole, kill_at):
    folder, other = whole
    with pytest.raises(Killed):
        generate(tmp_path, server, Quiet(kill_at))
    parts = generation.Parts(tmp_path / "work")
    known = len(list(parts.logged())) + sum(summary["samples"] for summary in map(parts.summary, range(3)) if summary)
    before, times = len(server.requests), {path: path.stat().st_mtime_ns for path in
                                          (tmp_path / "work" / "samples").iterdir()}
    progress = Quiet()
    result = generate(tmp_path, server, progress)
    assert [s.id for s in samples(tmp_path / "out")] == [s.id for s in samples(folder / "out")]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert set(asked(server)) == set(asked(other)) and kill_at <= known
    assert len(server.requests) - before == len(other.requests) - known, "something known was asked for again"
    assert progress.notes == [f"{known} samples were made before"]
    assert result.counts["teacher"]["requests"] == len(other.requests)


def verify(folder, server, domain="math", progress=None, **inputs):
    made = {f"generate-{domain}": folder / "made"}
    judged = [domain] if domain == "writing" else []
    return generation.verify(context(folder, {"judged": judged, "teachers": {}}, progress, **made),
                             teachers={domain: teacher(server)} if judged else {})


@pytest.fixture
def made(tmp_path, server):
    """Generated samples of math without verdicts, as the input of verify, in three parts."""
    generate(tmp_path, server, samples=2, most_samples=None)
    (tmp_path / "out").rename(tmp_path / "made")
    for path in (tmp_path / "work").rglob("part-*"):
        path.unlink()
    return samples(tmp_path / "made")


def test_verify_gives_verdicts_part_by_part_and_keeps_the_problems_that_nobody_solved(tmp_path, server, made):
    result = verify(tmp_path, server)
    rows = samples(tmp_path / "out")
    assert [dataclasses.replace(s, verdict=None) for s in rows] == made
    right = {s.problem_id for s in rows if s.verdict.status is Status.CORRECT}
    unsolved = pq.read_table(tmp_path / "out" / "unsolved.parquet").to_pylist()
    assert NEVER.id in {row["problem_id"] for row in unsolved} == {p.id for p in PROBLEMS} - right
    assert unsolved[0] | {"problem_id": ""} == {
        "problem_id": "", "domain": "math", "attempts": 4,
        "statuses": json.dumps({"original": {"wrong": 2}, "reasoning": {"wrong": 2}})}
    assert result.counts["unsolved"] == len(unsolved) == result.counts["unsolved_by_domain"]["math"]
    assert result.counts["samples"] == 24 and sum(result.counts["statuses"].values()) == 24
    assert result.metrics["correct_share"] == result.counts["statuses"]["correct"] / 24


def test_a_killed_verification_goes_on_with_the_part_it_was_at(tmp_path, server, made):
    with pytest.raises(Killed):
        verify(tmp_path, server, progress=Quiet(kill_at=16))  # at the end of the second part
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work" / "samples").iterdir()}
    assert list(times) == ["part-00000.parquet"]
    progress = Quiet()
    verify(tmp_path, server, progress=progress)
    assert (tmp_path / "out/samples/part-00000.parquet").stat().st_mtime_ns == times["part-00000.parquet"]
    assert progress.done == 24 and len(samples(tmp_path / "out")) == 24


class Breaking:
    """A verifier that fails as often as told: a fake, because no real one fails when asked to."""

    def __init__(self, fails):
        self.fails, self.calls = fails, Counter()

    def verify_batch(self, problems, texts):
        verdicts = []
        for problem in problems:
            self.calls[problem.id] += 1
            broken = self.fails(problem, self.calls[problem.id])
            verdicts.append(Verdict(Status.INFRA_ERROR, None, "verifier_failed", "code", "1", 0.0, "no space left")
                            if broken else Verdict(Status.WRONG, 0.0, "different", "code", "1"))
        return verdicts


def broken(monkeypatch, fails):
    verifier = Breaking(fails)
    monkeypatch.setattr(generation, "open_verifier", lambda *_: contextlib.nullcontext(verifier))
    return verifier


def test_infrastructure_errors_are_tried_again_then_set_aside_and_never_counted_as_wrong(
        tmp_path, server, made, monkeypatch):
    broken(monkeypatch, lambda problem, call: problem.id == PROBLEMS[0].id or call <= 4)
    result = verify(tmp_path, server)
    assert result.counts["statuses"] == {"infra_error": 4, "wrong": 20}
    assert {s.problem_id for s in samples(tmp_path / "out") if s.verdict.status is Status.INFRA_ERROR} == {
        PROBLEMS[0].id}
    assert json.loads(pq.read_table(tmp_path / "out" / "unsolved.parquet")["statuses"][0].as_py()) == {
        "original": {"infra_error": 2}, "reasoning": {"infra_error": 2}}


def test_too_many_infrastructure_errors_stop_the_stage_and_their_part_is_verified_again(
        tmp_path, server, made, monkeypatch):
    monkeypatch.setattr("workflows.inference.INFRA_ERROR_BUDGET", 0.004)  # 4 of a thousand
    broken(monkeypatch, lambda problem, call: problem.id in (PROBLEMS[1].id, PROBLEMS[2].id))
    with pytest.raises(StageError, match="8 of 16 verdicts are infrastructure errors.*no space left"):
        verify(tmp_path, server)
    assert len(list((tmp_path / "work" / "parts").iterdir())) == 1
    mended = broken(monkeypatch, lambda problem, call: False)
    assert verify(tmp_path, server).counts["statuses"] == {"infra_error": 4, "wrong": 20}
    assert set(mended.calls) == {problem.id for problem in PROBLEMS[2:]}


def test_a_domain_with_a_teacher_is_judged_by_it_on_the_same_account(tmp_path, server):
    config = {"samples": 1, "forms": ("original",), "part_problems": 2, "max_tokens": 64}
    counts = generate(tmp_path, server, domain="writing", config=config).counts
    (tmp_path / "out").rename(tmp_path / "made")
    (tmp_path / "made" / "manifest.json").write_text(json.dumps({"counts": counts}))
    for path in (tmp_path / "work").rglob("part-*"):
        path.unlink()
    result = verify(tmp_path, server, "writing")
    rows = samples(tmp_path / "out")
    assert {(s.verdict.verifier, s.verdict.score) for s in rows} <= {("judge", 0.8), ("judge", 0.0)}
    spent = result.counts["teachers"]["writing"]
    assert 0 < spent["requests"] <= 4 and len(server.requests) == 4 + spent["requests"]
    assert {body["temperature"] for _, _, body in server.requests[4:]} == {0.0}


def test_the_money_of_a_domain_is_spent_once_for_generation_and_judging(tmp_path, server):
    config = {"samples": 1, "forms": ("original",), "max_tokens": 64}
    counts = generate(tmp_path, server, domain="writing", config=config).counts
    (tmp_path / "out").rename(tmp_path / "made")
    (tmp_path / "made" / "manifest.json").write_text(json.dumps({"counts": counts}))
    for path in (tmp_path / "work").rglob("part-*"):
        path.unlink()
    inputs = {"generate-writing": tmp_path / "made"}
    with pytest.raises(StageError, match=r"0\.02 USD of most_cost 0\.02 are spent"):
        generation.verify(context(tmp_path, {"judged": ["writing"], "teachers": {}}, **inputs),
                          teachers={"writing": teacher(server, most_cost=0.02)})
    assert len(server.requests) == 4


def test_an_empty_override_of_a_domain_changes_nothing():
    assert not DomainGenerateConfig().model_dump(exclude_none=True)
