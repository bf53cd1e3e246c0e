import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import RunError
from pipeline.tables import BATCH, Table, files, find


@pytest.fixture
def folder(tmp_path):
    """Parts of 10 rows in row groups of 4, a large one among them, and an empty one."""
    start = 0
    for name, rows, group in (("train/part-00000", 10, 4), ("train/part-00001", 0, 4),
                              ("train/part-00002", 2 * BATCH + 5, 2 * BATCH), ("validation/part-00000", 10, 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        numbers = pa.array(range(start, start + rows), pa.int64())
        pq.write_table(pa.table({
            "id": pa.array([f"{number:06}" for number in range(start, start + rows)], pa.string()),
            "text": pa.array(["x" * 3] * rows, pa.string()),
            "verdict": pa.StructArray.from_arrays([numbers, numbers], ["score", "evidence"])}),
            tmp_path / f"{name}.parquet", row_group_size=group)
        start += rows
    return tmp_path


def test_rows_are_found_by_their_place_over_all_parts(folder):
    table = Table(folder)
    assert len(table) == 2 * BATCH + 25
    places = [2 * BATCH + 24, 0, 9, 10, BATCH + 9, 2 * BATCH + 12, 2 * BATCH + 15]
    assert [int(row["id"]) for row in table.rows(places, ["id"])] == places
    assert table.row(10) == {"id": "000010", "text": "xxx", "verdict": {"score": 10, "evidence": 10}}
    assert table.part_of(10) == (folder / "train/part-00002.parquet", 0)
    assert table.part_of(2 * BATCH + 24) == (folder / "validation/part-00000.parquet", 9)


def test_a_row_that_is_not_there_is_a_message(folder, tmp_path):
    with pytest.raises(RunError, match=f"there is no row {2 * BATCH + 25}; it has {2 * BATCH + 25}, counted from 0"):
        Table(folder).row(2 * BATCH + 25)
    assert files(tmp_path / "nowhere") == [] and find(tmp_path / "nowhere", pl.col("id") == "1", ["id"]) == []


def test_narrow_columns_reach_into_a_struct_and_know_their_file(folder):
    index = Table(folder).narrow(["id", "verdict.score"], ["id"])
    assert index.columns == ["place", "id", "verdict.score", "file"]
    assert index["place"].to_list() == index["verdict.score"].to_list()
    assert index["file"].unique().to_list() == [0, 2, 3] and index["id"].dtype == pl.Categorical


def test_rows_are_found_by_what_they_hold(folder):
    assert find(folder, pl.col("id").str.starts_with("00820"), ["text", "id"]) == [
        {"text": "xxx", "id": f"00820{digit}"} for digit in range(10)]
