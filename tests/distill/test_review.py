import dataclasses
import json

import polars as pl
import pyarrow.parquet as pq
import pytest
from sft_set_stages import reject
from test_rejection import CONFIG, MATH, NOTE, sample, verdict

from distill.review import Decision, apply, queue, read_decisions, refused, revised
from pipeline.records import SCHEMAS, Sample, Status, write_table
from pipeline.stage import StageError


def judged(score, number, **changes):
    status = Status.ABSTAIN if score is None else Status.CORRECT if score >= 0.5 else Status.WRONG
    return sample(NOTE, verdict=verdict(status, score, "judge"), completion=f"Hello Ann, for the {number}th time.",
                  **changes)


def frame(tmp_path, samples):
    write_table(tmp_path / "frame.parquet", samples, Sample)
    return pl.DataFrame(pl.from_arrow(pq.read_table(tmp_path / "frame.parquet")))


def test_the_last_decision_on_a_sample_wins(tmp_path):
    file = tmp_path / "reviews.jsonl"
    file.write_text('{"id": "a", "decision": "accept"}\n\n{"id": "b", "decision": "edit", "completion": "x\\u2028y"}\n'
                    '{"id": "a", "decision": "reject", "note": "dull", "reviewer": "ann"}\n')
    found = read_decisions(file)
    assert found["a"].decision == "reject" and found["a"].note == "dull" and found["b"].completion == "x\u2028y"


@pytest.mark.parametrize(("line", "message"), [
    ("nonsense", "Invalid JSON"), ('{"id": "a", "decision": "maybe"}', "decision: "),
    ('{"decision": "accept"}', "id: "),
    ('{"id": "a", "decision": "edit"}', "an edit, and nothing else, has a completion"),
    ('{"id": "a", "decision": "accept", "completion": "x"}', "an edit, and nothing else"),
    ('{"id": "a", "decision": "accept", "verdict": 1}', "verdict: ")])
def test_a_broken_line_is_named(tmp_path, line, message):
    file = tmp_path / "reviews.jsonl"
    file.write_text('{"id": "a", "decision": "accept"}\n' + line + "\n")
    with pytest.raises(StageError, match=f"reviews.jsonl, line 2: {message}"):
        read_decisions(file)


def test_a_missing_file_is_named_with_its_key(tmp_path):
    with pytest.raises(StageError, match="reject.reviews: .*nowhere.jsonl: No such file"):
        read_decisions(tmp_path / "nowhere.jsonl")


def test_decisions_change_verdict_and_text_in_place(tmp_path):
    samples = [judged(0.2, number, tokens=40, provenance='{"shard": 7}') for number in range(4)]
    decisions = {s.id: Decision(id=s.id, decision=word, completion="Hi Ann." if word == "edit" else None, note="why",
                                reviewer="bob") for s, word in zip(samples, ("accept", "edit", "reject"), strict=False)}
    before = frame(tmp_path, samples)
    after = apply(before, decisions)
    assert after.schema == before.schema and len(after) == 4
    accepted, edited, rejected, untouched = after.to_dicts()
    assert untouched == before.to_dicts()[3]
    assert accepted["verdict"] | {"seconds": 0} == {
        "status": "correct", "score": 1.0, "reason": "accepted", "verifier": "reviewer", "version": "bob", "seconds": 0,
        "evidence": "why"}
    assert accepted["id"] == samples[0].id and accepted["completion"] == samples[0].completion
    assert edited["id"] == Sample.make_id(NOTE.id, "original", "c", "{}", "Hi Ann.") != samples[1].id
    assert json.loads(edited["provenance"]) == {"shard": 7, "edited_from": samples[1].id, "reviewer": "bob"}
    assert (edited["completion"], edited["finish_reason"]) == ("Hi Ann.", "stop")
    assert edited["tokens"] == round(40 * len("Hi Ann.") / len(samples[1].completion))
    assert (rejected["verdict"]["status"], rejected["verdict"]["score"]) == ("wrong", 0.0)
    assert after.select(refused())["refused"].to_list() == [False, False, True, False]
    assert apply(before, {}) is before


def test_rejection_keeps_what_a_reviewer_accepted_and_loses_what_one_refused():
    low, high, refusal, plain = (judged(score, number) for number, score in enumerate((0.1, 0.9, 0.95, 0.3)))
    rewritten = judged(0.0, 9)
    words = {low.id: "accept", refusal.id: "reject", rewritten.id: "edit"}
    samples = [revised(s, Decision(id=s.id, decision=words[s.id], completion="Hi." if words[s.id] == "edit" else None))
               if s.id in words else s for s in (low, high, refusal, plain, rewritten)]
    kept, rejected, funnel = reject(samples, CONFIG, principled=[NOTE.domain])
    assert {s.completion for s in kept} == {low.completion, "Hi."}
    assert {s.id: reason for s, reason in rejected} == {high.id: "not_shortest", refusal.id: "reviewer",
                                                        plain.id: "judge_score"}
    assert funnel[NOTE.domain] == {"in": 5, "out": 2, "lost": {"not_shortest": 1, "reviewer": 1, "judge_score": 1}}


def test_an_accepted_sample_must_still_be_one_of_its_form():
    broken = sample(NOTE, "reasoning", completion="No thinking here.", verdict=verdict(Status.WRONG, 0.1, "judge"))
    accepted = revised(broken, Decision(id=broken.id, decision="accept"))
    _, rejected, _ = reject([accepted, judged(0.9, 1)], CONFIG, principled=[NOTE.domain])
    assert rejected == [(accepted, "no_thinking")]


def test_the_queue_holds_what_the_judge_was_least_sure_about(tmp_path):
    scores = [0.69, 0.95, 0.71, None, 0.1, 0.72, 0.705, 0.7]
    samples = [judged(score, number) for number, score in enumerate(scores)]
    samples[7] = dataclasses.replace(samples[7], completion="<think>open")
    match = [dataclasses.replace(judged(score, score), domain="facts") for score in (0.7, 0.4)]
    ruled = sample(MATH[0])
    write_table(tmp_path / "part-00000.parquet", [*samples[:3], ruled], Sample)
    write_table(tmp_path / "part-00001.parquet", [*samples[3:], *match], Sample)
    lost = pl.DataFrame([(samples[0].id, "judge_score"), (samples[4].id, "judge_score"), (samples[5].id, "too_long"),
                         (samples[3].id, "abstain"), (match[1].id, "wrong")], ["id", "reason"], orient="row")
    config = CONFIG.model_copy(update={"review": 4})
    found = queue(tmp_path, lost, config, [NOTE.domain], reviewed=[samples[6].id])
    # 7 is nearest but malformed, 6 is decided, 5 was lost for its length, 3 has no score
    ids = [row["id"] for row in found.to_pylist()]
    assert sorted(ids[:2]) == sorted([samples[0].id, samples[2].id])
    assert ids[2:] == [match[1].id, match[0].id, samples[1].id]
    assert found.schema.names == [*SCHEMAS[Sample].names, "lost"]
    assert [row["lost"] for row in found.to_pylist()][2:] == ["wrong", None, None]
    assert found.equals(queue(tmp_path, lost.reverse(), config, [NOTE.domain], reviewed=[samples[6].id]))
    assert queue(tmp_path, lost, config.model_copy(update={"review": 0}), [NOTE.domain]).num_rows == 0
