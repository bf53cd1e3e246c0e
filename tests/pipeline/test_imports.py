import ast
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from pipeline.fingerprint import source_hashes
from pipeline.recipe_file import load_recipe
from workflows.deepseek_v3 import build

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "pipeline": set(),
    "policy": {"pipeline"},
    "rewards": {"pipeline"},
    "distill": {"pipeline", "policy", "rewards"},
    "sft": {"pipeline", "policy", "rewards"},
    "rl": {"pipeline", "policy", "rewards"},
    "evaluation": {"pipeline", "policy", "rewards"},
    "workflows": {"pipeline", "policy", "rewards", "distill", "sft", "rl", "evaluation"},
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (name.partition(".")[0] for name in names):
                if top in MAY_IMPORT and top != package and top not in MAY_IMPORT[package]:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {top}")
    assert not wrong, "imports go pipeline <- (policy, rewards) <- (distill, sft, rl, evaluation) <- workflows"


def test_the_command_line_loads_no_ray_torch_or_vllm():
    code = ("import sys, pipeline.cli, pipeline.show, pipeline.lineage, pipeline.doctor\n"
            "print(sorted({'ray', 'torch', 'vllm', 'transformers', 'trl'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_shipped():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = [".".join(path.parent.relative_to(ROOT).parts) for top in MAY_IMPORT
             for path in (ROOT / top).rglob("__init__.py")]
    assert sorted(set(there) - set(listed)) == []


def test_stages_declare_what_their_functions_import():
    """Follows the calls from a stage's function to other functions of workflows/, and what each imports inside."""
    functions = {node.name: (path.stem, node) for path in (ROOT / "workflows").glob("*.py")
                 for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    for stage in build(load_recipe(ROOT / "recipes/smoke.yaml")):
        function = stage.run.func if isinstance(stage.run, partial) else stage.run
        pending, seen, needed = [function.__name__], set(), {}
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            home, body = functions[name]
            needed[f"workflows/{home}.py"] = name
            for node in ast.walk(body):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                    pending.append(node.func.id)
                # freeing memory before a training changes nothing in it
                if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["make_room"]:
                    top = node.module.partition(".")[0]
                    found = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
                    files = [name.replace(".", "/") + ".py" for name in found]
                    needed |= {file: name for file in files if top in MAY_IMPORT and (ROOT / file).is_file()}
        lacking = {file: name for file, name in needed.items() if file not in source_hashes(stage.modules)}
        assert not lacking, f"stage {stage.name}"
