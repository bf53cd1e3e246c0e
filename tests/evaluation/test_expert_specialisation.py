import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_at_its_smallest_size(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import expert_specialisation

    expert_specialisation.main(["--small", "--json", str(tmp_path / "f.json"), "--svg", str(tmp_path / "f.svg")])
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "f.json").read_text())
    figures = {row["what"]: row["figure"] for row in told["figures"]}
    for way, loads in told["loads"].items():
        assert set(loads["load"]) == {"math", "code", "logic", "writing"} and loads["layers"] == [1, 2, 3]
        assert figures[f"{way}: dropped tokens"] == 0 and 0 < figures[f"{way}: specialisation"] < 1
        assert figures[f"{way}: loss, last tenth"] > 0 and f"{way}: specialisation" in said
    drawn = ElementTree.parse(tmp_path / "f.svg").getroot()
    cells = drawn.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(cells) == 2 * 3 * 4 * 16  # ways, layers, domains, experts
