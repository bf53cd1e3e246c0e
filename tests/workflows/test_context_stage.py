"""The stage that extends the context, its place in the graph, and what recipes may say about it."""

import json
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from tiny_models import Killed, Quiet
from transformers import AutoConfig

from distill.needles import needle
from pipeline.graph import order
from pipeline.recipe import EngineConfig, ExtendConfig, ModelConfig, RecipeError, TinyModel, TrainConfig, YarnConfig
from pipeline.recipe_file import load_recipe
from pipeline.stage import StageContext, StageError
from policy.model import new_policy, read_checkpoint, save_policy
from policy.presets import tiny_config
from policy.tokenizer import load_tokenizer, train_tokenizer
from workflows.context import extend, needle_rows
from workflows.deepseek_v3 import build

ROOT = Path(__file__).parents[2]
SHORT = 64
EXTENDED = ["model.source.context_length=64", "base.pack_length=64",
            "extend={yarn: {factor: 4}, phases: [{max_steps: 2, pack_length: 256, batch_tokens: 2048}]}"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The artifact of a base stage with a context of 64 tokens."""
    rng = Random(0)
    rows = [needle(rng, 40, asked=3) for _ in range(200)]
    tokenizer = train_tokenizer([f"{messages[0]['content']}\n{answer}" for messages, answer in rows], 400, SHORT)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = tiny_config(hidden_size=32, layers=2, routed_experts=8, vocab_size=len(tokenizer), max_length=SHORT,
                         token_ids=ids)
    folder = tmp_path_factory.mktemp("base")
    save_policy(new_policy(config, 0), tokenizer, folder / "checkpoint")
    return folder


def phase(length, steps=2):
    return TrainConfig(max_steps=steps, pack_length=length, batch_tokens=4 * length, packs_per_device=4,
                       learning_rate=1e-3, min_learning_rate=1e-4, save_steps=1)


def stage_context(folder, base, progress=None, **changes):
    config = ExtendConfig(**{"yarn": YarnConfig(factor=4), "phases": (phase(128), phase(256)), "needle_share": 1.0,
                             "needles": 2, **changes})
    context = StageContext("extend", {"extend": config, "engine": EngineConfig(probe_checkpoints=False),
                                      "model": ModelConfig(source=TinyModel(context_length=SHORT), dtype="float32",
                                                           max_length=4 * SHORT)},
                           {"base": base}, folder / "out", folder / "work", 0, progress or Quiet())
    for made in (context.out, context.work):
        made.mkdir(parents=True, exist_ok=True)
    return context


def test_the_stage_trains_both_phases_and_measures_retrieval_before_and_after(tmp_path, base):
    context = stage_context(tmp_path, base)
    result = extend(context)
    config = AutoConfig.from_pretrained(context.out / "checkpoint")
    assert config.rope_parameters["rope_type"] == "yarn" and config.max_position_embeddings == 4 * SHORT
    assert load_tokenizer(context.out / "checkpoint").model_max_length == 4 * SHORT
    table = json.loads((context.out / "needles.json").read_text())
    assert table["original"] == SHORT and table["lengths"] == [64, 128, 256] and len(table["depths"]) == 5
    assert all([len(row) for row in table[name]] == [5, 5, 5] for name in ("before", "after"))
    assert {"before/within", "before/beyond", "after/within", "after/beyond", "loss"} <= set(result.metrics)
    digests = {read_checkpoint(folder / "checkpoint").digest
               for folder in (base, context.work / "phase-1/out", context.out)}
    assert len(digests) == 3


def test_three_quarters_of_the_rows_to_train_on_are_as_long_as_the_phase_and_the_rest_as_the_original(tmp_path, base):
    extend(stage_context(tmp_path, base))
    for number, length in ((1, 128), (2, 256)):
        packs = pq.read_table(tmp_path / f"work/phase-{number}/packs.parquet").to_pylist()
        assert len(packs) == 8
        long = [pack for pack in packs if max(pack["position_ids"]) + 1 > SHORT]
        assert len(long) == 6
        for pack in long:
            assert len(pack["sample_ids"]) == 1
            assert 0.9 * length < max(pack["position_ids"]) + 1 <= length
        assert all(len(pack["sample_ids"]) == length // SHORT for pack in packs if pack not in long)


def test_a_stage_killed_in_its_second_phase_goes_on_there_and_ends_with_the_same_weights(tmp_path, base):
    unbroken = stage_context(tmp_path / "unbroken", base)
    extend(unbroken)
    with pytest.raises(Killed):
        extend(stage_context(tmp_path / "killed", base, _KilledInPhaseTwo()))
    first = tmp_path / "killed/work/phase-1/out/checkpoint/tensors.json"
    before = first.stat().st_mtime_ns
    resumed = stage_context(tmp_path / "killed", base)
    extend(resumed)
    assert first.stat().st_mtime_ns == before, "the first phase is not trained again"
    assert read_checkpoint(resumed.out / "checkpoint").digest == read_checkpoint(unbroken.out / "checkpoint").digest


class _KilledInPhaseTwo(Quiet):
    """Dies after the first step of the second training."""

    trainings = 0

    def start(self, total, unit, done=0):
        self.trainings += unit == "steps"
        super().start(total, unit, done)

    def advance(self, count=1, **metrics):
        super().advance(count, **metrics)
        if self.trainings == 2 and metrics:
            raise Killed("in phase two")


def test_documents_of_a_file_are_joined_to_the_length_of_the_phase(tmp_path, base):
    texts = [f"red blue warm cold {index}" for index in range(200)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    context = stage_context(tmp_path, base, phases=(phase(128),), needle_share=0.5,
                            documents=str(tmp_path / "long.jsonl"))
    result = extend(context)
    packs = pq.read_table(context.work / "phase-1/packs.parquet").to_pylist()
    names = [name for pack in packs for name in pack["sample_ids"]]
    assert sum(name.startswith("needle-128") for name in names) == 3
    assert sum(name.startswith("needle-64") for name in names) == 2 and result.counts["too_long"] == 0
    documents = [pack for pack in packs if pack["sample_ids"][0].startswith("document")]
    assert documents and all(max(pack["position_ids"]) > 100 for pack in documents[:3])


def test_a_line_that_is_no_document_is_named(tmp_path, base):
    (tmp_path / "long.jsonl").write_text('{"text": "red"}\n{"words": 1}\n')
    with pytest.raises(StageError, match="extend.documents: .*long.jsonl, line 2: not a JSON object with text"):
        extend(stage_context(tmp_path, base, needle_share=0.5, documents=str(tmp_path / "long.jsonl")))


def test_with_the_section_every_user_of_the_base_takes_the_extended_one():
    plain, extended = (build(load_recipe(ROOT / "recipes/smoke.yaml", changes)) for changes in ([], EXTENDED))
    inputs = {stage.name: stage.inputs for stage in order(extended)}
    assert inputs["extend"] == ("problems", "base")
    assert [name for name, needed in inputs.items() if "base" in needed] == ["extend"]
    assert {name for name, needed in inputs.items() if "extend" in needed} == {
        stage.name for stage in plain if "base" in stage.inputs}
    assert "extend" not in {stage.name for stage in plain}


def test_an_empty_section_is_the_schedule_of_the_paper():
    recipe = load_recipe(ROOT / "recipes/deepseek-v3.yaml", ["extend={}"])
    assert [(p.max_steps, p.pack_length, p.batch_tokens // p.pack_length, p.learning_rate, p.min_learning_rate)
            for p in recipe.extend.phases] == [(1000, 32768, 1920, 7.3e-6, 7.3e-6), (1000, 131072, 480, 7.3e-6, 7.3e-6)]
    assert "extend" in {stage.name for stage in build(recipe)}


@pytest.mark.parametrize("changes, message", [
    (EXTENDED[:2], r"context_length and extend belong together.*got 64 and no section"),
    (EXTENDED[1:], r"context_length and extend belong together.*got None and a section"),
    ([*EXTENDED, "model.max_length=512"], r"extend\.yarn\.factor 4 makes 256 tokens .* model\.max_length 512"),
    ([*EXTENDED, "base.pack_length=128"], r"base\.pack_length 128 is above the context of that model, 64"),
    ([*EXTENDED, "extend.phases=[{max_steps: 2, pack_length: 512, batch_tokens: 2048}]"],
     r"extend\.phases\.0\.pack_length 512 is above the context of that model, 256"),
    ([*EXTENDED, "extend.phases=[{pack_length: 256, batch_tokens: 2048}]"], r"phases\.0\.max_steps: give a number"),
])
def test_sections_that_cannot_work_together_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(ROOT / "recipes/smoke.yaml", changes)


def test_needles_for_the_base_fit_its_context(base):
    tokenizer = load_tokenizer(base / "checkpoint")
    assert len(needle_rows(tokenizer, Random(0), SHORT, 5)) == 5 and needle_rows(tokenizer, Random(0), SHORT, 0) == []


def test_facts_beyond_the_context_are_missed_before_the_stage_and_found_after(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import context_extension

    context_extension.main(["--small", "--seed", "2", "--json", str(tmp_path / "figures.json")])
    found = {row["what"]: row["figure"] for row in json.loads((tmp_path / "figures.json").read_text())}
    assert found["before: facts found at 64 tokens"] > 90
    assert found["before: facts found at 256 tokens"] < 50
    assert found["plain, trained: facts found at 256 tokens"] < 70, "training alone would do"
    assert found["after: facts found at 256 tokens"] > 80
    assert found["after: facts found at 128 tokens"] > 80
    assert found["after: facts found at 64 tokens"] > 70
