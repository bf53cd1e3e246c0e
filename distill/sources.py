"""Problems of a domain from its source: a generator, JSONL files, or anything `datasets` loads.

Three row forms are read: GSM8K (arXiv 2110.14168), HumanEval (arXiv 2107.03374) and the dictionary form of
`Problem`. A broken row is named by file and line, kept out and counted; the rest is kept.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from distill.problems import GENERATORS
from distill.prompts import prompt_key
from pipeline.recipe import DatasetSource, DomainConfig, GeneratedSource, JsonlSource
from pipeline.records import Check, Problem
from pipeline.stage import StageError

BadRow = dict[str, Any]  # path, line (from 1), error, text (its first 200 characters)
CHECK_KINDS = ("math", "exact", "code", "principles", "match")


class RowError(ValueError):
    """What is wrong with one row."""


def load_domain(name: str, config: DomainConfig, seed: int) -> tuple[list[Problem], list[BadRow]]:
    """The problems of domain `name`, with the recipe's constitution, and the rows that could not be read.

    A generated source yields as many problems as the splits ask for. Rows of a held-out file or split come
    back with split "heldout", all others with split "". Raises StageError when a file is missing, a data set
    cannot be loaded, or no row of a file can be used.
    """
    source = config.source
    if isinstance(source, GeneratedSource):
        generate = GENERATORS[source.generator]
        try:
            made = list(generate(sum(config.splits.values()), seed, source.skills))
        except ValueError as error:
            raise StageError(f"domains.{name}.source.skills: {error}") from None
        return [_under(dataclasses.replace(problem, domain=name), config.principles) for problem in made], []
    problems, bad = _read(name, source.format, _rows(name, source, heldout=False), split="")
    if source.heldout_path or (isinstance(source, DatasetSource) and source.heldout_split):
        held, held_bad = _read(name, source.format, _rows(name, source, heldout=True), split="heldout")
        problems, bad = problems + held, bad + held_bad
    for problem in problems:
        kind = problem.check.kind if problem.check.judged else None
        if kind != config.judged:
            raise StageError(f"domains.{name}.judged: the recipe says {config.judged or 'nothing'}, and the source has "
                             f"a problem checked by {problem.check.kind} ({problem.messages[-1]['content'][:60]!r}); "
                             f"give judged: {kind or 'null'}, or domains of their own to different kinds of check")
    return [_under(problem, config.principles) for problem in problems], bad


def _under(problem: Problem, constitution: list[str]) -> Problem:
    """The problem judged by the recipe's principles too."""
    if not constitution:
        return problem
    check = dataclasses.replace(problem.check, principles=(*problem.check.principles, *constitution))
    return dataclasses.replace(problem, id=Problem.make_id(problem.messages, check), check=check)


Row = tuple[str, int, Any]  # path or data set, line, a dictionary or undecoded text


def _rows(name: str, source: JsonlSource | DatasetSource, heldout: bool) -> Iterator[Row]:
    key = "heldout_path" if heldout else "path"
    path = getattr(source, key)
    if path is None and heldout and source.path is not None:  # the local copy replaces the whole data set
        path = source.path
        if Path(path).is_file():
            raise StageError(f"domains.{name}.source: path is one file, which has no split {source.heldout_split!r}; "
                             "give heldout_path as well")
    if path is None:
        return _hub_rows(name, source, source.heldout_split if heldout else source.split)
    local = Path(path)
    if not local.exists():
        raise StageError(f"domains.{name}.source.{key}: {path} does not exist; give a JSONL file"
                         f"{' or a folder that datasets can load' if isinstance(source, DatasetSource) else ''}")
    if local.is_file():
        return _jsonl_rows(local)
    if isinstance(source, JsonlSource):
        raise StageError(f"domains.{name}.source.{key}: {path} is a folder; a jsonl source reads one file "
                         "(for a folder use type: dataset)")
    return _folder_rows(name, local, (source.heldout_split or source.split) if heldout else source.split)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:  # bytes: one badly encoded line must not end the reading
        for line, raw in enumerate(file, 1):
            text = raw.decode("utf-8", errors="surrogateescape").strip()
            if text:
                yield str(path), line, text


def _hub_rows(name: str, source: DatasetSource, split: str) -> Iterator[Row]:
    import datasets  # here: it takes seconds and most recipes do without

    try:
        table = datasets.load_dataset(source.id, source.config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise StageError(f"domains.{name}.source.id: datasets cannot load {source.id!r}, split {split!r}: {error}; "
                         "give the rows as a local file or folder in path") from error
    yield from ((f"{source.id}:{split}", line, row) for line, row in enumerate(table, 1))


def _folder_rows(name: str, folder: Path, split: str) -> Iterator[Row]:
    import datasets

    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        table = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder), split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise StageError(f"domains.{name}.source.path: datasets cannot load the folder {folder}, split {split!r}: "
                         f"{error}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise StageError(f"domains.{name}.source: {folder} has no split {split!r}, only {', '.join(table)}")
        table = table[split]
    yield from ((str(folder), line, row) for line, row in enumerate(table, 1))


def _read(name: str, form: str, rows: Iterator[Row], split: str) -> tuple[list[Problem], list[BadRow]]:
    problems: list[Problem] = []
    bad: list[BadRow] = []
    first_line: dict[str, int] = {}
    where = ""
    for where, line, row in rows:
        try:
            problem = FORMS[form](name, _decoded(row), f"{form}:{Path(where).name}")
            key = prompt_key(problem.messages)
            if key in first_line:
                raise RowError(f"same prompt as line {first_line[key]}")
        except RowError as error:
            text = row if isinstance(row, str) else json.dumps(row, default=str)
            shown = text.encode("utf-8", errors="replace").decode()[:200]
            bad.append({"path": where, "line": line, "error": str(error), "text": shown})
            continue
        first_line[key] = line
        problems.append(dataclasses.replace(problem, split=split))
    if not problems:
        reasons = "; ".join(f"line {row['line']}: {row['error']}" for row in islice(bad, 3))
        raise StageError(f"domains.{name}: no row of {where or 'the source'} can be used as {form}"
                         + (f" ({len(bad)} broken rows: {reasons})" if bad else " (it is empty)"))
    return problems, bad


def evaluation_texts(files: Iterable[str]) -> list[tuple[str, str]]:
    """(file:line, text) of every text in the rows of JSONL files, at any depth; StageError names file and line."""
    found = []
    for name in files:
        if not Path(name).is_file():
            raise StageError(f"curate.evaluation_files: {name} does not exist; give a file with one JSON object a line")
        for path, line, text in _jsonl_rows(Path(name)):
            try:
                row = _decoded(text)
            except RowError as error:
                raise StageError(f"curate.evaluation_files: {path}, line {line}: {error}; mend or delete it") from None
            found += [(f"{Path(path).name}:{line}", value) for value in _texts(row)]
    return found


def _texts(value: Any) -> Iterator[str]:
    """The strings of a JSON value, also those inside lists (messages, options) and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _decoded(row: Any) -> dict[str, Any]:
    if isinstance(row, str):
        try:
            row.encode("utf-8")
            row = json.loads(row)
        except UnicodeEncodeError:
            raise RowError("not valid UTF-8") from None
        except json.JSONDecodeError as error:
            raise RowError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found a {type(row).__name__}")
    return row


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key} is missing or not a text")
    return value


def _problem(domain: str, skill: str, prompt: str, check: Check, source: str, solution: str | None,
             answer: str) -> Problem:
    messages = ({"role": "user", "content": prompt},)
    return Problem(id=Problem.make_id(messages, check), domain=domain, skill=skill, messages=messages, check=check,
                   source=source, split="", solution=solution, answer=answer)


_FINAL = re.compile(r"-?\d+(\.\d+)?(/\d+)?")


def gsm8k_problem(domain: str, row: dict[str, Any], source: str) -> Problem:
    """A GSM8K row: the chain without its <<calculator>> marks becomes the solution, `#### N` the boxed answer."""
    question, worked = _text(row, "question"), _text(row, "answer")
    chain, marker, final = worked.rpartition("####")
    number = final.strip().replace(",", "").removeprefix("$")
    if not marker or not _FINAL.fullmatch(number):
        raise RowError(f"answer does not end in `#### N` with a number (it ends in {worked[-30:]!r})")
    solution = re.sub(r"<<[^<>]*>>", "", chain).strip()
    return _problem(domain, "gsm8k", f"{question.strip()}\nPut the final answer in \\boxed{{}}.",
                    Check(kind="math", reference=number), source, solution or None,
                    f"The answer is \\boxed{{{number}}}.")


def humaneval_problem(domain: str, row: dict[str, Any], source: str) -> Problem:
    """A HumanEval row: complete the function; its `check(candidate)` is the test."""
    prompt, entry = _text(row, "prompt"), _text(row, "entry_point")
    test, body = _text(row, "test"), _text(row, "canonical_solution")
    if f"def {entry}(" not in prompt:
        raise RowError(f"entry_point {entry!r} is not defined in the prompt")
    if "def check(" not in test:
        raise RowError("test has no check(candidate)")
    # asserts of some rows call helpers and imports that stand before the function
    preamble = prompt[:prompt.index(f"def {entry}(")]
    check = Check(kind="code", language="python", entry_point=entry,
                  tests=json.dumps({"assert_code": f"{preamble}\n{test}"}))
    return _problem(domain, "humaneval",
                    f"Complete the function. Reply with one ```python block.\n```python\n{prompt.rstrip()}\n```",
                    check, source, None, f"```python\n{prompt.rstrip()}\n{body.rstrip()}\n```")


def problem_row(domain: str, row: dict[str, Any], source: str) -> Problem:
    """A row in the form of `Problem`; `messages` may be one text, id and split are set anew."""
    messages, check = row.get("messages"), row.get("check")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            for m in messages):
        raise RowError("messages is not a list of {role, content}")
    if messages[-1]["role"] != "user":
        raise RowError(f"messages ends with a turn of {messages[-1]['role']!r}; it must end with the user's")
    if not isinstance(check, dict) or check.get("kind") not in CHECK_KINDS:
        raise RowError(f"check.kind is missing or not one of {', '.join(CHECK_KINDS)}")
    unknown = sorted(set(check) - {field.name for field in dataclasses.fields(Check)})
    if unknown:
        raise RowError(f"check has unknown keys {unknown}")
    needed = {"math": ("reference",), "exact": ("reference",), "code": ("tests", "language"),
              "principles": ("principles",), "match": ("reference",)}[check["kind"]]
    lacking = [key for key in needed if not check.get(key)]
    if lacking:
        raise RowError(f"check of kind {check['kind']} lacks {', '.join(lacking)}")
    made = Check(**{**check, "principles": tuple(check.get("principles") or ())})
    if made.tests is not None:
        try:
            json.loads(made.tests)
        except (TypeError, json.JSONDecodeError):
            raise RowError("check.tests is not JSON text") from None
    return Problem(id=Problem.make_id(messages, made), domain=domain, skill=str(row.get("skill") or "problem"),
                   messages=tuple(messages), check=made, source=source, split="", solution=row.get("solution"),
                   answer=row.get("answer"))


FORMS: dict[str, Callable[[str, dict[str, Any], str], Problem]] = {
    "gsm8k": gsm8k_problem, "humaneval": humaneval_problem, "problem": problem_row}
