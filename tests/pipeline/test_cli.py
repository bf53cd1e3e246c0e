import json
import sys

import pytest
import toy_workflow
from rich.console import Console
from test_fingerprints import commit_all

from pipeline import cli
from pipeline.artifacts import RunDirectory
from pipeline.recipe_file import dump_recipe
from pipeline.show import show


@pytest.fixture
def finished(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    recipe = toy_workflow.recipe()
    directory.claim(recipe.name, dump_recipe(recipe))
    commit_all(toy_workflow.build(recipe), recipe.seed, directory)
    return directory


def test_help_lists_the_commands(posttrain):
    seen = posttrain("--help")
    assert seen.code == 0
    for command in ("run", "stage", "status", "why", "show", "report", "lineage", "doctor"):
        assert command in seen.out


def test_a_dry_run_shows_what_would_run_and_writes_nothing(posttrain, tmp_path):
    seen = posttrain("run", "toy.yaml", "--dry-run")
    assert seen.code == 0
    assert "3 of 3 stages would run in runs/toy" in seen.out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prices_the_generation_of_a_workflow_that_generates(posttrain):
    seen = posttrain("run", "deepseek-v3", "--dry-run")
    assert seen.code == 0
    assert "26 of 26 stages would run" in seen.out
    rows = {line.split()[0]: line.split() for line in seen.out.splitlines() if line.strip()}
    assert rows["generation,"][2:] == ["answered", "by", "prompts", "samples:", "first", "expected", "most", "prompt",
                                       "tokens", "tokens", "written", "by", "a", "judge", "engine", "hours", "USD",
                                       "kept", "wanted"]
    assert rows["math"][1:6] == ["expert-math", "300k", "1.2M", "1.71M", "4.8M"] and rows["math"][-1] == "240k"
    assert rows["all"][-1] == "1.5M" and "GPU hours); with engine.replicas 4" in seen.out


def test_a_dry_run_with_an_override_names_the_key(posttrain, finished):
    seen = posttrain("run", "toy.yaml", "--run-dir", "run", "--dry-run", "rl.group_size=8")
    assert "2 of 3 stages would run" in seen.out
    assert "group_size: 16 -> 8" in seen.out


def test_a_wrong_recipe_is_a_message_and_exit_code_2(posttrain):
    seen = posttrain("run", "toy.yaml", "rl.group_sise=8")
    assert seen.code == 2
    assert "did you mean group_size?" in seen.err
    assert "Traceback" not in seen.err


@pytest.mark.parametrize(("words", "message"), [
    (("run", "toy.yaml", "--until", "secnd"), "did you mean second?"),
    (("run", "nothere"), "no such recipe"),
    (("run", "toy.yaml", "workflow=toyy"), "no workflow 'toyy'"),
])
def test_a_wrong_name_is_a_message_and_exit_code_2(posttrain, words, message):
    seen = posttrain(*words)
    assert (seen.code, message in seen.err) == (2, True), seen.err


def test_another_recipes_directory_is_refused_before_ray_starts(posttrain, finished, tmp_path):
    (tmp_path / "other.yaml").write_text(dump_recipe(toy_workflow.recipe(name="other")))
    seen = posttrain("run", "other.yaml", "--run-dir", "run")
    assert seen.code == 1
    assert "belongs to recipe toy, this is other" in seen.err
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_stage_alone_needs_its_inputs(posttrain, tmp_path):
    seen = posttrain("stage", "third", "toy.yaml", "--run-dir", "fresh")
    assert seen.code == 1
    assert "stage third needs first (waiting), second (waiting)" in seen.err


def test_a_file_in_place_of_the_run_directory_is_a_message(posttrain, tmp_path):
    (tmp_path / "notes").write_text("")
    seen = posttrain("run", "toy.yaml", "--run-dir", "notes")
    assert (seen.code, "a file stands where the run directory would be" in seen.err) == (1, True), seen.err


def test_an_evaluation_that_the_run_no_longer_stands_for_is_removed(posttrain, finished):
    (finished.root / "evaluation.json").write_text('{"models": {}}')
    assert posttrain("run", "toy.yaml", "--run-dir", "run").code == 0
    assert not (finished.root / "evaluation.json").exists()


def test_accuracy_is_shown_with_its_interval(capsys):
    row = {"n": 500, "accuracy": 0.5, "ci95": [0.456, 0.544], "pass_at_k": None}
    Console(width=120).print(cli._evaluation_table({"base": {"math": row}, "rl": {
        "math": row, "chess": row | {"n": 0, "accuracy": None, "ci95": [0, 1]}}}))
    base, rl = capsys.readouterr().out.splitlines()[1:]
    assert base.split() == ["base", "50.0", "(45.6-54.4)"]
    assert rl.split() == ["rl", "50.0", "(45.6-54.4)", "no", "verdict"]


def test_status_as_json_has_every_stage(posttrain, finished):
    records = json.loads(posttrain("status", "run", "--json").out)
    assert [(record["stage"], record["state"]) for record in records] == [
        ("first", "done"), ("second", "done"), ("third", "done")]
    assert records[1]["metrics"] == {"lines": 1}
    assert "lines 1" in posttrain("status", "run").out


def test_why_of_a_run_that_is_up_to_date(posttrain, finished):
    assert "nothing it depends on changed" in posttrain("why", "run", "second").out


def test_lineage_leads_from_problem_and_expert_to_the_pack(posttrain, traced):
    seen = posttrain("lineage", "traced", "aaaa1111")
    for text in ("What is 2 + 2?", "weights of expert-math-rl (a1a1a1a1a1a1), checkpoint digest digest77",
                 "verdict correct", "kept by reject", "kept by curate (a5a5a5a5a5a5), in the train split",
                 "in row 2 of pack (a6a6a6a6a6a6): row 0 of part-00001.parquet", "trained on by sft"):
        assert text in seen.out, seen.out


def test_lineage_says_why_a_sample_was_rejected(posttrain, traced):
    seen = posttrain("lineage", "traced", "bbbb2222bbbb2222")
    assert "verdict wrong (different)" in seen.out
    assert "5 is not 4" in seen.out
    assert "rejected by reject: wrong" in seen.out
    assert "curate" not in seen.out and "pack" not in seen.out


def test_lineage_says_what_a_dropped_sample_is_like(posttrain, traced):
    seen = posttrain("lineage", "traced", "dddd4444")
    assert "dropped by curate: near_duplicate, like aaaa1111aaaa1111" in seen.out
    assert "kept by reject" in seen.out and "pack" not in seen.out


def test_lineage_finds_an_edited_sample_by_its_old_and_its_new_id(posttrain, traced):
    for sample_id in ("ffff6666", "eeee5555"):
        seen = posttrain("lineage", "traced", sample_id)
        for text in (f"sample {sample_id}", "generated by generate-math",
                     "edited by ann into sample eeee5555eeee5555, kept by reject", "in the validation split",
                     "not in pack (a6a6a6a6a6a6)"):
            assert text in seen.out, seen.out
    assert "edited from sample ffff6666ffff6666" in seen.out


def test_an_unknown_sample_is_a_message(posttrain, traced):
    seen = posttrain("lineage", "traced", "cccc3333")
    assert seen.code == 1
    assert "no generated sample of this run has the id cccc3333" in seen.err


def test_show_marks_the_tokens_that_carry_loss(posttrain, traced):
    seen = posttrain("show", "traced", "pack", "--sample", "2")
    assert "row 2 of 3" in seen.out and "5 tokens, 2 carry loss" in seen.out
    assert "2 + 2[[= 4]]" in seen.out


def test_show_colours_them_in_a_terminal(traced, capsys):
    show(traced, "pack", 0, Console(force_terminal=True))
    assert "[[" not in capsys.readouterr().out


def test_show_leaves_the_terminal_alone(posttrain, traced):
    seen = posttrain("show", "traced", "verify", "--sample", "3")
    assert "I guess.[U+001B][2J" in seen.out and "\x1b" not in seen.out


def test_show_prints_a_sample_with_its_verdict(posttrain, traced):
    seen = posttrain("show", "traced", "verify", "--sample", "1")
    assert "2 + 2 = 5" in seen.out
    assert "wrong (different), score 0.0, by math 1" in seen.out
    assert "there is no row 4" in posttrain("show", "traced", "verify", "--sample", "4").err
    assert "2 + 2 = 4." in posttrain("show", "traced", "reject", "--sample", "1").out
    assert "It is 4." in posttrain("show", "traced", "curate", "--sample", "1").out
    assert "did you mean verify" in posttrain("show", "traced", "verfy").err
