"""The report of a made-up run: its folders are committed by the real writers, its numbers are drawn at random."""

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_workflow

from pipeline.artifacts import RunDirectory
from pipeline.fingerprint import fingerprint, stage_parts
from pipeline.recipe import Recipe
from pipeline.recipe_file import dump_recipe
from pipeline.records import Check, Problem, Rollout, Sample, Status, Verdict, write_table
from pipeline.report import write_report
from pipeline.report_charts import MOST_POINTS, heat_map, line_chart, text
from pipeline.report_experts import _spread, relative
from pipeline.report_rollouts import choose
from pipeline.stage import StageResult
from workflows.deepseek_v3 import build

HOSTILE = ("<think>\n</pre></details><script>alert('owned')</script>\n</think>\n"
           "<img src=x onerror=alert(1)> \u202egnp.exe\u202c \x00 &amp; \"quoted\" ]]> </style><style>*{display:none}")
STEPS = 40
VOID = {"meta", "br", "img", "hr", "link", "input"}


def make_recipe(domains):
    writing = {"source": {"type": "generated", "generator": "writing"}, "judged": "principles"}
    return Recipe.model_validate({
        "name": "made-up", "seed": 7, "model": {"source": {"type": "tiny"}, "dtype": "float32", "max_length": 256},
        "domains": {name: {**(writing if name == "writing" else {"source": {"type": "generated", "generator": name}}),
                           "splits": {"sft": 4, "preference": 4, "rl": 8, "heldout": 60}} for name in domains},
        "expert": {"rl": {"max_completion_length": 96}}, "rl": {"max_completion_length": 96},
        "generate": {"max_tokens": 96}, "preference": {"max_tokens": 96}, "evaluation": {"max_tokens": 96, "k": 4}})


def wilson(share, n):
    centre, half = share + 1.92 / n, 1.96 * math.sqrt(share * (1 - share) / n + 0.96 / n**2)
    return [max(0.0, (centre - half) / (1 + 3.84 / n)), (centre + half) / (1 + 3.84 / n)]


class MadeUp:
    """Fills the artifact of every stage; `rng` is the only source of its numbers."""

    def __init__(self, domains, samples=60):
        self.domains, self.samples, self.rng = domains, samples, random.Random(0)

    def fill(self, name, out):
        """Write the files of stage `name` into `out`; returns what its manifest shall say."""
        special = {"problems": self.problems, "verify": self.verify, "reject": self.reject, "curate": self.curate,
                   "pack": self.pack, "evaluate": self.evaluate, "export": self.evaluate}
        if name in special:
            return special[name](out)
        if name.startswith("generate-"):
            return StageResult({"problems": 30, "samples": self.samples},
                               {"finished_share": 0.9, "load_logprob_error": 3.1e-6}, "finished_share")
        if name == "preference":
            return StageResult({"pairs": 40, "by_reason": {"kept": 22, "small_gap": 18}},
                               {"kept_share": 0.55, "load_logprob_error": 2.4e-6}, "kept_share")
        if name == "rl" or name.endswith("-rl"):
            own = self.domains if name == "rl" else [name.removeprefix("expert-").removesuffix("-rl")]
            return self.grpo(out, own)
        return self.supervised(out, calibrated=name == "reward-model")

    def problem(self, domain, index):
        check = Check("principles", principles=("Be brief.",)) if domain == "writing" else Check("math", str(index))
        return Problem(f"{domain}-{index}", domain, "sums", ({"role": "user", "content": f"What is 1 + {index - 1}?"},),
                       check, "generated", "rl")

    def problems(self, out):
        write_table(out / "problems.parquet", [self.problem(domain, index) for domain in self.domains
                                               for index in range(30)], Problem)
        return StageResult({"problems": 30 * len(self.domains), "splits": {name: {"rl": 30} for name in self.domains}},
                           {"problems": 30 * len(self.domains)}, "problems")

    def verdict(self, domain, right):
        status = Status.CORRECT if self.rng.random() < right else self.rng.choices(
            [Status.WRONG, Status.MALFORMED, Status.TIMEOUT, Status.INFRA_ERROR], [70, 25, 4, 1])[0]
        reason = {Status.CORRECT: "equal_exact", Status.WRONG: "different", Status.MALFORMED: "no_box",
                  Status.TIMEOUT: "time_limit", Status.INFRA_ERROR: "verifier_failed"}[status]
        score = None if status is Status.INFRA_ERROR else float(status is Status.CORRECT)
        return Verdict(status, score, reason, "judge" if domain == "writing" else "math", "1", 0.01, f"got {HOSTILE}")

    def sample(self, domain, index):
        return Sample(f"{domain}-s{index}", f"{domain}-{index % 30}", domain, "original", (), "4", "digest", "{}",
                      "stop", 9, self.verdict(domain, 0.6))

    @staticmethod
    def parts(folder, samples):
        folder.mkdir(parents=True)
        for number, start in enumerate(range(0, len(samples), 50)):
            write_table(folder / f"part-{number:05}.parquet", samples[start:start + 50], Sample)

    def verify(self, out):
        self.verified = [self.sample(domain, index) for domain in self.domains for index in range(self.samples)]
        self.parts(out / "samples", self.verified)
        return StageResult({"samples": len(self.verified)}, {"correct_share": 0.6}, "correct_share")

    def funnel(self, before, after, reasons):
        gone = {s.id for s in before} - {s.id for s in after}
        return {domain: {"in": sum(s.domain == domain for s in before), "out": sum(s.domain == domain for s in after),
                         "lost": self.lost([s for s in before if s.domain == domain and s.id in gone], reasons),
                         "quota": {"wanted": 40, "got": sum(s.domain == domain for s in after), "reasoning": 3}}
                for domain in self.domains}

    @staticmethod
    def lost(samples, reasons):
        counted = {}
        for index, sample in enumerate(samples):
            status = sample.verdict.status
            reason = reasons[index % len(reasons)] if status is Status.CORRECT else status.value
            counted[reason] = counted.get(reason, 0) + 1
        return counted

    def reject(self, out):
        right = [s for s in self.verified if s.verdict.status is Status.CORRECT]
        self.kept = [s for index, s in enumerate(right) if index % 3]
        self.parts(out / "samples", self.kept)
        return StageResult({"in": len(self.verified), "out": len(self.kept), "funnel": self.funnel(
            self.verified, self.kept, ["not_shortest", "truncated"])}, {"kept_share": 0.4}, "kept_share")

    def curate(self, out):
        self.curated = [s for index, s in enumerate(self.kept) if index % 5]
        self.parts(out / "dataset/train", self.curated[:-2])
        self.parts(out / "dataset/validation", self.curated[-2:])
        return StageResult({"in": len(self.kept), "out": len(self.curated), "funnel": self.funnel(
            self.kept, self.curated, ["near_duplicate", "quota"])}, {"samples": len(self.curated)}, "samples")

    def pack(self, out):
        """One sample of the first domain is too long; a demonstration is packed beside the samples."""
        ids = [[s.id] for s in self.curated[1:-2]] + [["judge-1"]]
        (out / "packs").mkdir()
        pq.write_table(pa.table({"sample_ids": pa.array(ids, pa.list_(pa.string()))}),
                       out / "packs/part-00000.parquet")
        return StageResult({"packs": 12, "tokens": 2900, "too_long": 1, "samples": len(self.curated),
                            "judge_demonstrations": 1}, {"fill": 0.94}, "fill")

    def curve(self, out, row):
        rows = [{"step": step + 1, **{key: value(step / STEPS) for key, value in row.items()}} for step in range(STEPS)]
        (out / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(self):
        """3 routers of 4 experts, 100 choices each a step; the last saw nothing."""
        return {"dropped_tokens": lambda at: 0,
                "expert_load": lambda at: [[10, 40, 25, 25], [0, 0, 100, 0], [0, 0, 0, 0]]}

    def supervised(self, out, calibrated):
        noise = self.rng.random
        self.curve(out, {"loss": lambda at: 5 * math.exp(-3 * at) + 0.8 + 0.1 * noise(),
                         "mean_token_accuracy": lambda at: 0.2 + 0.5 * at,
                         "max_violation": lambda at: 2 - at + noise() / 3, **self.load()})
        if calibrated:
            (out / "calibration.json").write_text(json.dumps({
                "n": 16, "truth": "measured", "accuracy": 0.6875, "pairwise_accuracy": None, "consistency": 0.8,
                "abstain_rate": 0.0625}))
        return StageResult({"documents": 300}, {"loss": 0.84}, "loss")

    def grpo(self, out, own):
        noise = self.rng.random
        self.curve(out, {"loss": lambda at: noise() / 100, "rollout_reward": lambda at: 0.4 + at + noise() / 5,
                         "kl": lambda at: 0.02 * at + noise() / 500,
                         "completions/mean_length": lambda at: 60 - 15 * at + 5 * noise(),
                         "trained_share": lambda at: 0.6, "max_violation": lambda at: 0.4 + noise(),
                         "rerouted_share": lambda at: 0.02 * noise(), **self.load(),
                         "sampling/sampling_logp_difference/mean": lambda at: 1e-6 + 1e-6 * noise(),
                         "sampling/sampling_logp_difference/max": lambda at: 1e-5 + 1e-5 * noise(),
                         "sync_logprob_error": lambda at: 3e-6 + 3e-6 * noise(),
                         **{f"accuracy/{domain}": lambda at, low=index / 7: 0.1 + low + at / 3 + noise() / 8
                            for index, domain in enumerate(own)}})
        rollouts, ledger = [], []
        for step in range(STEPS):
            for domain in own:
                index = self.rng.randrange(30)
                ledger.append({"step": step, "prompt_id": f"{domain}-{index}", "form": "reasoning",
                               "state": self.rng.choice(["trained", "trained", "zero_variance"])})
                for member in range(2):
                    verdict = self.verdict(domain, 0.3 + step / 100)
                    body = f"<think>\n1 + {index - 1} = {index}\n</think>\n\\boxed{{{index}}}"
                    rollouts.append(Rollout(
                        f"{domain}-{step}-{member}", f"{domain}-{index}", domain, step, member, (1, 2), (3, 4),
                        (-0.5, -0.1), step, body if step % 3 else HOSTILE, verdict.score,
                        {"accuracy": verdict.score, "format": 1.0, "language": 1.0},
                        None if verdict.score is None else verdict.score - 0.5, verdict))
        write_table(out / "rollouts.parquet", rollouts, Rollout)
        (out / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
        return StageResult({"prompts": len(ledger), "groups": {"trained": 20}}, {"rollout_accuracy_last": 0.7},
                           "rollout_accuracy_last")

    def evaluate(self, out):
        def row(share, k=True):
            return {"n": 60, "accuracy": share, "ci95": wilson(share, 60), "pass_at_k": share + 0.1 if k else None}

        models = {label: {domain: row((0.5 if domain == "writing" and label == "base" else share) - 0.03 * index,
                                      domain != "writing")
                          for index, domain in enumerate(self.domains)}
                  for label, share in (("base", 0.1), ("sft", 0.55), ("rl", 0.68))}
        for label, share in (("base", 0.07), ("sft", 0.52), ("rl", 0.65)):
            models[label]["all"] = {**row(share), "n": 180, "ci95": wilson(share, 180)}
        (out / "expert_load.json").write_text(json.dumps({"layers": [1, 2], "load": {
            domain: [[10, 20, 30, 40], [0, 0, 90, 30]] for domain in self.domains}}))
        models |= {f"expert-{domain}": {domain: row(0.6)} for domain in self.domains}
        (out / "evaluation.json").write_text(json.dumps({"models": models}))
        return StageResult({"samples": 600}, {"rl/all": 0.65, "base/math/reflective": 0.31,
                                              "sft/writing/measured": 0.71,
                                              "expert-writing/writing/measured": 0.74}, "rl/all")


def make_run(root, domains=("math", "writing"), until=None):
    """A run directory with every stage up to and with `until` committed; returns (root, stages)."""
    recipe = make_recipe(domains)
    stages, directory, made = build(recipe), RunDirectory(root), MadeUp(list(domains))
    directory.claim(recipe.name, dump_recipe(recipe))
    prints = {}
    for stage in stages:
        parts = stage_parts(stage, recipe.seed, prints)
        prints[stage.name] = fingerprint(parts)
        out = directory.work_folder(stage.name, prints[stage.name]) / "out.tmp"
        out.mkdir(parents=True)
        directory.commit(stage.name, prints[stage.name], parts, made.fill(stage.name, out), title=stage.title, timings={
            "started": "2026-01-01T00:00:00+00:00", "seconds": round(made.rng.uniform(1, 90), 3),
            "peak_memory_gib": 1.7})
        if stage.name == until:
            break
    return root, stages


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps tags, attributes, and the text of `pre` and the whole."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.pre, self.words = [], [], [], [], []
        self.feed(markup)
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, *pair) for pair in attributes]
        if name not in VOID:
            self.open.append(name)
        if name == "pre":
            self.pre.append("")

    def handle_startendtag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, *pair) for pair in attributes]

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"</{name}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        if "pre" in self.open:
            self.pre[-1] += data


def read(root, stages):
    return Page(write_report(root, stages).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def page(whole):
    return read(*whole)


def test_the_report_says_what_was_reached_in_one_sentence(page):
    assert "On 180 held-out problems a rule can check, accuracy is 7.0% [" in page.text
    assert "for the base model" in page.text and "65.0%" in page.text
    assert "Not there yet" not in page.text


def test_the_report_says_what_the_base_makes_of_the_experts_prompt(page):
    assert "With that prompt the base model is right in 31.0% of math." in page.text


@pytest.mark.parametrize("after, told_apart", [(0.58, False), (0.9, True)])
def test_overlapping_intervals_are_not_sold_as_progress(tmp_path, after, told_apart):
    root, stages = make_run(tmp_path / "run", domains=("math",))
    rewrite_evaluation(root, {label: {"all": {"n": 60, "accuracy": share, "ci95": wilson(share, 60), "pass_at_k": None}}
                              for label, share in (("base", 0.1), ("sft", 0.5), ("rl", after))})
    assert ("does not tell them apart" in read(root, stages).text) is not told_apart


def test_the_report_needs_no_network_and_runs_only_its_own_script(page):
    for name, key, value in page.attributes:
        assert key not in ("src", "srcset", "data", "action"), f"<{name} {key}={value}>"
        assert not key.startswith("on"), f"<{name} {key}={value}>"
        if key == "href":
            assert value.startswith("#")
    policy = next(value for name, key, value in page.attributes if key == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and page.tags.count("script") == 1


def test_hostile_model_text_is_shown_and_never_becomes_markup(page):
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1 and "img" not in page.tags
    visible = HOSTILE.replace("\u202e", "[U+202E]").replace("\u202c", "[U+202C]").replace("\x00", "[U+0000]")
    assert f"\n{visible}" in page.pre, "the completion"
    assert f"\ngot {visible}" in page.pre, "the verifier's evidence"


def test_invisible_characters_are_made_visible():
    assert text("a\u200bb\x1b[2J\U000e0041\ud800<") == "a[U+200B]b[U+001B][2J[U+E0041][U+D800]&lt;"
    assert text("kept: \t\n é 数") == "kept: \t\n é 数"


def test_every_domain_shows_its_way_from_generated_to_packed(whole, page):
    root, _ = whole
    funnel = json.loads(next(root.glob("stages/curate/*/manifest.json")).read_text())["counts"]["funnel"]
    assert "generated 60" in page.text and "verified correct" in page.text and "judged" in page.text
    assert f"curated {funnel['math']['out']} " in page.text
    assert f"packed for SFT {funnel['math']['out'] - 1} −1 too long" in page.text
    assert f"packed for SFT {funnel['writing']['out'] - 2} −2 validation" in page.text
    assert "not shortest" in page.text and "near duplicate" in page.text


def test_all_trainings_have_their_curves(page):
    labels = [value for name, key, value in page.attributes if name == "svg" and key == "aria-label"]
    for title in ("base: ", "expert-math-sft: ", "sft: ", "reward-model: ", "verdict score: math: ", "drift: ",
                  "rerouted share: ",
                  "KL: ", "sync error: ", "trained share: ", "load violation: ",
                  "completion length: "):
        assert any(label.startswith(title) for label in labels), title


def test_each_layer_shows_the_experts_of_each_domain_and_what_was_dropped(whole, page):
    labels = [value for name, key, value in page.attributes if name == "svg" and key == "aria-label"]
    assert "layer 1: math: most at expert 3 with 1.6; writing: most at expert 3 with 1.6" in labels
    assert "layer 2: math: most at expert 2 with 3; writing: most at expert 2 with 3" in labels
    assert "base: router 0: most at expert 1 with 1.6; router 1: most at expert 2 with 4" in labels
    trainings = len(list(whole[0].glob("stages/*/*/curve.jsonl")))
    assert f"Of {200 * STEPS * trainings:,} choices of an expert in {trainings} trainings, 0 were dropped" in page.text


def test_many_layers_are_thinned_out_with_the_first_and_last_kept():
    assert _spread(range(5)) == [0, 1, 2, 3, 4]
    assert len(set(_spread(range(58)))) == 12 and {0, 57} <= set(_spread(range(58)))
    assert heat_map("layer", [], 4.0, column="expert") == ""
    assert relative([0, 0]) == [0.0, 0.0] and relative([1, 3]) == [0.5, 1.5]


def test_trust_shows_proofs_drift_verdicts_groups_and_calibration(page):
    for words in ("rl, worst of 40 syncs", "generate-math, at load", "worst step mean", "infra error", "zero variance",
                  "68.8%", "at least 60% to be a reward", "unknown"):
        assert words in page.text, words


def test_each_domain_shows_ten_rollouts_with_all_kinds_of_verdict(whole, page):
    root, _ = whole
    path = next(root.glob("stages/rl/*/rollouts.parquet"))
    for domain in ("math", "writing"):
        chosen = choose(path, domain)
        rows = pq.read_table(path).take(chosen).to_pylist()
        everything = [row for row in pq.read_table(path).to_pylist() if row["domain"] == domain]
        assert len(set(chosen)) == 10 and {row["domain"] for row in rows} == {domain}
        assert {row["verdict"]["status"] for row in rows} == {row["verdict"]["status"] for row in everything}
        assert max(row["step"] for row in rows) - min(row["step"] for row in rows) > STEPS / 2
    assert sum(value == "rollout" for name, key, value in page.attributes if key == "class") == 20
    assert "What is 1 + " in page.text and f"posttrain show {root} rl --sample " in page.text


def test_the_stages_table_has_time_fingerprint_and_recipe(whole, page):
    root, stages = whole
    for stage in stages:
        assert stage.name in page.text
    manifest = json.loads(next(root.glob("stages/rl/*/manifest.json")).read_text())
    assert manifest["fingerprint"][:12] in page.text and "Seed 7." in page.text
    assert any("name: made-up" in block and "group_size: 16" in block for block in page.pre)


@pytest.mark.parametrize("until", ["problems", "expert-math-rl", "verify", "pack", "sft", "reward-model"])
def test_a_partial_run_has_a_report_that_says_what_is_missing(tmp_path, until):
    root, stages = make_run(tmp_path / "run", until=until)
    page = read(root, stages)
    assert "Not evaluated yet" in page.text and "Not there yet: evaluate (waiting: needs" in page.text
    if until == "expert-math-rl":
        assert "10 of expert-math-rl" in page.text and "No GRPO training" not in page.text


def test_a_run_that_has_done_nothing_has_a_report(tmp_path):
    recipe = make_recipe(["math"])
    RunDirectory(tmp_path).claim(recipe.name, dump_recipe(recipe))
    page = read(tmp_path, build(recipe))
    assert f"Not evaluated yet: 0 of {len(build(recipe))} stages are done." in page.text


def test_a_workflow_of_other_stages_has_a_report(tmp_path):
    recipe = toy_workflow.recipe()
    RunDirectory(tmp_path).claim(recipe.name, dump_recipe(recipe))
    assert "Nothing here: no stage makes it." in read(tmp_path, toy_workflow.build(recipe)).text


def test_artifacts_of_another_recipe_are_marked_as_older(tmp_path):
    root, _ = make_run(tmp_path / "run")
    changed = make_recipe(["math", "writing"]).model_copy(update={"seed": 8})
    (root / "recipe.yaml").write_text(dump_recipe(changed))
    page = read(root, build(changed))
    assert "Older than the recipe or the code: evaluate" in page.text and "seed: 7 -> 8" in page.text


def test_a_run_without_a_judge_or_evaluated_domain_has_a_report(tmp_path):
    root, stages = make_run(tmp_path / "run", domains=("math",))
    row = {"n": 0, "accuracy": None, "ci95": [0, 1], "pass_at_k": None}
    rewrite_evaluation(root, {label: {"math": row} for label in ("base", "sft", "rl")})
    page = read(root, stages)
    assert "no verdict" in page.text and "before it may be a reward" not in page.text


def rewrite_evaluation(root, models):
    for path in root.glob("stages/e*/*/evaluation.json"):
        path.write_text(json.dumps({"models": models}))


def test_long_curves_are_averaged_and_odd_values_do_not_break_a_chart():
    points = [(step, math.sin(step / 100)) for step in range(5000)]
    drawn = re.search(r'polyline class="line s0" points="([^"]*)"', line_chart("loss", [("loss", 0, points)]))[1]
    assert len(drawn.split()) == MOST_POINTS
    for values in ([0.0], [2.5, 2.5], [0.0, 1e-9], [-3.0, 4.0], [1e12, 1e12 + 1], [-1.0, -1.0]):
        for log in (False, True):
            chart = line_chart("x", [("x", 0, list(enumerate(values)))], log=log, bound=("stops the run", 1e-4))
            assert "nan" not in chart and "inf" not in chart.replace("infra", "")
    assert line_chart("loss", [("loss", 0, [])]) == ""


def test_the_report_loads_no_ray_torch_or_vllm():
    code = ("import sys, pipeline.report\n"
            "print(sorted({'ray', 'torch', 'vllm', 'transformers', 'trl'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "[]"
