"""What a stage's result depends on, as data: the parts whose hash is its fingerprint.

The parts go into the manifest of every committed stage, so that `posttrain why` can say which of them
changed by comparing two dictionaries instead of two hashes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.stage import Stage

# Raised when the layout of artifacts changes, so that no stage reads files written another way.
ARTIFACT_FORMAT = 1

HASHED_BYTES = 64 << 20  # of one file read outside the run

# Files of a package that can change what a stage computes; caches and editors' leftovers cannot.
SOURCE_SUFFIXES = frozenset({".py", ".json", ".jinja", ".txt", ".yaml", ".c", ".h", ".cu"})


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
        "sources": {module: source_hashes(module, stage.name) for module in sorted(stage.modules)},
        "config": canonical(stage.config),
        "files": {path: file_digest(Path(path).expanduser()) for path in sorted(stage.files)},
        "seed": seed,
        "inputs": {name: input_fingerprints[name] for name in sorted(stage.inputs)},
    }


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of the parts, 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def source_hashes(module: str, stage: str = "") -> dict[str, str]:
    """{file relative to the top-level package's parent: 16 hex digits} of a module or a whole package.

    Nothing is imported: `status` must not load torch to learn that a file changed.
    """
    root, files = _source_files(module)
    if not files:
        raise GraphError(f"stage {stage}: module {module} is part of its fingerprint, but no source of it was found")
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


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
    lines += _source_changes(old.get("sources", {}), new["sources"])
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


def _source_changes(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> list[str]:
    lines = []
    for module in sorted(set(old) | set(new)):
        before, after = old.get(module, {}), new.get(module, {})
        if before != after:
            files = [file for file in sorted(set(before) | set(after)) if before.get(file) != after.get(file)]
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            lines.append(f"source of {module}: {', '.join(files[:3])}{more}")
    return lines
