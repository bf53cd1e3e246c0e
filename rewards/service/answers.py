"""Reading a contract's texts: the answer in a chat transcript, and the check in a label."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from rewards.scoring import Item, Result, ScoringError, first_error
from rewards.service.backend import Unavailable

_ENDS = re.compile(r"(\s*(<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<\|end\|>|<\|return\|>|</s>|<eos>|<end_of_turn>|"
                   r"<\uff5cend\u2581of\u2581sentence\uff5c>))+\s*$")
_ASSISTANT = re.compile(r"<\|im_start\|>assistant\n|<\uff5cAssistant\uff5c>|<\|assistant\|>\n?|"
                        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n|\[/INST\]")


def response_of(transcript: str, prompt: str | None = None) -> str:
    """The last turn of a transcript: what follows the prompt, or the last assistant marker, without end tokens."""
    if prompt and transcript.startswith(prompt):
        transcript = transcript[len(prompt):]
    else:
        *_, last = [0, *(match.end() for match in _ASSISTANT.finditer(transcript))]
        transcript = transcript[last:]
    return _ENDS.sub("", transcript)


def prompt_of(transcript: str) -> str:
    """What stands before the last assistant marker; empty where there is none."""
    *_, last = [0, *(match.start() for match in _ASSISTANT.finditer(transcript))]
    return transcript[:last]


def text_of(prompt: Any) -> str:
    """A prompt as text: chat messages joined, anything else as it is."""
    if isinstance(prompt, list):
        return "\n".join(str(message.get("content", "")) for message in prompt if isinstance(message, dict))
    return "" if prompt is None else str(prompt)


def item_of(id_: str, prompt: str, completion: str, label: Any, kind: str) -> Item:
    """An item from a label: a text or number is the reference of `kind`; an object, or its JSON text, holds the fields
    of an item. Raises ScoringError naming what is missing.
    """
    if isinstance(label, str) and label.lstrip().startswith("{"):
        try:
            label = json.loads(label)
        except ValueError:
            pass  # a set such as {1, 2} is a reference
    if label is None or label == "":
        raise ScoringError(f"item {id_}: the label is empty; it must be the reference, or an object with the fields of "
                           "an item of /v1/score (kind, reference, tests, ...)")
    fields = label if isinstance(label, dict) else {"reference": label if isinstance(label, str) else json.dumps(label)}
    try:
        return Item.model_validate({"kind": kind, **fields, "id": id_, "prompt": prompt, "completion": completion})
    except ValidationError as error:
        raise ScoringError(f"item {id_}: {first_error(error)}") from None


def scores_of(results: list[Result]) -> list[float]:
    """The scores, for callers that know no null. Raises Unavailable naming the first item that has none."""
    for result in results:
        if result.score is None:
            raise Unavailable(f"item {result.id} has no score ({result.status}: {result.reason} {result.evidence}); "
                              "this says nothing about the answer, so no number is given")
    return [result.score for result in results if result.score is not None]
