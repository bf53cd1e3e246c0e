"""Look into a committed artifact: one row of its table as a person reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.artifacts import RunDirectory, RunError
from pipeline.graph import did_you_mean
from pipeline.tables import Table
from pipeline.visible import visible

MASKED = -100  # the label of a token without loss


def committed_manifest(directory: RunDirectory, stage: str) -> dict[str, Any]:
    """The manifest of the stage's newest artifact; raises RunError with a suggestion when it has none."""
    manifest = directory.newest_manifest(stage)
    if manifest is None:
        known = sorted(path.name for path in (directory.root / "stages").glob("*"))
        raise RunError(f"{directory.root}: stage {stage} has committed nothing{did_you_mean(stage, known)}")
    return manifest


def show(directory: RunDirectory, stage: str, row: int, console: Console) -> None:
    """Print row `row` (from 0) of the stage's main table, or list its files when it has no table."""
    manifest = committed_manifest(directory, stage)
    folder = directory.stage_folder(stage, manifest["fingerprint"])
    for name, printer in (("packs", _pack), ("rollouts.parquet", _rollout), ("samples", _sample),
                          ("samples.parquet", _sample), ("dataset", _sample), ("problems.parquet", _fields),
                          ("pairs.jsonl", _fields)):
        if (folder / name).exists():
            record, rows = _read_row(folder / name, row)
            console.rule(f"{stage} {name}: row {row} of {rows}", align="left")
            if printer is _pack:
                _pack(record, console, _tokenizer_folder(directory, manifest))
            else:
                printer(record, console)
            return
    for file in manifest["files"]:
        console.print(f"{file['bytes']:>14,}  {folder / file['path']}", highlight=False, soft_wrap=True)


def _read_row(path: Path, row: int) -> tuple[dict[str, Any], int]:
    """Row `row` of a file, or of all parts of a folder, and how many there are."""
    if path.suffix != ".jsonl":
        table = Table(path)
        return table.row(row), len(table)
    lines = path.read_text().splitlines()
    if not 0 <= row < len(lines):
        raise RunError(f"{path}: there is no row {row}; it has {len(lines)}, counted from 0")
    return json.loads(lines[row]), len(lines)


def _field(console: Console, name: str, value: Any) -> None:
    console.print(Text(visible(name), style="bold cyan"))
    console.print(Text(visible(value)), soft_wrap=True)


def _fields(record: dict[str, Any], console: Console) -> None:
    for name, value in record.items():
        _field(console, name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _verdict(record: dict[str, Any]) -> str:
    verdict = record.get("verdict")
    if verdict is None:
        return "not verified yet"
    line = (f"{verdict['status']} ({verdict['reason']}), score {verdict['score']}, "
            f"by {verdict['verifier']} {verdict['version']}")
    return line + (f"\n{verdict['evidence']}" if verdict["evidence"] else "")


def _sample(record: dict[str, Any], console: Console) -> None:
    _field(console, "id", f"{record['id']}  {record['domain']}, {record['form']} form, {record['tokens']} tokens")
    for message in record["messages"]:
        _field(console, message["role"], message["content"])
    _field(console, "completion", record["completion"])
    _field(console, "verdict", _verdict(record))


def _rollout(record: dict[str, Any], console: Console) -> None:
    _field(console, "id", f"{record['id']}  {record['domain']}, step {record['step']}, problem {record['problem_id']}, "
                          f"policy version {record['policy_version']}")
    _field(console, "text", record["text"])
    parts = [f"{name} {value:.4g}" for name, value in record["parts"].items() if value is not None]
    _field(console, "reward", f"{record['reward']}  ({', '.join(parts)}, each times its weight)")
    _field(console, "advantage", record["advantage"])
    _field(console, "verdict", _verdict(record))


def _pack(record: dict[str, Any], console: Console, tokenizer_folder: Path) -> None:
    """The decoded pack: tokens that carry loss stand out, or stand in [[ ]] where there is no colour."""
    decode = _decoder(tokenizer_folder)
    ids, labels = record["input_ids"], record["labels"]
    starts = [index for index, position in enumerate(record["position_ids"]) if position == 0] or [0]
    learned = sum(label != MASKED for label in labels)
    console.print(f"{len(ids)} tokens, {learned} carry loss; {len(starts)} isolated sequences", highlight=False)
    names = record["sample_ids"]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)], strict=True)):
        if number >= len(names):  # what is packed after the last sample
            console.print(Text(f"--- padding, {end - start} tokens", style="dim"))
            continue
        console.print(Text(f"--- {names[number]}", style="bold cyan"))
        line = Text()
        for begin, stop, carries in _segments([label != MASKED for label in labels], start, end):
            text = visible(decode(ids[begin:stop]))
            if carries and not console.is_terminal:
                text = f"[[{text}]]"
            line.append(text, style="black on green" if carries else "")
        console.print(line, soft_wrap=True)


def _segments(flags: list[bool], start: int, end: int) -> list[tuple[int, int, bool]]:
    """Maximal runs of equal flags in [start, end). Runs are decoded whole: a token may be half a character."""
    segments: list[tuple[int, int, bool]] = []
    for index in range(start, end):
        if segments and segments[-1][2] == flags[index]:
            segments[-1] = (segments[-1][0], index + 1, flags[index])
        else:
            segments.append((index, index + 1, flags[index]))
    return segments


def _tokenizer_folder(directory: RunDirectory, manifest: dict[str, Any]) -> Path:
    """The nearest checkpoint with a tokenizer among what the artifact was made from."""
    pending = list(manifest["inputs"].items())
    while pending:
        name, fingerprint = pending.pop(0)
        checkpoint = directory.stage_folder(name, fingerprint) / "checkpoint"
        if (checkpoint / "tokenizer_config.json").is_file() or (checkpoint / "tokenizer.json").is_file():
            return checkpoint
        parent = directory.manifest(name, fingerprint)
        pending += parent["inputs"].items() if parent else ()
    raise RunError(f"no checkpoint with a tokenizer is left among the inputs of {manifest['stage']}; "
                   "its artifacts were deleted, so the tokens cannot be decoded")


def _decoder(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer  # a hundredth of the start-up time of transformers

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
