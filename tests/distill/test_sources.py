import dataclasses
import json

import pytest

from distill.sources import load_domain
from pipeline.recipe import DomainConfig
from pipeline.stage import StageError

GSM8K = {"question": "Ann has 1,000 figs and buys 2 more. How many?",
         "answer": "She has 1000+2 = <<1000+2=1002>>1002 figs.\n#### 1,002"}
HUMANEVAL = {"task_id": "T/0", "prompt": "def one():\n    \"\"\" Return 1. \"\"\"\n", "entry_point": "one",
             "canonical_solution": "    return 1\n", "test": "def check(candidate):\n    assert candidate() == 1\n"}


def domain(**source) -> DomainConfig:
    return DomainConfig.model_validate({"source": source, "splits": {"sft": 1}})


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_generated_domain_has_as_many_problems_as_its_splits_ask_for():
    config = DomainConfig.model_validate({"source": {"type": "generated", "generator": "math", "skills": ["digits"]},
                                          "splits": {"sft": 7, "heldout": 5}})
    problems, bad = load_domain("sums", config, seed=0)
    assert len(problems) == 12 and bad == []
    assert {(p.domain, p.skill, p.split) for p in problems} == {("sums", "digits", "")}


def test_an_unknown_skill_stops_with_the_recipe_path():
    with pytest.raises(StageError, match="domains.sums.source.skills.*choose from"):
        load_domain("sums", domain(type="generated", generator="math", skills=["nope"]), seed=0)


def test_a_gsm8k_row_becomes_a_chain_without_marks_and_a_boxed_answer(tmp_path):
    path = write(tmp_path / "rows.jsonl", GSM8K)
    [problem], bad = load_domain("math", domain(type="jsonl", format="gsm8k", path=path), seed=0)
    assert bad == []
    assert problem.solution == "She has 1000+2 = 1002 figs."
    assert problem.answer == "The answer is \\boxed{1002}."
    assert (problem.check.kind, problem.check.reference) == ("math", "1002")
    assert "\\boxed{}" in problem.messages[0]["content"]
    assert problem.source == "gsm8k:rows.jsonl"


def test_a_humaneval_row_becomes_a_code_block_that_passes_its_own_test(tmp_path):
    path = write(tmp_path / "rows.jsonl", HUMANEVAL)
    [problem], _ = load_domain("code", domain(type="jsonl", format="humaneval", path=path), seed=0)
    code = problem.answer.removeprefix("```python\n").removesuffix("\n```")
    namespace: dict = {}
    exec(code + "\n" + json.loads(problem.check.tests)["assert_code"], namespace)
    namespace["check"](namespace[problem.check.entry_point])
    assert problem.solution is None


def test_broken_rows_are_named_by_line_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([
        json.dumps(GSM8K).encode(), b"", b"{not json", json.dumps({"question": "How many?"}).encode(),
        json.dumps({**GSM8K, "question": "No number?", "answer": "Some.\n#### many"}).encode(), b'{"question": "\xff"}',
        b"[1, 2]", json.dumps(GSM8K).encode(), json.dumps({**GSM8K, "question": "Last one?"}).encode()]))
    problems, bad = load_domain("math", domain(type="jsonl", format="gsm8k", path=str(path)), seed=0)
    assert len(problems) == 2
    assert [row["line"] for row in bad] == [3, 4, 5, 6, 7, 8]
    assert {row["path"] for row in bad} == {str(path)}
    for row, words in zip(bad, ["JSON", "answer is missing", "#### N", "UTF-8", "a list", "line 1"], strict=True):
        assert words in row["error"]
    json.dumps(bad)


def test_a_file_without_one_good_row_stops_the_stage(tmp_path):
    path = write(tmp_path / "rows.jsonl", "{", "{")
    with pytest.raises(StageError, match=r"domains.math.*2 broken rows: line 1: not valid JSON"):
        load_domain("math", domain(type="jsonl", format="gsm8k", path=path), seed=0)


def test_a_missing_file_stops_the_stage_with_the_recipe_path(tmp_path):
    with pytest.raises(StageError, match="domains.math.source.path: .*gone.jsonl does not exist"):
        load_domain("math", domain(type="jsonl", format="gsm8k", path=str(tmp_path / "gone.jsonl")), seed=0)


def test_rows_of_a_heldout_file_are_marked(tmp_path):
    train = write(tmp_path / "train.jsonl", GSM8K)
    test = write(tmp_path / "test.jsonl", {**GSM8K, "question": "Other?"})
    problems, _ = load_domain("math", domain(type="jsonl", format="gsm8k", path=train, heldout_path=test), seed=0)
    assert [p.split for p in problems] == ["", "heldout"]


def test_problem_rows_round_trip_and_bad_checks_are_refused(tmp_path):
    from distill.problems import GENERATORS

    made = list(GENERATORS["code"](3, 0)) + list(GENERATORS["math"](1, 0))
    rows = [dataclasses.asdict(problem) for problem in made]
    broken = {**rows[0], "messages": "hello", "check": {"kind": "code", "language": "python"}}
    path = write(tmp_path / "rows.jsonl", *rows, broken)
    problems, bad = load_domain("mine", domain(type="jsonl", format="problem", path=path), seed=0)
    assert [p.id for p in problems] == [p.id for p in made]
    assert [p.check for p in problems] == [p.check for p in made]
    assert bad[0]["line"] == 5 and "lacks tests" in bad[0]["error"]


def test_a_local_file_or_saved_folder_stands_in_for_a_data_set_id(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "rows.jsonl", GSM8K)
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GSM8K]),
                          "test": datasets.Dataset.from_list([{**GSM8K, "question": "Other?"}])}).save_to_disk(folder)
    from_file, _ = load_domain("math", domain(type="dataset", format="gsm8k", id="openai/gsm8k", path=file), seed=0)
    from_folder, _ = load_domain("math", domain(type="dataset", format="gsm8k", id="openai/gsm8k", path=str(folder),
                                                heldout_split="test"), seed=0)
    assert from_file[0].id == from_folder[0].id
    assert [p.split for p in from_folder] == ["", "heldout"]


def test_the_constitution_of_the_recipe_is_added_to_every_problem():
    config = DomainConfig(source={"type": "generated", "generator": "writing"}, judged="principles",
                          principles=["It is kind."], splits={"sft": 2, "rl": 2, "preference": 2})
    problems, _ = load_domain("writing", config, 0)
    plain, _ = load_domain("writing", config.model_copy(update={"principles": []}), 0)
    assert [p.check.principles for p in problems] == [(*p.check.principles, "It is kind.") for p in plain]
    assert not {p.id for p in problems} & {p.id for p in plain}


@pytest.mark.parametrize(("judged", "check", "remedy"), [
    (None, {"kind": "match", "reference": "a pump"}, "judged: match"),
    ("match", {"kind": "math", "reference": "4"}, "judged: null"),
    ("match", {"kind": "principles", "principles": ["kind"]}, "judged: principles")])
def test_a_domain_judged_otherwise_than_its_problems_say_stops_with_the_remedy(tmp_path, judged, check, remedy):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": "What is a heart?", "check": check}))
    config = DomainConfig(source={"type": "jsonl", "format": "problem", "path": str(path)}, judged=judged,
                          splits={"sft": 1})
    with pytest.raises(StageError, match=f"domains.bio.judged.*{remedy}"):
        load_domain("bio", config, 0)
