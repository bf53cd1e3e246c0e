"""The texts of evaluation files, which no training sample may resemble."""

import json

import pytest

from distill.sources import evaluation_texts
from pipeline.stage import StageError


def test_texts_inside_messages_and_options_are_found(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}], "options": ["two", "six"],
                                "points": 3}) + "\n" + json.dumps({"question": "Why?"}) + "\n")
    assert evaluation_texts([str(file)]) == [("exam.jsonl:1", text) for text in ("user", "How many?", "two", "six")] + [
        ("exam.jsonl:2", "Why?")]


def test_a_missing_file_and_a_broken_row_are_named(tmp_path):
    with pytest.raises(StageError, match="none.jsonl does not exist"):
        evaluation_texts([str(tmp_path / "none.jsonl")])
    (tmp_path / "broken.jsonl").write_text('{"question": "Why?"}\n{"question"\n')
    with pytest.raises(StageError, match="broken.jsonl, line 2"):
        evaluation_texts([str(tmp_path / "broken.jsonl")])
