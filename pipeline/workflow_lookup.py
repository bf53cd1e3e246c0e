"""From names to stages: recipes by path or bare name, workflows by the recipe's `workflow`, runs by their folder."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.artifacts import RunDirectory, RunError
from pipeline.fingerprint import GraphError
from pipeline.graph import did_you_mean, order
from pipeline.recipe import Recipe, RecipeError
from pipeline.recipe_file import load_recipe
from pipeline.stage import Stage

SHIPPED = Path(__file__).resolve().parent.parent / "recipes"


def find_recipe(name: str) -> Path:
    """A path as it is, or the bare name of a recipe that comes with posttrain; raises RecipeError."""
    path = Path(name)
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        return path
    shipped = SHIPPED / f"{name}.yaml"
    if not shipped.is_file():
        known = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
        raise RecipeError(f"{name}: no such recipe{did_you_mean(name, known)}; give a path or one of those names")
    return shipped


def load_stages(recipe: Recipe) -> list[Stage]:
    """The ordered stages of the recipe's workflow, `workflows.NAME.build(recipe)`. Raises RecipeError, GraphError."""
    module = _load_workflow(recipe)
    if not hasattr(module, "build"):
        raise GraphError(f"{module.__name__} has no build(recipe) that returns its stages")
    return order(module.build(recipe))


def load_prices(recipe: Recipe) -> Any:
    """What the workflow says its work will take, for rich to print: `workflows.NAME.prices(recipe)`; "" for none."""
    module = _load_workflow(recipe)
    return module.prices(recipe) if hasattr(module, "prices") else ""


def _load_workflow(recipe: Recipe) -> ModuleType:
    module_name = f"workflows.{recipe.workflow}"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise  # the workflow is there; something it imports is not
        package = importlib.import_module("workflows")
        known = [item.name for item in pkgutil.iter_modules(package.__path__)]
        raise RecipeError(f"workflow: no workflow {recipe.workflow!r}{did_you_mean(recipe.workflow, known)}") from None


@dataclass(frozen=True)
class OpenedRun:
    """An existing run, read from its files."""

    directory: RunDirectory
    recipe: Recipe
    stages: list[Stage]


def open_run(path: Path) -> OpenedRun:
    """Read DIR/recipe.yaml and build its graph; raises RunError when there is no run in `path`."""
    directory = existing_run(path)
    recipe = load_recipe(directory.root / "recipe.yaml")
    return OpenedRun(directory, recipe, load_stages(recipe))


def existing_run(path: Path) -> RunDirectory:
    if not (path / "recipe.yaml").is_file():
        raise RunError(f"{path}: no run here (it has no recipe.yaml); start one with: "
                       f"posttrain run RECIPE --run-dir {path}")
    return RunDirectory(path)
