"""Reading a contract's texts: the answer in a chat transcript, and the check in a label."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from rewards.scoring import Item, Result, ScoringError, first_error
from rewards.service.backend import Unavailable

_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<|return|>", "</s>", "<eos>", "<end_of_turn>",
         "<\uff5cend\u2581of\u2581sentence\uff5c>")
_ASSISTANT = re.compile(r"<\|im_start\|>assistant\n|<\uff5cAssistant\uff5c>|<\|assistant\|>\n?|"
                        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<start_of_turn>model\n|\[/INST\]")


def response_of(transcript: str, prompt: str | None = None) -> str:
    """The last turn of a transcript: what follows the prompt, or the last assistant marker, without end tokens."""
    if prompt and transcript.startswith(prompt):
        transcript = transcript[len(prompt):]
    else:
        *_, last = [0, *(match.end() for match in _ASSISTANT.finditer(transcript))]
        transcript = transcript[last:]
    return _without_ends(transcript)


def _without_ends(text: str) -> str:
    """The text without end tokens after it, and blanks around those; no copy for each, as there may be many."""
    kept = end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        token = next((token for token in _ENDS if text.endswith(token, 0, end)), None)
        if token is None:
            return text[:end if kept < len(text) else kept]
        kept = end = end - len(token)


def prompt_of(transcript: str) -> str:
    """What stands before the last assistant marker; empty where there is none."""
    *_, last = [0, *(match.start() for match in _ASSISTANT.finditer(transcript))]
    return transcript[:last]


def text_of(prompt: Any) -> str:
    """A prompt as text: chat messages joined, anything else as it is."""
    if isinstance(prompt, list):
        return "\n".join(str(message.get("content", "")) for message in prompt if isinstance(message, dict))
    return "" if prompt is None else str(prompt)


def read_json(text: str | bytes) -> Any:
    """JSON within a request's JSON. Raises ValueError for whatever the gate refuses in a body: NaN, half a surrogate
    pair, more than 200 levels.
    """
    return from_json(text, allow_inf_nan=False)


def item_of(id_: str, prompt: str, completion: str, label: Any, kind: str) -> Item:
    """An item from a label: a text or number is the reference of `kind`; an object, or its JSON text, holds the fields
    of an item. Raises ScoringError naming what is missing.
    """
    if isinstance(label, str) and re.match(r'\s*\{\s*["}]', label):  # not a set such as {1, 2}, which is a reference
        try:
            label = read_json(label)
        except ValueError as error:
            raise ScoringError(f"item {id_}: the label begins like a JSON object and is none: {error}") from None
    if label is None or label == "":
        raise ScoringError(f"item {id_}: the label is empty; it must be the reference, or an object with the fields of "
                           "an item of /v1/score (kind, reference, tests, ...)")
    try:
        text = label if isinstance(label, str) else json.dumps(label, allow_nan=False)
    except ValueError:  # 1e999 is read as infinity
        raise ScoringError(f"item {id_}: the label holds a number that is too large") from None
    fields = label if isinstance(label, dict) else {"reference": text}
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
