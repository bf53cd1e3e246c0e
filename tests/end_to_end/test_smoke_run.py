"""One whole run of the smoke recipe, every part real, and what it must leave behind."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from posttrain_command import artifact, json_lines, left_behind, posttrain, wait_until_gone
from safetensors.torch import load_file

from distill.prompts import prompt_key
from pipeline.recipe_file import load_recipe
from pipeline.records import Problem, Rollout, Sample, read_table
from pipeline.workflow_lookup import find_recipe, load_stages
from policy.model import read_checkpoint
from policy.shards import TensorRecord, read_manifest

RECIPE = load_recipe(find_recipe("smoke"))
DOMAINS = set(RECIPE.domains)
JUDGED = {name for name, domain in RECIPE.domains.items() if domain.judged}
STAGES = [stage.name for stage in load_stages(RECIPE)]
GRPO = {"rl": RECIPE.rl, **{f"expert-{name}-rl": RECIPE.expert.rl for name in sorted(DOMAINS)}}
BOUND = 1e-4  # log-probs of engine and trainer, float32 on both sides


def manifest(run, stage):
    return json.loads((artifact(run.run_dir, stage) / "manifest.json").read_text())


def samples(run, stage):
    return read_table(artifact(run.run_dir, stage) / "samples", Sample)


def curated_samples(run, splits=("train", "validation")):
    return [sample for split in splits
            for sample in read_table(artifact(run.run_dir, "curate") / "dataset" / split, Sample)]


def lost(run, stage, name):
    """{id: reason}"""
    return {row["id"]: row["reason"] for row in pq.read_table(artifact(run.run_dir, stage) / name).to_pylist()}


def ids(rows):
    return Counter(row.id for row in rows)


def states(text):
    """{stage: state} as the tables of `run` and `--dry-run` show it."""
    return dict(re.findall(rf"^({'|'.join(STAGES)}) +(done|running|interrupted|stale|waiting)\b", text, re.MULTILINE))


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_run_prints_every_stage_the_dashboard_and_the_report(smoke_run):
    assert states(smoke_run.done.out) == dict.fromkeys(STAGES, "done")
    assert re.search(r"^Ray dashboard: http://[\d.]+:\d+", smoke_run.done.out, re.MULTILINE)
    assert smoke_run.done.out.splitlines()[-1] == "Report: run/report.html"
    assert (smoke_run.folder / "run/report.html").is_file()


def test_a_run_leaves_no_process_and_no_work_behind(smoke_run):
    wait_until_gone(left_behind(smoke_run.folder))
    assert not list((smoke_run.run_dir / "work").iterdir())


def test_the_same_command_again_runs_nothing(smoke_run):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.run_dir.glob("stages/*/*/*")}
    again = posttrain("run", "smoke", "--run-dir", "run", folder=smoke_run.folder)
    assert again.code == 0
    assert "nothing to do: every stage asked for is done" in again.out
    assert again.out.count("done before") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in smoke_run.run_dir.glob("stages/*/*/*")}


def test_status_has_every_stage_as_done_with_time_and_counts(smoke_run):
    records = json.loads(posttrain("status", "run", "--json", folder=smoke_run.folder).out)
    assert [(record["stage"], record["state"]) for record in records] == [(name, "done") for name in STAGES]
    assert all(record["seconds"] > 0 and (record["counts"] or record["metrics"]) for record in records)


def test_a_changed_value_makes_its_stage_and_those_after_it_stale_and_no_other(smoke_run):
    dry = posttrain("run", "smoke", "--run-dir", "run", "--dry-run", "rl.learning_rate=1e-6", folder=smoke_run.folder)
    assert states(dry.out) == {**dict.fromkeys(STAGES, "done"),
                               **dict.fromkeys(("rl", "evaluate", "export"), "stale")}
    assert f"3 of {len(STAGES)} stages would run" in dry.out
    unchanged = posttrain("run", "smoke", "--run-dir", "run", "--dry-run", folder=smoke_run.folder)
    assert f"0 of {len(STAGES)} stages would run" in unchanged.out


def test_every_look_into_the_run_works(smoke_run):
    def look(*words):
        done = posttrain(*words, folder=smoke_run.folder)
        assert (done.code, done.err) == (0, ""), done.both
        return done.out

    assert "nothing it depends on changed" in look("why", "run", "sft")
    pack = look("show", "run", "pack", "--sample", "0")
    assert re.search(r"\d+ tokens, \d+ carry loss; \d+ isolated sequences", pack)
    # loss on what the model writes, its end-of-turn token included, and on nothing else
    assert pack.count("<|assistant|>[[") == pack.count("<|end|>]]") == pack.count("[[") > 0
    assert re.search(r"score (0|1)\.0, by (math|exact|code) ", look("show", "run", "verify", "--sample", "0"))
    rollout = look("show", "run", "rl", "--sample", "0")
    assert re.search(r"step 0, problem [0-9a-f]{16}, policy version 0", rollout)
    for field in ("text", "reward", "advantage", "verdict"):
        assert f"\n{field}\n" in rollout
    kept = curated_samples(smoke_run, ["train"])[0]
    lineage = look("lineage", "run", kept.id)
    for text in (f"problem {kept.problem_id}", f"weights of expert-{kept.domain}-rl", kept.checkpoint,
                 f"verdict {kept.verdict.status}", "kept by reject", "kept by curate", "of pack", "trained on by sft"):
        assert text in lineage
    report = (smoke_run.run_dir / "report.html").read_text()
    assert "Report: run/report.html" in look("report", "run")
    assert len((smoke_run.run_dir / "report.html").read_text()) == pytest.approx(len(report), rel=0.01)


# -- what the run wrote ---------------------------------------------------------------------------------------------


def test_the_run_ends_with_accuracies_and_the_report(smoke_run):
    table, _, rest = smoke_run.done.out.partition("held-out accuracy, %")[2].partition("Report: ")
    models = json.loads((smoke_run.run_dir / "evaluation.json").read_text())["models"]
    assert [line.split()[0] for line in table.splitlines()[1:] if line.strip()] == list(models)
    accuracy, (low, high) = models["rl"]["all"]["accuracy"], models["rl"]["all"]["ci95"]
    assert f"{100 * accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})" in table
    card = (artifact(smoke_run.run_dir, "export") / "checkpoint/README.md").read_text()
    assert f"recipe `smoke`, seed {RECIPE.seed}" in card and f"{accuracy:.1%} |" in card


def test_evaluation_has_every_model_with_intervals(smoke_run):
    text = (smoke_run.run_dir / "evaluation.json").read_text()
    assert text == (artifact(smoke_run.run_dir, "evaluate") / "evaluation.json").read_text()
    models = json.loads(text)["models"]
    everywhere = {*DOMAINS, "all"}
    assert {name: set(rows) for name, rows in models.items()} == {
        "base": everywhere, "sft": everywhere, "rl": everywhere, **{f"expert-{name}": {name} for name in DOMAINS}}
    for rows in models.values():
        for domain, row in rows.items():
            assert set(row) == {"n", "accuracy", "ci95", "pass_at_k"}
            low, high = row["ci95"]
            if domain in JUDGED:  # an answer the judge has no word on leaves n
                assert 0 <= row["n"] <= RECIPE.evaluation.judged_problems
            else:
                problems = RECIPE.evaluation.problems
                assert row["n"] == problems * (len(DOMAINS - JUDGED) if domain == "all" else 1)
                assert row["pass_at_k"] is not None
            assert 0 <= low <= high <= 1
            assert row["accuracy"] is None if row["n"] == 0 else low <= row["accuracy"] <= high
    metrics = manifest(smoke_run, "evaluate")["metrics"]
    assert all(0 <= metrics[f"base/{name}/reflective"] <= 1 for name in DOMAINS - JUDGED)


class Loads(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action") and tag != "a":
                self.found.append(value)
            self.found += re.findall(r"url\(\s*['\"]?([^)'\"]*)", value or "")

    def handle_data(self, data):
        self.found += re.findall(r"@import|fetch\(|XMLHttpRequest|url\(\s*['\"]?(?!#|data:)[^)]*", data)


def test_the_report_loads_nothing(smoke_run):
    page = Loads()
    page.feed((smoke_run.run_dir / "report.html").read_text())
    assert [found for found in page.found if not found.startswith(("#", "data:"))] == []


def test_no_two_splits_share_a_problem(smoke_run):
    problems = read_table(artifact(smoke_run.run_dir, "problems") / "problems.parquet", Problem)
    split_of = {}
    for problem in problems:
        assert split_of.setdefault(prompt_key(problem.messages), problem.split) == problem.split
    counts = Counter((problem.domain, problem.split) for problem in problems)
    assert counts == {(name, split): count for name, domain in RECIPE.domains.items()
                      for split, count in domain.splits.items()}


def test_every_sample_is_accounted_for(smoke_run):
    generated = sum((ids(samples(smoke_run, f"generate-{name}")) for name in DOMAINS), Counter())
    verified = samples(smoke_run, "verify")
    assert ids(verified) == generated and all(sample.verdict is not None for sample in verified)
    solved = {sample.problem_id for sample in verified if sample.verdict.status == "correct"}
    unsolved = pq.read_table(artifact(smoke_run.run_dir, "verify") / "unsolved.parquet").to_pylist()
    assert {row["problem_id"]: row["attempts"] for row in unsolved} == Counter(
        sample.problem_id for sample in verified if sample.problem_id not in solved)
    assert manifest(smoke_run, "verify")["counts"]["unsolved"] == len(unsolved)
    kept, rejected = samples(smoke_run, "reject"), lost(smoke_run, "reject", "rejected")
    assert ids(kept) + Counter(list(rejected)) == generated
    curated, dropped = curated_samples(smoke_run), lost(smoke_run, "curate", "dropped")
    assert ids(curated) + Counter(list(dropped)) == ids(kept)
    assert all((rejected | dropped).values())
    trained = curated_samples(smoke_run, ["train"])
    packs = pq.read_table(artifact(smoke_run.run_dir, "pack") / "packs").to_pylist()
    packed = Counter(name for row in packs for name in row["sample_ids"])
    assert max(packed.values()) == 1
    assert sum(packed.values()) + manifest(smoke_run, "pack")["counts"]["too_long"] == (
        len(trained) + manifest(smoke_run, "pack")["counts"]["judge_demonstrations"])
    assert len(set(ids(trained)) - set(packed)) <= manifest(smoke_run, "pack")["counts"]["too_long"]


def test_every_curated_sample_comes_from_a_known_problem_and_the_weights_of_its_expert(smoke_run):
    problems = {problem.id: problem
                for problem in read_table(artifact(smoke_run.run_dir, "problems") / "problems.parquet", Problem)}
    curated = curated_samples(smoke_run)
    assert {sample.domain for sample in curated} == DOMAINS
    for domain in DOMAINS:
        folder = artifact(smoke_run.run_dir, f"expert-{domain}-rl") / "checkpoint"
        of_domain = [sample for sample in curated if sample.domain == domain]
        assert {sample.checkpoint for sample in of_domain} == {read_checkpoint(folder).digest}
        assert all((problems[sample.problem_id].domain, problems[sample.problem_id].split) == (domain, "sft")
                   for sample in of_domain)


def test_a_curated_sample_of_a_checkable_domain_is_correct(smoke_run):
    checked = [sample for sample in curated_samples(smoke_run) if sample.domain not in JUDGED]
    assert {sample.verdict.status for sample in checked} == {"correct"}


@pytest.mark.parametrize("stage", GRPO)
def test_rollouts_carry_the_engines_log_probs(smoke_run, stage):
    config = GRPO[stage]
    rollouts = read_table(artifact(smoke_run.run_dir, stage) / "rollouts.parquet", Rollout)
    assert len(rollouts) == config.steps * config.prompts_per_step * config.group_size
    for rollout in rollouts:
        assert 0 < len(rollout.logprobs) == len(rollout.completion_ids) <= config.max_completion_length
        assert max(rollout.logprobs) <= 1e-6
        assert rollout.policy_version == rollout.step * config.mini_batches
    ledger = json_lines(artifact(smoke_run.run_dir, stage) / "ledger.jsonl")
    assert Counter(line["step"] for line in ledger) == dict.fromkeys(range(config.steps), config.prompts_per_step)
    assert {(line["step"], line["prompt_id"]) for line in ledger} == {(r.step, r.problem_id) for r in rollouts}


@pytest.mark.parametrize("stage", GRPO)
def test_engine_and_trainer_agree_after_every_sync(smoke_run, stage):
    metrics = manifest(smoke_run, stage)["metrics"]
    assert metrics["steps"] == GRPO[stage].steps * GRPO[stage].mini_batches
    assert 0 < metrics["sync_logprob_error_max"] < BOUND
    assert 0 < metrics["drift_mean"] <= metrics["drift_max"] < BOUND
    curve = json_lines(artifact(smoke_run.run_dir, stage) / "curve.jsonl")
    assert all(row["sync_logprob_error"] < BOUND for row in curve)


def test_generation_ran_on_the_weights_it_names(smoke_run):
    for domain in DOMAINS:
        assert 0 < manifest(smoke_run, f"generate-{domain}")["metrics"]["load_logprob_error"] < BOUND


def test_the_exported_checkpoint_is_the_one_that_rl_ended_with(smoke_run):
    exported = artifact(smoke_run.run_dir, "export") / "checkpoint"
    assert read_checkpoint(exported).digest == read_checkpoint(artifact(smoke_run.run_dir, "rl") / "checkpoint").digest
    weights = load_file(exported / "model.safetensors")
    assert {name: TensorRecord.of(tensor) for name, tensor in weights.items()} == read_manifest(exported)
    assert read_checkpoint(exported).digest != read_checkpoint(artifact(smoke_run.run_dir, "sft") / "checkpoint").digest
