import ast
import subprocess
import sys
from pathlib import Path

import pytest

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
