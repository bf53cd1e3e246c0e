import errno
import os
from pathlib import Path

import polars as pl
import pytest
from tiny_models import Quiet

from pipeline.parts import HERE_BYTES, map_parts, parts, publish
from pipeline.ray_session import ray_session


def double(source, out, by=2):
    """What a unit of work does; its process id tells who did it."""
    table = pl.read_parquet(source)
    if table["x"].sum() == -9:
        raise OSError(errno.ENOSPC, "no space left on device")
    if table["x"].sum() < 0:
        raise ValueError(f"{source.name} is negative")
    table.select(pl.col("x") * by).write_parquet(out / "table.parquet")
    (out / "process").write_text(str(os.getpid()))


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        pl.DataFrame({"x": [number] * (number % 3)}, schema={"x": pl.Int64}).write_parquet(
            folder / f"part-{number:05}.parquet")
    return parts(folder)


def test_what_is_made_is_not_made_again_and_half_made_folders_do_not_count(sources, tmp_path):
    made = tmp_path / "made"
    (made / "part-00001.77.tmp").mkdir(parents=True)  # of a killed run
    first = map_parts(double, sources, made, Quiet(), 3)
    assert [folder.name for folder in first] == [source.stem for source in sources]
    stamps = [(folder / "table.parquet").stat().st_mtime_ns for folder in first]
    (first[2] / "table.parquet").unlink()
    (first[2] / "process").unlink()
    first[2].rmdir()
    again = map_parts(double, sources, made, Quiet(), 3)
    assert again == first and pl.read_parquet(first[2] / "table.parquet")["x"].to_list() == [6, 6]
    assert [index for index, folder in enumerate(again) if (folder / "table.parquet").stat().st_mtime_ns !=
            stamps[index]] == [2]


def test_an_error_keeps_what_was_made(sources, tmp_path):
    pl.DataFrame({"x": [-1]}).write_parquet(sources[2])
    with pytest.raises(ValueError, match="part-00002.parquet is negative"):
        map_parts(double, sources, tmp_path / "made", Quiet())
    assert sorted(path.name for path in (tmp_path / "made").iterdir() if path.suffix != ".tmp") == [
        "part-00000", "part-00001"]


def test_much_work_is_spread_over_the_processes_of_ray(sources, tmp_path, monkeypatch):
    folders = [*map(str, Path(__file__).parents[:2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))  # where those processes find `double`
    with ray_session("parts", tmp_path, lambda text: None):
        folders = map_parts(double, sources, tmp_path / "made", Quiet(), size=HERE_BYTES)
        assert [pl.read_parquet(folder / "table.parquet")["x"].sum() for folder in folders] == [0, 2, 8, 0]
        assert str(os.getpid()) not in {(folder / "process").read_text() for folder in folders}
        pl.DataFrame({"x": [-1]}).write_parquet(sources[1])
        with pytest.raises(ValueError, match="part-00001.parquet is negative"):
            map_parts(double, sources, tmp_path / "again", Quiet(), size=HERE_BYTES)
        pl.DataFrame({"x": [-9]}).write_parquet(sources[1])
        with pytest.raises(OSError) as full:
            map_parts(double, sources, tmp_path / "full", Quiet(), size=HERE_BYTES)
        assert full.value.errno == errno.ENOSPC


def test_published_parts_are_numbered_anew_and_hold_every_row(sources, tmp_path):
    folders = map_parts(double, sources, tmp_path / "made", Quiet())
    assert publish(folders, "table.parquet", tmp_path / "out") == 3
    assert [path.name for path in parts(tmp_path / "out")] == ["part-00000.parquet", "part-00001.parquet"]
    assert pl.read_parquet(tmp_path / "out/*.parquet")["x"].to_list() == [2, 4, 4]
    assert publish(folders[:1], "table.parquet", tmp_path / "empty") == 0
    assert pl.read_parquet(tmp_path / "empty/*.parquet").schema == {"x": pl.Int64}
