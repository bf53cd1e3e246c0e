"""What a person gets for wrong input: a message that names place and remedy, an exit code, no traceback.

Other cases stand with the code they are about: another recipe's directory in tests/pipeline/test_cli.py, a full disk
in tests/pipeline/test_artifacts.py, two runs in one directory in test_killed_run.py.
"""

import dataclasses
import json

import pytest
import yaml
from posttrain_command import artifact, json_lines, posttrain
from tiny_models import Quiet, save_tiny

from distill.problems import GENERATORS
from distill.prompts import prompt_messages
from pipeline.recipe import Recipe
from pipeline.records import Sample, Status, Verdict, write_table
from pipeline.stage import StageContext, StageError
from workflows import expert, sft_set
from workflows.inference import check_infrastructure


@pytest.mark.parametrize(("override", "message"), [
    ("rl.group_sise=8", "rl.group_sise: unknown key; did you mean group_size?"),
    ("domains.math.sorce=x", "domains.math.sorce: unknown key; did you mean source?"),
    ("model.source.hiden_size=64", "model.source.hiden_size: unknown key; did you mean hidden_size?"),
    ("rl.group_size=many", "rl.group_size: Input should be a valid integer"),
    ("domains.code.source.generator=cod", "domains.code.source.generator: Input should be 'math', 'code'"),
    ("rl.mini_batches=3", "rl: mini_batches must divide prompts_per_step (got 3 and"),
    ("sft.pack_length=100", "sft: batch_tokens must be a multiple of pack_length x packs_per_device"),
    ("generate.max_tokens=9999", "generate.max_tokens 9999 is above model.max_length"),
    ("model.dtype=bfloat16", "model.dtype must be float32 for a tiny model (got bfloat16)"),
    ("domains.math.judged=match", "domains.math: judged must be left out with the math generator (got match)"),
    ("domains.math.feedback=self", "domains.math: feedback: self needs a judged domain"),
])
def test_a_wrong_recipe_is_refused_before_anything_is_written(override, message, tmp_path):
    done = posttrain("run", "smoke", "--run-dir", "run", override, folder=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.both
    assert not (tmp_path / "run").exists()


GSM8K = [{"question": f"Ann has {n} figs and buys 2 more. How many?", "answer": f"{n}+2={n + 2}\n#### {n + 2}"}
         for n in range(3, 9)]


def own_recipe(rows, model):
    """A recipe of a person's own: a model folder and a JSONL file."""
    short = {"max_completion_length": 64}
    return {"name": "own", "model": {"source": {"type": "pretrained", "id": "own", "path": str(model)},
                                     "dtype": "float32", "max_length": 128},
            "domains": {"figs": {"source": {"type": "jsonl", "format": "gsm8k", "path": str(rows)},
                                 "splits": {"sft": 3, "rl": 1, "heldout": 1}}},
            "expert": {"rl": short}, "rl": short, "generate": {"max_tokens": 64}, "evaluation": {"max_tokens": 64}}


def test_a_broken_row_is_named_and_left_out_and_a_missing_model_stops_the_run(tmp_path):
    rows, model = tmp_path / "rows.jsonl", tmp_path / "gone"
    lines = [json.dumps(row) for row in GSM8K]
    rows.write_text("\n".join([*lines[:2], '{"question": "How ma', *lines[2:]]) + "\n")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own_recipe(rows, model)))
    done = posttrain("run", "own.yaml", "--run-dir", "run", folder=tmp_path)
    assert done.code == 1
    assert "Traceback" not in done.both

    assert f"[problems] figs: 1 broken rows left out, the first at {rows}, line 3: not valid JSON" in done.out
    problems = artifact(tmp_path / "run", "problems")
    counts = json.loads((problems / "manifest.json").read_text())["counts"]
    assert counts == {"problems": 5, "bad_rows": 1, "splits": {"figs": {"sft": 3, "rl": 1, "heldout": 1}}}
    [bad] = json_lines(problems / "bad_rows.jsonl")
    assert (bad["path"], bad["line"]) == (str(rows), 3)

    assert f"stage base: model.source: cannot load {model}: {model}: no such folder" in done.err
    assert "a folder with config.json, *.safetensors and a tokenizer (model.source.path)" in done.err
    assert "go on with: posttrain run own.yaml --run-dir run" in done.err


def context(tmp_path, config, **inputs) -> StageContext:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return StageContext("stage", config, inputs, tmp_path / "out", tmp_path / "work", seed=0, progress=Quiet())


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model")
    for file in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        file.unlink()
    recipe = Recipe.model_validate(own_recipe("rows.jsonl", folder))
    with pytest.raises(StageError, match=f"model.source: cannot load {folder}: .*no tokenizer in this checkpoint folder"
                                         "; copy tokenizer.json"):
        expert.base(context(tmp_path, {"model": recipe.model, "base": recipe.base}))


def test_a_domain_that_rejection_empties_stops_the_stage_with_the_funnel(tmp_path):
    problems = [dataclasses.replace(problem, split="sft") for name in ("math", "logic")
                for problem in GENERATORS[name](2, 0)]
    right = Verdict(Status.CORRECT, 1.0, "equal", "math", "1")
    wrong = Verdict(Status.WRONG, 0.0, "different", "math", "1")
    samples = [Sample(f"{n:016x}", problem.id, problem.domain, "original", prompt_messages(problem, "original"),
                      problem.answer, "digest", "{}", "stop", 9, right if problem.domain == "math" else wrong)
               for n, problem in enumerate(problems)]
    write_table(tmp_path / "samples/samples/part-00000.parquet", samples, Sample)
    reject = Recipe.model_validate(own_recipe("rows.jsonl", "model")).reject
    with pytest.raises(StageError) as stopped:
        sft_set.reject(context(tmp_path, {"reject": reject, "judged": [], "principled": []},
                               verify=tmp_path / "samples"))
    assert str(stopped.value).splitlines() == [
        "rejection leaves nothing for logic:", "  logic: 2 in, 0 out; lost wrong 2", "  math: 2 in, 2 out",
        "train the expert longer, sample more or relax reject.max_tokens"]
    assert not list((tmp_path / "out").iterdir())


def test_verifiers_that_fail_too_often_stop_the_stage_and_do_not_pass_for_wrong_answers():
    right = Verdict(Status.CORRECT, 1.0, "equal_exact", "math", "1", 0.0, "")
    broken = Verdict(Status.INFRA_ERROR, None, "verifier_failed", "code", "1", 0.0, "no space left")
    check_infrastructure([right] * 5 + [broken] * 10, "verify")
    with pytest.raises(StageError, match="verify: 21 of 2000 verdicts are infrastructure errors.*no space left"):
        check_infrastructure([right] * 1979 + [broken] * 21, "verify")
