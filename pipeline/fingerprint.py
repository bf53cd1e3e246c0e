"""What a stage's result depends on, as data: the parts whose hash is its fingerprint.

The parts go into the manifest of every committed stage, so that `posttrain why` can say which of them
changed by comparing two dictionaries instead of two hashes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.stage import Stage

# Raised when the layout of artifacts changes, so that no stage reads files written another way.
ARTIFACT_FORMAT = 3

# The project's own packages: imports of anything else are a matter of installed versions.
PACKAGES = frozenset({"distill", "evaluation", "pipeline", "policy", "rewards", "rl", "sft", "workflows"})

HASHED_BYTES = 64 << 20  # of one file read outside the run

# Files of a package that can change what a stage computes; caches and editors' leftovers cannot.
SOURCE_SUFFIXES = frozenset({".py", ".json", ".jinja", ".txt", ".yaml", ".c", ".h", ".cu", ".cpp", ".js", ".java"})


class GraphError(ValueError):
    """A workflow that cannot be run: an unknown input, a cycle, a module that is not there."""


def canonical(value: Any) -> Any:
    """`value` as plain JSON data; raises TypeError for what has no stable JSON form."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a stage's config holds a {type(value).__name__}, which has no stable form to hash; "
                    "use pydantic models, dicts, lists, strings and numbers")


def stage_parts(stage: Stage, seed: int, input_fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Everything the stage's result depends on, as JSON data."""
    return {
        "format": ARTIFACT_FORMAT,
        "stage": stage.name,
        "sources": source_hashes(stage.modules, stage.name),
        "config": canonical(stage.config),
        "files": {path: file_digest(Path(path)) for path in sorted(stage.files)},
        "seed": seed,
        "inputs": {name: input_fingerprints[name] for name in sorted(stage.inputs)},
    }


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of the parts, 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def source_hashes(modules: Iterable[str], stage: str = "") -> dict[str, str]:
    """{file: 16 hex digits} of modules, whole packages, and what of the project their files import when loaded.

    What a function imports is its caller's to declare. Nothing is imported here: `status` must not load torch to
    learn that a file changed. Raises GraphError for a module without source.
    """
    found: dict[str, str] = {}
    pending, seen = list(modules), set()
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        root, files = _source_files(module)
        if not files:
            raise GraphError(f"stage {stage}: module {module} is part of its fingerprint, but no source of it was "
                             "found")
        for file in files:
            name = str(file.relative_to(root))
            if name not in found:
                digest, imported = _read_source(file, file.stat().st_mtime_ns)
                found[name] = digest
                pending += imported
    return dict(sorted(found.items()))


@cache
def _read_source(file: Path, _changed: int) -> tuple[str, tuple[str, ...]]:
    """The hash of a file and the project's modules that it imports at its top level."""
    content = file.read_bytes()
    digest, modules = hashlib.sha256(content).hexdigest()[:16], []
    try:
        body = ast.parse(content).body if file.suffix == ".py" else []
    except SyntaxError:  # the stage that imports it will say so
        body = []
    for node in body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [name if _is_module(name) else node.module for name in inner]
    return digest, tuple(name for name in modules if name.split(".")[0] in PACKAGES)


def _is_module(name: str) -> bool:
    return name.split(".")[0] in PACKAGES and bool(_source_files(name)[1])


def file_digest(path: Path) -> str:
    """16 hex digits of a file's content or a folder's files; "missing" when it is not there.

    Files above HASHED_BYTES count by size and time of change: `status` must not read a model's weights.
    """
    if not path.exists():
        return "missing"
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        stat = file.stat()
        digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0".encode())
        digest.update(str(stat.st_mtime_ns).encode() if stat.st_size > HASHED_BYTES else file.read_bytes())
    return digest.hexdigest()[:16]


def _source_files(module: str) -> tuple[Path, tuple[Path, ...]]:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # finding a top-level name does not import it
    if spec is None:
        return Path(), ()
    if spec.submodule_search_locations:
        package = Path(next(iter(spec.submodule_search_locations)))
        root, target = package.parent, package.joinpath(*rest)
    else:
        target = Path(spec.origin or "").with_suffix("")
        root = target.parent
    if target.is_dir():
        return root, tuple(sorted(file for file in target.rglob("*") if file.suffix in SOURCE_SUFFIXES))
    file = target.with_suffix(".py")
    return root, (file,) if file.is_file() else ()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each part that differs between two stages' parts; [] when none does."""
    lines = []
    if old.get("format") != new["format"]:
        lines.append(f"artifact format: {old.get('format')} -> {new['format']}")
    lines += [f"config {line}" for line in _value_changes("", old.get("config"), new["config"])]
    if old.get("seed") != new["seed"]:
        lines.append(f"seed: {old.get('seed')} -> {new['seed']}")
    lines += [f"file {path}: {old.get('files', {}).get(path, 'not read before')} -> {digest}"
              for path, digest in new["files"].items() if old.get("files", {}).get(path) != digest]
    if files := [file for file in sorted({*old.get("sources", {}), *new["sources"]})
                 if old.get("sources", {}).get(file) != new["sources"].get(file)]:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        lines.append(f"source of {', '.join(files[:3])}{more}")
    old_inputs = old.get("inputs", {})
    for name in sorted(set(old_inputs) | set(new["inputs"])):
        before, after = old_inputs.get(name), new["inputs"].get(name)
        if before is None:
            lines.append(f"input {name}: added")
        elif after is None:
            lines.append(f"input {name}: removed")
        elif before != after:
            lines.append(f"input {name}: {before[:12]} -> {after[:12]}")
    return lines


def _value_changes(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*new, *(key for key in old if key not in new)]:
            dotted = f"{path}.{key}" if path else key
            if key not in old:
                lines.append(f"{dotted}: added ({_shown(new[key])})")
            elif key not in new:
                lines.append(f"{dotted}: removed (was {_shown(old[key])})")
            else:
                lines += _value_changes(dotted, old[key], new[key])
        return lines
    return [] if old == new else [f"{path or 'value'}: {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."

