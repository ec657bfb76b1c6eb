"""Choose items by their scores: a condition over scores/ to a keep-manifest."""

import json
from pathlib import PurePosixPath

import duckdb
import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline import aggregate
from pipeline.errors import ConfigError
from pipeline.output import Output
from pipeline.storage import absolute

_SUFFIXES = (".parquet", ".csv", ".jsonl")


def keep(output: Output, where: str, to: str, model: str | None) -> tuple[int, int]:
    """Write the rows of scores/ for which `where` (DuckDB SQL) holds. Returns kept and all.

    The file is replaced in one step. Raises ConfigError (bad SQL or suffix, or a column that a CSV
    cannot hold) and OutputError.
    """
    suffix = PurePosixPath(to).suffix
    if suffix not in _SUFFIXES:
        raise ConfigError(f"--to {to}: the name must end in {', '.join(_SUFFIXES)}.")
    # Not `output.database()`: conditions could read what lies in its folder for large sorts.
    connection = duckdb.connect()
    try:
        with output.reading("scores"):
            connection.register("scores", aggregate.scores(output, model))
            connection.execute("SET enable_external_access = false")
            query = f"SELECT * FROM scores WHERE ({where}\n) ORDER BY uri"
            kept = connection.sql(query).to_arrow_table()
    except duckdb.Error as error:
        raise ConfigError(f"--where: {str(error).splitlines()[0]}") from error
    total = connection.execute("SELECT count(*) FROM scores").fetchall()[0][0]
    folder, _, name = absolute(to).rpartition("/")
    if folder.startswith(f"{output.url.rstrip('/')}/"):
        raise ConfigError(f"--to {to}: lies among the output's own tables. Name another place.")
    with Output(folder or "/").publish(name) as path:
        if suffix == ".csv":
            _write_csv(kept, str(path), to)
        else:
            _write(kept, connection, str(path), suffix)
    return kept.num_rows, int(total)


def _write(kept: pa.Table, connection: duckdb.DuckDBPyConnection, path: str, suffix: str) -> None:
    if suffix == ".parquet":
        pa.parquet.write_table(kept, path, compression="zstd")
    else:
        connection.register("kept", kept)
        # A row is named like no column can be: SQL would take the column for it.
        lines = connection.execute("SELECT to_json(score_row) FROM kept score_row").fetchall()
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.writelines(f"{_strict(line)}\n" for (line,) in lines)


def _strict(line: str) -> str:
    """DuckDB's JSON with null in the place of NaN and Infinity, which JSON does not have."""
    if "NaN" not in line and "Infinity" not in line:
        return line
    return json.dumps(json.loads(line, parse_constant=lambda _: None), ensure_ascii=False)


def _write_csv(kept: pa.Table, path: str, to: str) -> None:
    try:
        pacsv.write_csv(kept, path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        refused = ", ".join(name for name in kept.column_names if not _fits_csv(kept, name))
        raise ConfigError(
            f"--to {to}: a CSV cannot hold the columns {refused} ({error}). Let the name end in "
            ".parquet or .jsonl."
        ) from error


def _fits_csv(kept: pa.Table, name: str) -> bool:
    try:
        pacsv.write_csv(kept.select([name]), pa.MockOutputStream())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True
