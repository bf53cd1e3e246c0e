import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy_workflow

from pipeline.artifacts import RunDirectory
from pipeline.fingerprint import GraphError, source_hashes
from pipeline.graph import DONE, INTERRUPTED, STALE, WAITING, order, plan, why
from pipeline.stage import Stage
from pipeline.worker import StageOrder, StageWorker


def commit_all(stages, seed, directory):
    """Run and commit what is not done, without Ray; returns the names that ran."""
    ran = []
    for stage in order(stages):
        item = next(item for item in plan(stages, seed, directory) if item.stage.name == stage.name)
        if item.state == DONE:
            continue
        work = directory.work_folder(stage.name, item.fingerprint)
        inputs = {name: directory.stage_folder(name, item.parts["inputs"][name]) for name in stage.inputs}
        result = StageWorker().run_stage(StageOrder(stage, inputs, work, directory.log_file(stage.name), seed))
        directory.commit(stage.name, item.fingerprint, item.parts, result, {"seconds": 0.0})
        ran.append(stage.name)
    return ran


@pytest.fixture
def stages():
    return toy_workflow.chain({"rate": 1.0}, {"rl": {"group_size": 16, "steps": 5}}, {"k": 4})


def states(stages, directory, seed=0):
    return {item.stage.name: item.state for item in plan(stages, seed, directory)}


def test_a_finished_stage_is_done_and_the_files_and_manifest_are_there(tmp_path, stages):
    directory = RunDirectory(tmp_path)
    assert states(stages, directory) == {"first": WAITING, "second": WAITING, "third": WAITING}
    commit_all(stages, 0, directory)
    assert states(stages, directory) == {"first": DONE, "second": DONE, "third": DONE}
    manifest = directory.newest_manifest("second")
    assert manifest["counts"] == {"in": 1, "out": 1}
    assert manifest["files"] == [{"path": "text.txt", "bytes": manifest["files"][0]["bytes"]}]
    assert {"python", "torch", "ray", "trl"} <= set(manifest["versions"])
    assert not list((tmp_path / "work").iterdir())


def test_a_changed_section_makes_only_its_stage_and_those_after_it_stale(tmp_path, stages):
    directory = RunDirectory(tmp_path)
    commit_all(stages, 0, directory)
    changed = [stages[0], replace(stages[1], config={"rl": {"group_size": 8, "steps": 5}}), stages[2]]
    assert states(changed, directory) == {"first": DONE, "second": STALE, "third": STALE}
    assert commit_all(changed, 0, directory) == ["second", "third"]
    assert states(stages, directory) == {"first": DONE, "second": DONE, "third": DONE}, "going back runs nothing"


def test_an_edited_file_outside_the_run_makes_its_stage_stale_and_why_names_it(tmp_path, stages):
    directory, rows, folder = RunDirectory(tmp_path / "run"), tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text("1\n")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    stages[0] = replace(stages[0], files=(str(rows), str(folder)))
    commit_all(stages, 0, directory)
    assert set(states(stages, directory).values()) == {DONE}
    rows.write_text("2\n")
    assert states(stages, directory)["first"] == STALE
    [line] = [line for line in why(stages, 0, directory, "first") if "file " in line]
    assert f"file {rows}: " in line and str(folder) not in line
    rows.write_text("1\n")
    assert states(stages, directory)["first"] == DONE
    (folder / "config.json").rename(folder / "other.json")
    assert states(stages, directory)["first"] == STALE
    rows.unlink()
    lines = why(stages, 0, directory, "first")
    assert any(line.strip().startswith(f"file {rows}: ") and line.endswith("-> missing") for line in lines)


def test_why_names_the_dotted_key_with_both_values_and_follows_inputs(tmp_path, stages):
    directory = RunDirectory(tmp_path)
    commit_all(stages, 0, directory)
    changed = [stages[0], replace(stages[1], config={"rl": {"group_size": 8}}), stages[2]]
    text = "\n".join(why(changed, 0, directory, "third"))
    assert "input second: " in text
    assert "config rl.group_size: 16 -> 8" in text
    assert "config rl.steps: removed (was 5)" in text
    assert "first" not in text
    assert "is done" in why(changed, 0, directory, "first")[0]


def test_the_seed_is_part_of_every_fingerprint_and_named(tmp_path, stages):
    directory = RunDirectory(tmp_path)
    commit_all(stages, 0, directory)
    assert set(states(stages, directory, seed=1).values()) == {STALE}
    assert "  seed: 0 -> 1" in why(stages, 1, directory, "first")


def test_an_edited_source_file_makes_the_stages_that_declare_it_stale(tmp_path, monkeypatch, stages):
    package = tmp_path / "src" / "someroom"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text("COEF = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    stages = [stages[0], replace(stages[1], modules=("someroom",)), stages[2]]
    directory = RunDirectory(tmp_path / "run")
    commit_all(stages, 0, directory)
    (package / "losses.py").write_text("COEF = 2\n")
    assert states(stages, directory) == {"first": DONE, "second": STALE, "third": STALE}
    assert "  source of someroom/losses.py" in why(stages, 0, directory, "second")
    assert "someroom" not in sys.modules, "hashing must not import"


def test_what_a_module_imports_belongs_to_it_and_a_missing_one_is_an_error():
    assert list(source_hashes(["pipeline.stage"])) == ["pipeline/stage.py"]
    corpus = source_hashes(["distill.corpus"])
    # through distill.corpus -> rewards.judge_prompts -> rewards.extract
    assert {"distill/problems/writing.py", "rewards/judge_prompts.py", "rewards/extract.py"} <= set(corpus)
    assert not [file for file in corpus if file.startswith(("workflows", "rl/"))]
    with pytest.raises(GraphError, match="stage x: module pipeline.nothing"):
        source_hashes(["pipeline.nothing"], "x")


def test_a_source_that_does_not_parse_is_hashed_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(source_hashes(["halfway"])) == ["halfway.py"]


def test_a_work_folder_means_interrupted(tmp_path, stages):
    directory = RunDirectory(tmp_path)
    item = plan(stages, 0, directory)[0]
    directory.work_folder("first", item.fingerprint).mkdir(parents=True)
    assert states(stages, directory)["first"] == INTERRUPTED


def test_a_cycle_is_named_stage_by_stage():
    stages = [Stage("a", toy_workflow.write, {}, inputs=("c",)), Stage("b", toy_workflow.write, {}, inputs=("a",)),
              Stage("c", toy_workflow.write, {}, inputs=("b",)), Stage("free", toy_workflow.write, {})]
    with pytest.raises(GraphError, match="circle: a <- c <- b <- a"):
        order(stages)


def test_an_unknown_input_is_refused_with_a_suggestion():
    stages = [Stage("verify", toy_workflow.write, {}), Stage("reject", toy_workflow.write, {}, inputs=("verfy",))]
    with pytest.raises(GraphError, match="stage reject wants input verfy.*did you mean verify"):
        order(stages)


def test_inputs_come_before_their_users_and_the_given_order_is_kept_otherwise():
    stages = [Stage("z", toy_workflow.write, {}, inputs=("m",)), Stage("m", toy_workflow.write, {}),
              Stage("a", toy_workflow.write, {})]
    assert [stage.name for stage in order(stages)] == ["m", "z", "a"]


def test_config_without_a_stable_form_is_refused(tmp_path):
    with pytest.raises(TypeError, match="Path|Posix"):
        plan([Stage("a", toy_workflow.write, {"path": Path("x")})], 0, RunDirectory(tmp_path))
