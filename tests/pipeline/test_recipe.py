from pathlib import Path

import pytest
import toy_workflow
import yaml

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
