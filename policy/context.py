"""A longer context by YaRN (arXiv 2309.00071; DeepSeek-V3 section 4.3): other rotary frequencies, then training.

YaRN divides the frequencies that turn less than `beta_slow` times within the original context by the factor, keeps
those that turn more than `beta_fast` times, and ramps between. In MLA it touches the decoupled rotary part alone.
Longer contexts flatten attention, so the softmax scale of the whole head grows by (0.1 mscale ln(factor) + 1) squared:
transformers and vLLM both take it from `mscale_all_dim`; with `mscale` equal to it, cosine and sine stay as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from pipeline.parts import link
from pipeline.recipe import YarnConfig
from pipeline.stage import StageError


def yarn_parameters(config: PreTrainedConfig, yarn: YarnConfig) -> dict[str, float | int | str]:
    """The `rope_parameters` of `config`, extended. Raises StageError where they are extended already."""
    present = config.rope_parameters
    if present["rope_type"] != "default":
        raise StageError(f"extend: the base model's context is extended already ({present['rope_type']}, factor "
                         f"{present.get('factor')}); leave the section out")
    return {"rope_type": "yarn", "rope_theta": present["rope_theta"], "factor": float(yarn.factor),
            "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale, "original_max_position_embeddings": config.max_position_embeddings}


def extend_context(checkpoint: Path, yarn: YarnConfig, out: Path) -> int:
    """Make `out` the checkpoint folder `checkpoint` with its context extended; returns the new length in tokens.

    The weights are the same files, by hard link where the disk allows. Raises StageError as `yarn_parameters` does.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    parameters = yarn_parameters(config, yarn)
    length = yarn.factor * config.max_position_embeddings
    out.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        target = out / file.name
        target.unlink(missing_ok=True)
        if file.name == "config.json":
            values = json.loads(file.read_text()) | {"rope_parameters": parameters, "max_position_embeddings": length}
            target.write_text(json.dumps(values, indent=2, sort_keys=True))
        elif file.name == "tokenizer_config.json":
            target.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}, indent=2))
        else:
            link(file, target)
    return length
