"""Recipes as files: YAML and overrides in, a `Recipe` or errors that a person can act on out."""

from __future__ import annotations

import difflib
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.recipe import Recipe, RecipeError


def load_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML recipe and apply `a.b.c=value` overrides (values are YAML).

    Raises RecipeError naming file, dotted path, value and remedy for every problem found.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; the ones that come with posttrain are in recipes/") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is a {type(data).__name__}")
    data = _apart(data)
    for override in overrides:
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item, data) for item in error.errors()]
        raise RecipeError(f"{path} has {len(lines)} error{'s' * (len(lines) > 1)}:\n  " + "\n  ".join(lines)) from None


def _apart(node: Any) -> Any:
    """A copy in which sections written once by a YAML anchor are as many, so that an override changes one."""
    if isinstance(node, dict):
        return {key: _apart(value) for key, value in node.items()}
    return [_apart(value) for value in node] if isinstance(node, list) else node


def _apply(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(f"override {override!r}: write it as section.key=value")
    *parents, last = dotted.split(".")
    node: Any = data
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise RecipeError(f"override {override!r}: {name} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _explain(item: Any, data: dict[str, Any]) -> str:
    """One validation error as `path: what (got value); remedy`."""
    location = [str(part) for part in item["loc"]]
    # pydantic inserts the tag of a discriminated union into the location; the YAML has no such level
    shown, node = [], data
    for part in location:
        if isinstance(node, dict) and part not in node and part == node.get("type"):
            continue
        shown.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    path = ".".join(shown) or "recipe"
    if item["type"] == "extra_forbidden":
        names = _field_names(location[:-1])
        near = _closest(shown[-1], names)
        return f"{path}: unknown key" + (f"; did you mean {near}?" if near else "") + \
            (f" (known here: {', '.join(names)})" if names and not near else "")
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    got = f" (got {value!r})" if not isinstance(value, dict | BaseModel) and item["type"] != "missing" else ""
    return f"{path}: {message}{got}"


def _field_names(location: list[str]) -> list[str]:
    """The keys of the section at pydantic's `location`, found by walking the annotations; [] for a free mapping."""
    section: Any = Recipe
    for part in location:
        if get_origin(section) is dict:
            section = get_args(section)[1]
        elif get_origin(section) in (Union, UnionType):  # the part is the tag of one kind
            section = next((kind for kind in get_args(section) if kind.model_fields["type"].default == part), None)
        else:
            field = getattr(section, "model_fields", {}).get(part)
            section = _without_none(field.annotation) if field else None
    return sorted(getattr(section, "model_fields", {}))


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`, else the annotation itself."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if get_origin(annotation) in (Union, UnionType) and len(kinds) == 1 else annotation


def _closest(name: str, names: list[str]) -> str | None:
    found = difflib.get_close_matches(name, names, n=1)
    return found[0] if found else None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
