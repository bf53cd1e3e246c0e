"""The reward service and the judge it uses: a checkpoint in an engine, opened where it is needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.recipe import EngineConfig, ModelConfig, PretrainedModel, Recipe
from pipeline.stage import StageError
from workflows.inference import JUDGEMENT_TOKENS, open_model

if TYPE_CHECKING:
    from rewards.judge import Judge

BFLOAT16_BOUND = 0.1  # on the proof that the engine runs the checkpoint's weights
MAX_LENGTH = 8192  # tokens of a judge prompt and its judgement, where the checkpoint allows as many


@dataclass(frozen=True)
class JudgeSettings:
    """A judge's checkpoint and how it is run; a factory, called in the process that uses the judge."""

    folder: str
    engine: EngineConfig = EngineConfig()
    votes: int = 1
    max_tokens: int = JUDGEMENT_TOKENS

    def __call__(self) -> Judge:
        config = json.loads((Path(self.folder) / "config.json").read_text())
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        model = ModelConfig(source=PretrainedModel(id=self.folder),
                            dtype="float32" if dtype == "float32" else "bfloat16",
                            max_length=min(config.get("max_position_embeddings") or MAX_LENGTH, MAX_LENGTH))
        engine = self.engine
        if model.dtype == "bfloat16" and engine.max_logprob_error < BFLOAT16_BOUND:
            engine = engine.model_copy(update={"max_logprob_error": BFLOAT16_BOUND})
        return open_model(Path(self.folder), model, engine, seed=0, role="judge").judge(
            seed=0, votes=self.votes, max_tokens=self.max_tokens)


def judge_settings(folder: Path, recipe: Recipe | None = None, votes: int | None = None) -> JudgeSettings:
    """Settings of the judge in `folder`, the engine's and votes from a recipe. Raises StageError for no checkpoint."""
    folder = folder.absolute()
    if (folder / "checkpoint" / "config.json").exists():
        folder /= "checkpoint"  # the folder of a stage
    if not (folder / "config.json").exists():
        raise StageError(f"--judge {folder}: holds no config.json; give a checkpoint folder, such as "
                         "RUN_DIR/stages/reward-model/*/checkpoint")
    settings = JudgeSettings(str(folder), votes=votes or 1)
    if recipe:
        settings = JudgeSettings(str(folder), recipe.engine, votes or recipe.reward_model.votes,
                                 recipe.reward_model.max_tokens)
    return settings
