"""Choose items by their scores: a condition over scores/ to a keep-manifest."""

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

    The file is replaced in one step. Raises ConfigError (bad SQL or suffix) and OutputError.
    """
    suffix = PurePosixPath(to).suffix
    if suffix not in _SUFFIXES:
        raise ConfigError(f"--to {to}: the name must end in {', '.join(_SUFFIXES)}.")
    # Not `output.database()`: conditions could read what lies in its folder for large sorts.
    connection = duckdb.connect()
    connection.register("scores", aggregate.scores(output, model))
    connection.execute("SET enable_external_access = false")
    try:
        query = f"SELECT * FROM scores WHERE ({where}\n) ORDER BY uri"
        kept = connection.sql(query).to_arrow_table()
    except duckdb.Error as error:
        raise ConfigError(f"--where: {str(error).splitlines()[0]}") from error
    total = connection.execute("SELECT count(*) FROM scores").fetchall()[0][0]
    folder, _, name = absolute(to).rpartition("/")
    if folder.startswith(f"{output.url.rstrip('/')}/"):
        raise ConfigError(f"--to {to}: lies among the output's own tables. Name another place.")
    with Output(folder or "/").publish(name) as path:
        _write(kept, connection, str(path), suffix)
    return kept.num_rows, int(total)


def _write(kept: pa.Table, connection: duckdb.DuckDBPyConnection, path: str, suffix: str) -> None:
    if suffix == ".parquet":
        pa.parquet.write_table(kept, path, compression="zstd")
    elif suffix == ".csv":
        pacsv.write_csv(kept, path)
    else:
        connection.register("kept", kept)
        lines = connection.execute("SELECT to_json(kept) FROM kept").fetchall()
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.writelines(f"{line}\n" for (line,) in lines)
