import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_ablation_runs_at_its_smallest_size(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fp8_ablation

    fp8_ablation.main(["--small", "--json", str(tmp_path / "f.json"), "--svg", str(tmp_path / "f.svg")])
    figures = {row["what"]: row["figure"] for row in json.loads((tmp_path / "f.json").read_text())}
    assert figures["last quarter, bf16 loss"] > 0
    assert 0 < abs(figures["last quarter, (fp8 - bf16) / bf16, seed 0"]) < 10
    assert 0 < figures["log-prob of a completion's token, mean |fp8 - exact|"] < 0.5
    for dtype, moments, masters in (("float32", 8, 0), ("bfloat16", 4, 4)):
        plain, fp8 = f"{dtype} weights", f"{dtype} weights, fp8 products"
        for what in ("kept for the backward pass", "of it by projections, MLPs, experts"):
            assert 0 < figures[f"{fp8}: {what}"] < figures[f"{plain}: {what}"]
        assert figures[f"{plain}: Adam moments"] == moments and figures[f"{fp8}: Adam moments"] == 4
        for name in (plain, fp8):
            assert figures[f"{name}: FP32 masters beside the weights"] == masters
    assert ElementTree.parse(tmp_path / "f.svg").getroot().findall(".//{http://www.w3.org/2000/svg}polyline")
