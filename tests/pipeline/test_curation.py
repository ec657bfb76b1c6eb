"""Rows of scores/ as manifests, of every type that a manifest may bring."""

import json

import pyarrow as pa
import pytest

from pipeline import catalog, curation, schemas
from pipeline.errors import ConfigError, OutputError
from pipeline.output import Output


def scored(folder, **columns):
    """An output with the scores of two items, and columns of a manifest."""
    extras = pa.table(columns)
    schema = schemas.scores((), list(extras.schema))
    counts = dict.fromkeys(("n_frames", "n_units", "n_units_failed", "n_missing"), 1)
    rows = [
        {**counts, **row, "partial": False, "model": "m", "item_id": uri, "uri": uri}
        for uri, row in zip(("/a.mp4", "/b.mp4"), extras.to_pylist(), strict=True)
    ]
    output = Output(str(folder / "out"))
    with output.parquet_writer(schema, "scores", "m.parquet") as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return output


def test_a_column_that_a_csv_cannot_hold_is_refused_by_name(tmp_path):
    tags, box = [["x"], None], [{"left": 1}, {"left": 2}]
    output = scored(tmp_path, tags=tags, n=[1, 2], box=box, raw=[b"\xff", b"a"])
    with pytest.raises(ConfigError, match=r"keep\.csv: .*columns tags, box, raw .*\.parquet"):
        curation.keep(output, "true", str(tmp_path / "keep.csv"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert curation.keep(output, "n = 2", str(tmp_path / "keep.parquet"), None) == (1, 2)
    found = catalog.read(str(tmp_path / "keep.parquet")).table
    assert found["box"].to_pylist() == [{"left": 2}]


def test_damaged_scores_are_named_and_not_taken_for_a_wrong_condition(tmp_path):
    output = scored(tmp_path, n=[1, 2])
    (tmp_path / "out/scores/m.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match=r"scores/m\.parquet: .* remove it"):
        curation.keep(output, "n = 2", str(tmp_path / "keep.csv"), None)


def test_what_json_has_no_number_for_is_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    output = scored(tmp_path, mos=[nan, 2.5], all=[[1.5, -inf], [inf]], text=["NaN é", "NaN"])
    curation.keep(output, "true", str(tmp_path / "keep.jsonl"), None)

    def refuse(name):
        raise ValueError(name)

    lines = (tmp_path / "keep.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["mos"] for row in rows] == [None, 2.5]
    assert [row["all"] for row in rows] == [[1.5, None], [None]]
    assert [row["text"] for row in rows] == ["NaN é", "NaN"]
    assert catalog.read(str(tmp_path / "keep.jsonl")).table["mos"].to_pylist() == [None, 2.5]


def test_a_column_is_not_taken_for_the_row(tmp_path):
    output = scored(tmp_path, kept=[{"uri": "x"}, {"uri": "y"}])
    curation.keep(output, "true", str(tmp_path / "keep.jsonl"), None)
    rows = [json.loads(line) for line in (tmp_path / "keep.jsonl").read_text().splitlines()]
    assert [(row["uri"], row["kept"]) for row in rows] == [
        ("/a.mp4", {"uri": "x"}),
        ("/b.mp4", {"uri": "y"}),
    ]
