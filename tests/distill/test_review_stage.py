"""Decisions of a person on their way through stage reject, and what they make stale."""

import json
from pathlib import Path

import pyarrow.parquet as pq
from sft_set_stages import context, write_parts
from test_rejection import NOTE
from test_review import judged

from distill.review import Decision
from pipeline.fingerprint import changes, stage_parts
from pipeline.recipe import RejectConfig
from pipeline.recipe_file import load_recipe
from pipeline.records import Sample, read_table
from workflows import sft_set
from workflows.deepseek_v3 import build

ROOT = Path(__file__).parents[2]


def run_reject(folder, samples, **config):
    write_parts(folder / "verify/samples", samples, per_part=2)
    stage = context({"reject": RejectConfig(**config), "principled": [NOTE.domain], "judged": [NOTE.domain]},
                    {"verify": folder / "verify"}, folder)
    funnel = sft_set.reject(stage).counts["funnel"]
    kept = read_table(stage.out / "samples", Sample)
    return kept, funnel[NOTE.domain]["lost"], pq.read_table(stage.out / "review/queue.parquet")["id"].to_pylist()


def test_decisions_come_back_into_the_set_and_are_not_asked_for_again(tmp_path):
    samples = [judged(score, number) for number, score in enumerate((0.9, 0.68, 0.2, 0.65))]
    best, near, low, edited = samples
    kept, lost, asked = run_reject(tmp_path / "before", samples)
    assert ([s.id for s in kept], lost, asked) == ([best.id], {"judge_score": 3}, [near.id, edited.id, best.id, low.id])

    file = tmp_path / "reviews.jsonl"
    decisions = [Decision(id=best.id, decision="reject"), Decision(id=near.id, decision="accept"),
                 Decision(id=edited.id, decision="edit", completion="Hello Ann."),
                 Decision(id="gone", decision="accept")]
    file.write_text("".join(decision.model_dump_json() + "\n" for decision in decisions))
    kept, lost, asked = run_reject(tmp_path / "after", samples, reviews=str(file))
    assert {s.completion for s in kept} == {near.completion, "Hello Ann."}
    assert {json.loads(s.provenance).get("edited_from") for s in kept} == {None, edited.id}
    assert (lost, asked) == ({"reviewer": 1, "judge_score": 1}, [low.id])


def test_a_changed_review_file_makes_rejection_stale(tmp_path):
    file = tmp_path / "reviews.jsonl"
    file.write_text("")
    recipe = load_recipe(ROOT / "recipes/smoke.yaml", [f"reject.reviews={file}"])
    stage = next(stage for stage in build(recipe) if stage.name == "reject")
    inputs = dict.fromkeys(stage.inputs, "0" * 64)
    before = stage_parts(stage, 0, inputs)
    file.write_text('{"id": "a", "decision": "accept"}\n')
    lines = changes(before, stage_parts(stage, 0, inputs))
    assert len(lines) == 1 and lines[0].startswith(f"file {file}: ")
