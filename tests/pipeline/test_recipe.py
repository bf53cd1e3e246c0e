from pathlib import Path

import pytest
import toy_workflow
import yaml

from pipeline.fingerprint import fingerprint, stage_parts
from pipeline.graph import order
from pipeline.recipe import RecipeError
from pipeline.recipe_file import dump_recipe, load_recipe
from workflows.deepseek_v3 import build

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        data = yaml.safe_load(dump_recipe(toy_workflow.recipe()))
        data.update(changes)
        (tmp_path / "toy.yaml").write_text(yaml.safe_dump(data))
        return tmp_path / "toy.yaml"

    return write


def test_a_dumped_recipe_loads_to_the_same_recipe(write):
    assert load_recipe(write()) == toy_workflow.recipe()


def test_an_override_is_a_yaml_value_at_a_dotted_path(write):
    recipe = load_recipe(write(), ["rl.group_size=8", "model.source.hidden_size=64", "seed=7"])
    assert (recipe.rl.group_size, recipe.model.source.hidden_size, recipe.seed) == (8, 64, 7)


def test_a_local_path_is_absolute_wherever_the_recipe_is_read(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    for given, kept in (("~/models/x", "/home/someone/models/x"), ("models/x", f"{tmp_path}/models/x")):
        recipe = load_recipe(write(), [f"model.source={{type: pretrained, id: x/y, path: {given}}}"])
        assert recipe.model.source.path == kept


def test_an_override_changes_one_of_the_sections_that_an_anchor_wrote():
    recipe = load_recipe(RECIPES / "deepseek-v3.yaml", ["domains.writing.teacher.model=other"])
    assert [recipe.domains[name].teacher.model == "other" for name in ("writing", "role-play")] == [True, False]


def test_a_domain_generates_as_the_recipe_says_but_for_what_it_says_itself(write):
    recipe = load_recipe(write(), ["generate.samples=3", "generate.most_samples=9", "generate.wanted=2",
                                   "domains.math.generate={temperature: 0.4, most_samples: 6}"])
    found = recipe.generation("math")
    assert (found.samples, found.cap, found.wanted, found.temperature) == (3, 6, 2, 0.4)
    assert load_recipe(write(), ["generate.samples=3"]).generation("math").cap == 3


def test_a_judged_domain_has_one_round():
    recipe = load_recipe(RECIPES / "smoke.yaml", ["domains.code.generate={}",
                                                  "generate={samples: 2, most_samples: 8, wanted: 4, max_tokens: 9}"])
    assert [recipe.generation(name).cap for name in ("math", "writing")] == [8, 2]


def test_what_only_changes_the_speed_or_price_of_generation_makes_no_stage_stale():
    def fingerprints(*overrides):
        found = {}
        for stage in order(build(load_recipe(RECIPES / "deepseek-v3.yaml", overrides))):
            found[stage.name] = fingerprint(stage_parts(stage, 0, found))
        return found

    before = fingerprints()
    assert before == fingerprints(
        "engine.replicas=9", "generate.expected={right_share: 0.1}", "domains.qa.teacher.url=https://elsewhere/v1",
        "domains.qa.teacher.input_price=2", "domains.math.generate={expected: {prompt_tokens: 9}}")
    changed = fingerprints("domains.math.generate={temperature: 0.6}")
    assert before["generate-math"] != changed["generate-math"]
    assert {name for name in before if name.startswith(("problems", "expert", "generate")) and
            before[name] != changed[name]} == {"generate-math"}
    assert fingerprints("domains.qa.teacher.model=r1")["generate-qa"] != before["generate-qa"]


def test_a_domain_with_a_teacher_has_no_expert():
    names = [stage.name for stage in build(load_recipe(RECIPES / "deepseek-v3.yaml"))]
    assert "expert-math-rl" in names and "generate-qa" in names and "expert-qa-rl" not in names


def test_an_unknown_key_is_named_with_a_suggestion(write):
    with pytest.raises(RecipeError, match=r"rl\.group_sise: unknown key; did you mean group_size\?"):
        load_recipe(write(), ["rl.group_sise=8"])


def test_a_wrong_type_is_named_with_its_path_and_value(write):
    with pytest.raises(RecipeError, match=r"rl\.group_size: .*integer.*\(got 'many'\)"):
        load_recipe(write(), ["rl.group_size=many"])


def test_a_union_is_named_by_the_path_of_the_yaml(write):
    with pytest.raises(RecipeError, match=r"model\.source\.hidden_size: .*\(got 'wide'\)"):
        load_recipe(write(), ["model.source.hidden_size=wide"])


@pytest.mark.parametrize("path, share", [("curate.quotas", 1), ("curate.plain_thinking", 0.5)])
def test_a_share_of_an_unknown_domain_is_named(write, path, share):
    with pytest.raises(RecipeError, match=rf"{path} names \['chess'\], not among the domains"):
        load_recipe(write(), [f"{path}={{chess: {share}}}"])


@pytest.mark.parametrize("changes, message", [
    (["model.source.routed_experts=18"], r"model\.source\.routed_experts: must be a multiple of the 4 expert groups"),
    (["domains.math.splits.rl=0"], r"domains\.math\.splits\.rl: needs rows"),
    (["domains.writing.splits.preference=0"], r"domains\.writing\.splits\.preference: needs rows"),
    (["preference.max_tokens=9999"], r"preference\.max_tokens 9999 is above model\.max_length"),
    (["sft.parallel={processes: 4, expert: 3}"], r"sft\.parallel: expert must divide processes \(got 3 and 4\)"),
    (["sft={batch_tokens: 8192, pack_length: 256, parallel: {processes: 2, expert: 2}, mtp_trunk_gradient: false}"],
     r"sft: parallel\.expert 2 needs mtp_trunk_gradient true"),
    (["sft.parallel.processes=3"], r"sft: batch_tokens must be a multiple of .* \(got 2048 and 256 x 8 x 3\)"),
    (["base={batch_tokens: 2048, pack_length: 256, muon_learning_rate: 0.04, parallel: {processes: 2}}"],
     r"base: parallel\.processes 2 needs AdamW.* leave muon_learning_rate out \(got 0\.04\)"),
    (["sft={batch_tokens: 8192, pack_length: 256, parallel: {processes: 32, expert: 2}}"],
     r"sft\.parallel spreads experts over 32 processes, which must divide model\.source\.routed_experts 16"),
    (["sft={batch_tokens: 8192, pack_length: 256, parallel: {processes: 2}, ema_decay: 0.9}"],
     r"sft: parallel\.processes 2 with ema_decay 0\.9"),
    (["sft={batch_tokens: 8192, pack_length: 256, parallel: {processes: 2}}", "model.precision=fp8", "rl.max_drift=1",
      "expert.rl.max_drift=1"], r"sft\.parallel\.processes 2 with model\.precision fp8"),
    (["sft={batch_tokens: 8192, pack_length: 256, parallel: {processes: 32, expert: 32, shard: false}}"],
     r"sft\.parallel spreads experts over 32 processes"),
    (["generate.most_samples=1"], r"generate: most_samples 1 is below samples 2"),
    (["domains.math.generate.samples=9"], r"domains\.math\.generate with generate: most_samples 4 is below samples 9"),
    (["domains.math.generate={most_samples: 4, wanted: 5}"], r"domains\.math\.generate .*: wanted 5 is above the 4"),
    (["domains.math.generate.max_tokens=999"], r"domains\.math\.generate\.max_tokens 999 is above model\.max_length"),
    (["domains.math.generate.sampels=4"], r"domains\.math\.generate\.sampels: unknown key; did you mean samples\?"),
    (["domains.math.generate.expected={right: 1}"], r"domains\.math\.generate\.expected\.right: unknown key"),
    (["domains.writing.generate.most_samples=8"], r"domains\.writing: generate\.most_samples is for .* rules"),
    (["generate={forms: [original, original]}"], r"generate: forms names one twice"),
    (["domains.math.teacher={url: 'api.x', model: y}"], r"domains\.math\.teacher\.url: String should match"),
    (["domains.math.teacher={url: 'http://x', model: y, most_cost: 3}"], r"teacher: most_cost needs input_price or"),
    (["engine.tensor_parallel=8"], r"tensor_parallel 8 needs as many gpus \(got 0\)"),
    (["rl.bias_gamma=0.001"], r"rl: bias_gamma 0\.001 with routing_replay: .* set bias_gamma: 0 or"),
    (["engine.return_routes=true"], r"return_routes needs gpus \(got 0\)"),
    (["engine.return_routes=true", "engine.gpus=1", "rl.routing_replay=false", "expert.rl.routing_replay=false"],
     r"engine\.return_routes is for rl\.routing_replay or expert\.rl\.routing_replay"),
    (["model.source.mtp_depth=0", "engine.draft=true"], r"engine\.draft True needs an MTP module; .*mtp_depth is 0"),
    (["model.source.mtp_depth=0", "rl.mtp_lambda=0.1"], r"rl\.mtp_lambda 0\.1 needs an MTP module"),
    (["sft.mtp_lambda=0", "sft.mtp_trunk_gradient=false"], r"sft: .*mtp_trunk_gradient false needs an mtp_lambda"),
    (["rl.mtp_trunk_gradient=true"], r"rl: .*mtp_trunk_gradient true needs an mtp_lambda"),
    (["engine.draft=true", "engine.return_routes=true", "engine.gpus=1"], r"draft true with return_routes true"),
    (["model.precision=fp8", "sft.adam_beta2=0.999"], r"sft\.adam_beta2 0\.999 .*at most 0\.9922"),
    (["model.precision=fp8", "expert.sft.adam_beta2=0.999"], r"expert\.sft\.adam_beta2 0\.999 "),
    (["model.precision=fp8", "rl.max_drift=0.01"], r"rl\.max_drift 0\.01 is below what fp8 products drift"),
    (["model={source: {type: pretrained, id: x/y}, dtype: bfloat16}"], r"engine\.max_logprob_error 0\.0001 .*bfloat16"),
])
def test_sections_that_cannot_work_together_are_an_error_before_anything_starts(changes, message):
    with pytest.raises(RecipeError, match=message):
        build(load_recipe(RECIPES / "smoke.yaml", changes))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_posttrain_have_a_graph(path):
    stages = build(load_recipe(path))
    assert [stage.name for stage in order(stages)][-1] == "export"


def test_every_error_is_listed_at_once(write):
    with pytest.raises(RecipeError, match="has 2 errors"):
        load_recipe(write(), ["rl.group_size=1", "sft.epochs=-1"])


def test_an_override_without_a_value_says_how_to_write_it(write):
    with pytest.raises(RecipeError, match="section.key=value"):
        load_recipe(write(), ["rl.group_size"])
